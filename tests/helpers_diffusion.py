"""Processes, noise, and denoisers that are known exactly, for the tests of the diffusion core."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unclip.config import DiffusionConfig, parse_config
from unclip.diffusion import Denoiser, GaussianDiffusion, Prediction
from unclip.diffusion.process import Step

T = 1000
# A data set of two independent normal dimensions.
MEAN = torch.tensor([0.8, -0.3], dtype=torch.float64)
DEVIATION = torch.tensor([0.5, 0.2], dtype=torch.float64)


def process(**options: object) -> GaussianDiffusion:
    return GaussianDiffusion(parse_config(DiffusionConfig, options))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Float64 noise whose values float32 holds exactly, so that a float32 reading of it loses nothing."""
    return torch.randn(*shape, generator=generator(seed)).double()


def no_noise(x: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def exact(ours: GaussianDiffusion, steps: list[Step] | None = None) -> Denoiser:
    """E[x_0|x_t] of N(MEAN, DEVIATION²). With `steps`, also the exact variance's fraction."""
    by_t = {step.t: step for step in steps or []}

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        bar = float(ours.alphas_cumprod[int(t[0])])
        total = bar * DEVIATION**2 + 1 - bar
        x_start = MEAN + math.sqrt(bar) * DEVIATION**2 / total * (x - math.sqrt(bar) * MEAN)
        epsilon = (x - math.sqrt(bar) * x_start) / math.sqrt(1 - bar)
        fraction = None
        if by_t and by_t[int(t[0])].alpha_bar_prev < 1:
            step = by_t[int(t[0])]
            coef = math.sqrt(step.alpha_bar_prev) * step.beta / (1 - bar)
            wanted = step.posterior_variance + coef**2 * DEVIATION**2 * (1 - bar) / total
            small = math.log(step.posterior_variance)
            fraction = ((wanted.log() - small) / (math.log(step.beta) - small)).expand_as(x)
            assert bool((fraction >= 0).all()) and bool((fraction <= 1).all())  # the bounds hold it
        elif by_t:
            fraction = torch.zeros_like(x)
        return Prediction(x_start, epsilon, fraction)

    return denoise


# A mixture of two isotropic normals in two dimensions.
MODES = torch.tensor([[0.7, 0.4], [-0.5, -0.4]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
SPREAD = 0.15


def mixture_mean_and_variance() -> tuple[Tensor, Tensor]:
    mean = (WEIGHTS[:, None] * MODES).sum(0)
    return mean, SPREAD**2 + (WEIGHTS[:, None] * (MODES - mean) ** 2).sum(0)


def draw_mixture(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x_0 (count, 2) and which mode each comes from."""
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator(seed))
    return MODES[which] + SPREAD * normal(count, 2, seed=seed + 1), which


def log_responsibility(ours: GaussianDiffusion, x: Tensor, t: Tensor) -> Tensor:
    """log p(mode|x_t), (B, 2)."""
    bar = torch.from_numpy(ours.alphas_cumprod)[t][:, None]
    variance = bar * SPREAD**2 + 1 - bar
    distance = (x[:, None] - bar.sqrt()[..., None] * MODES).square().sum(-1)
    return torch.log_softmax(WEIGHTS.log() - distance / (2 * variance), dim=1)


def exact_mixture(ours: GaussianDiffusion, mode: int | None = None) -> Denoiser:
    """E[x_0|x_t] of the mixture, or of one of its modes."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        bar = torch.from_numpy(ours.alphas_cumprod)[t][:, None]
        gain = bar.sqrt() * SPREAD**2 / (bar * SPREAD**2 + 1 - bar)
        each = MODES + gain[..., None] * (x[:, None] - bar.sqrt()[..., None] * MODES)  # (B, 2 modes, 2)
        mixed = (log_responsibility(ours, x, t).exp()[..., None] * each).sum(1)
        x_start = mixed if mode is None else each[:, mode]
        return Prediction(x_start, (x - bar.sqrt() * x_start) / (1 - bar).sqrt(), None)

    return denoise
