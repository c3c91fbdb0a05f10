"""Analytic-DPM: the optimal reverse variance, in closed form, from statistics of a trained model (Bao et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unclip.config import EpsilonStatistics
from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from unclip.diffusion.guidance import Denoiser
    from unclip.diffusion.process import GaussianDiffusion, Step


def x_start_variance(alpha_bar: float, epsilon_square: float, data_variance: float) -> float:
    """E Cov(x_0|x_t)/d = (1−ᾱ)/ᾱ · (1 − Γ), Γ = E||ε̂||²/d (Bao et al. 2022, lemma 7), held within its bounds.

    Γ lies in [0, 1] for the optimal ε̂ (theorem 2). What x_t leaves open of x_0 is never more than x_0's own variance;
    that is tighter than the paper's ((b − a)/2)² for data in [a, b], and holds for unbounded data too. Near pure noise,
    where Γ is 1 within the error of its measurement, this bound decides.
    """
    if alpha_bar == 0:
        return data_variance
    open_part = (1 - alpha_bar) / alpha_bar * (1 - min(max(epsilon_square, 0.0), 1.0))
    return min(open_part, data_variance)


def analytic_variance(step: Step, eta: float = 1.0) -> float:
    """σ*² of a step whose mean is DDIM's with λ² = η² β̃ (Bao et al. 2022, eq. 8; η = 1 is DDPM's mean).

    σ*² = λ² + (sqrt(ᾱ_{t−1}) − sqrt(1−ᾱ_{t−1}−λ²) · sqrt(ᾱ_t/(1−ᾱ_t)))² · E Cov(x_0|x_t)/d.
    """
    if step.x_start_variance is None:
        raise UnclipError(
            "the sampler analytic needs statistics that this model does not have; measure them with "
            "`unclip statistics MODEL --data SOURCE`, or choose another sampler, such as ddpm"
        )
    smallest = eta**2 * step.posterior_variance
    direction = math.sqrt(max(1 - step.alpha_bar_prev - smallest, 0.0))
    weight = math.sqrt(step.alpha_bar_prev) - direction * math.sqrt(step.alpha_bar / (1 - step.alpha_bar))
    variance = smallest + weight**2 * step.x_start_variance
    return variance if step.noise_limit is None else min(variance, step.noise_limit**2)


def pixel_noise_limit(levels: float = 2.0) -> float:
    """σ at which E|σ ε| is `levels` 8-bit levels of data in [-1, 1]: the cap on the last noise (App. F.2: 1 or 2)."""
    return levels * 2 / 255 * math.sqrt(math.pi / 2)


def measure_epsilon_statistics(
    samples: Iterable[tuple[Denoiser, Tensor]],
    process: GaussianDiffusion,
    timesteps: Sequence[int],
    generator: torch.Generator,
    noise_limit: float | None = None,
) -> EpsilonStatistics:
    """Γ_t = E||ε̂(x_t, t)||²/d over data (Bao et al. 2022, eq. 9), at `timesteps`; between them it is interpolated.

    `samples` are batches of x_0 (B, …) with the denoiser that knows their conditioning, without guidance or clipping,
    which are no part of the model. Noise comes from `generator`, drawn on its device.
    Raises UsageError: no samples, or no timestep of this process.
    """
    kept = sorted(set(timesteps))
    if not kept or not 0 <= kept[0] <= kept[-1] < process.timesteps:
        raise UsageError(f"statistics at timesteps {list(timesteps)}; expected some of 0 to {process.timesteps - 1}")
    total = torch.zeros(len(kept), dtype=torch.float64)
    count, sums, squares = 0, torch.zeros(()), torch.zeros(())
    for denoiser, x_start in samples:
        for index, t in enumerate(kept):
            noise = torch.randn(x_start.shape, generator=generator, device=generator.device).to(x_start)
            steps = torch.full((len(x_start),), t, dtype=torch.long, device=x_start.device)
            epsilon = denoiser(process.q_sample(x_start, steps, noise), steps).epsilon
            total[index] += epsilon.double().square().flatten(1).mean(1).sum().item()
        count += len(x_start)
        values = x_start.double().cpu()
        sums, squares = sums + values.sum(0), squares + values.square().sum(0)
    if not count:
        raise UsageError("no samples to measure statistics on; name a data source that is not empty")
    return EpsilonStatistics(
        timesteps=tuple(kept),
        epsilon_square=tuple((total / count).tolist()),
        data_variance=max((squares / count - (sums / count) ** 2).mean().item(), 1e-12),
        noise_limit=noise_limit,
        samples=count,
    )
