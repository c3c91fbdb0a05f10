"""Samplers: plain functions over a denoiser, all with one signature.

`sampler(denoiser, x, steps, noise, *, eta=…, callback=…) -> x_0`, where `x` is x_T (B, …), `steps` comes from
`GaussianDiffusion.steps(timesteps)` and `noise(x)` draws standard normal noise of x's shape. The callback hears
`(number, total, x̂_0)` after each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import Step
from unclip.errors import UsageError

Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor], None]
Sampler = Callable[..., Tensor]


class SeededNoise:
    """Standard normal noise with one generator a sample, so that a seed gives the same sample in any batch.

    Drawn on the CPU in float32 whatever the device, so that the device does not change the picture's noise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Noise (len(seeds), *shape)."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators]).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:], x.device).to(x.dtype)


def ddpm(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling (DDPM, algorithm 2) on a respaced process, with a learned variance where the network has one.

    `eta` scales the noise's standard deviation; 1 is DDPM. The last step adds none.
    """
    for number, step in enumerate(steps):
        prediction = denoiser(x, _timestep(step, x))
        coef_start = math.sqrt(step.alpha_bar_prev) * step.beta / (1 - step.alpha_bar)
        coef_x = math.sqrt(1 - step.beta) * (1 - step.alpha_bar_prev) / (1 - step.alpha_bar)
        mean = coef_start * prediction.x_start + coef_x * x
        if number == len(steps) - 1:
            x = mean
        elif prediction.variance_fraction is None:
            x = mean + eta * math.sqrt(step.posterior_variance) * noise(x)
        else:  # Σ = exp(v log β + (1−v) log β̃) (Improved DDPM, eq. 15)
            v = prediction.variance_fraction
            log_variance = v * math.log(step.beta) + (1 - v) * math.log(step.posterior_variance)
            x = mean + eta * torch.exp(0.5 * log_variance) * noise(x)
        _tell(callback, number, steps, prediction.x_start)
    return x


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): x_{t−1} = sqrt(ᾱ_{t−1}) x̂_0 + sqrt(1−ᾱ_{t−1}−σ²) ε̂ + σ z, σ² = η² β̃_t."""
    for number, step in enumerate(steps):
        prediction = denoiser(x, _timestep(step, x))
        variance = eta**2 * step.posterior_variance
        direction = math.sqrt(max(1 - step.alpha_bar_prev - variance, 0.0))
        x = math.sqrt(step.alpha_bar_prev) * prediction.x_start + direction * prediction.epsilon
        if eta > 0 and number < len(steps) - 1:
            x = x + math.sqrt(variance) * noise(x)
        _tell(callback, number, steps, prediction.x_start)
    return x


def dpmpp_2m(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): deterministic, second order, multistep; first order at the last
    step."""
    if eta:
        raise UsageError(f"dpmpp_2m is deterministic and takes eta 0 only, got {eta}; use ddim or ddpm")
    previous: Tensor | None = None
    previous_lambda = 0.0
    for number, step in enumerate(steps):
        x_start = denoiser(x, _timestep(step, x)).x_start
        lambda_s = _half_log_snr(step.alpha_bar)
        last = number == len(steps) - 1
        if last:  # λ → ∞: the solver's limit is x̂_0 itself
            x = math.sqrt(step.alpha_bar_prev) * x_start
        else:
            h = _half_log_snr(step.alpha_bar_prev) - lambda_s
            data = x_start
            if previous is not None:
                r = (lambda_s - previous_lambda) / h
                data = x_start + (x_start - previous) / (2 * r)
            sigma_ratio = math.sqrt((1 - step.alpha_bar_prev) / (1 - step.alpha_bar))
            x = sigma_ratio * x - math.sqrt(step.alpha_bar_prev) * math.expm1(-h) * data
        previous, previous_lambda = x_start, lambda_s
        _tell(callback, number, steps, x_start)
    return x


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`; UsageError lists the known ones."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _timestep(step: Step, x: Tensor) -> Tensor:
    return torch.full((len(x),), step.t, dtype=torch.long, device=x.device)


def _half_log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _tell(callback: Callback | None, number: int, steps: Sequence[Step], x_start: Tensor) -> None:
    if callback is not None:
        callback(number + 1, len(steps), x_start)
