"""The noise that a picture comes from, and back: DDIM inversion that stays exact where a denoiser is not.

Sampling ends with the last x̂_0, and a small network's x̂_0 of an image is not that image: what lies outside its range
is lost at the last step. An inversion from t = 0 takes that error for noise, ε̂ = (x_t − sqrt(ᾱ_t) x̂_0)/sqrt(1−ᾱ_t)
with a sqrt(1−ᾱ_t) of nearly 0, and carries something far from normal upwards. So the path here does not end at the
data but at `lowest_level`, where what the network leaves of the image is as large as the noise it expects there:
the image counts as that x_t, its unexplained detail as the noise. A good network reaches down to t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import GaussianDiffusion, Step
from unclip.diffusion.samplers.common import Callback, Noise, tell, timestep
from unclip.diffusion.samplers.implicit import ddim_inversion, ddim_step
from unclip.errors import UsageError

_LEAST_SIGNAL = 0.02


def lowest_level(denoiser: Denoiser, x_start: Tensor, process: GaussianDiffusion) -> Tensor:
    """For each image (B, C, H, W) in [-1, 1] the smallest t, (B,) int64, at which the network's ε̂ of
    sqrt(ᾱ_t)·x_0 has a root mean square of at most 1, which is what noise has. Found by bisection, one pass each.
    """
    low = torch.zeros(len(x_start), dtype=torch.long, device=x_start.device)
    high = torch.full_like(low, process.timesteps - 1)
    while bool((low < high).any()):
        middle = (low + high) // 2
        alpha, _ = process.alpha_sigma(middle, x_start)
        epsilon = denoiser(alpha * x_start, middle).epsilon
        enough = epsilon.double().square().flatten(1).mean(dim=1) <= 1
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return high


def highest_level(process: GaussianDiffusion) -> int:
    """The t to invert up to. Of a network that predicts ε, x̂_0 is its error divided by sqrt(ᾱ_t), which near T is
    next to 0 (5e-5 with the cosine schedule): the way back would begin with that error alone. There it is the largest t
    with sqrt(ᾱ_t) of at least 0.02, for other networks T − 1.
    """
    if process.config.prediction != "epsilon":
        return process.timesteps - 1
    return int((process.sqrt_alphas_cumprod >= _LEAST_SIGNAL).nonzero()[0][-1])


def invert(
    denoiser: Denoiser,
    x_start: Tensor,
    steps: Sequence[Step],
    *,
    refinements: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """Images -> x_T over `steps` (noisiest first), the last of which is the level that the images are taken to be at.

    Each refinement is one more pass a step (see ddim_inversion). UsageError: fewer than two steps.
    """
    _check(steps)
    x = math.sqrt(steps[-1].alpha_bar) * x_start
    return ddim_inversion(denoiser, x, steps[:-1], lambda like: like, refinements=refinements, callback=callback)


def replay(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """x_T -> images over the `steps` of its inversion; eta 0 undoes it, eta 1 forgets it (unCLIP §3.1).

    The end is x̂_0 + k·(x_t/sqrt(ᾱ_t) − x̂_0), k = `kept_share`: what the last level holds of x_T's own noise is detail
    of the picture and stays, what it holds of drawn noise is taken away. That is the least-squares estimate of the
    detail, and x_t/sqrt(ᾱ_t) itself with eta 0.
    """
    _check(steps)
    last = steps[-1]
    for number, step in enumerate(steps[:-1]):
        prediction = denoiser(x, timestep(step.t, x))
        x = ddim_step(prediction, step, eta, noise(x) if eta > 0 else None)
        tell(callback, number, steps[:-1], prediction.x_start)
    whole = x / math.sqrt(last.alpha_bar)
    if eta == 0:
        return whole
    x_start = denoiser(x, timestep(last.t, x)).x_start
    return x_start + kept_share(steps, eta) * (whole - x_start)


def kept_share(steps: Sequence[Step], eta: float) -> float:
    """The share, in amplitude, of the noise at the last of `steps` that comes from x_T and was not drawn on the way:
    the product over the moves of sqrt(1 − ᾱ_s − η² β̃)/sqrt(1 − ᾱ_s) (from DDIM, eq. 12). 1 for eta 0.
    """
    share = 1.0
    for step in steps[:-1]:
        share *= max(1 - eta**2 * step.posterior_variance / (1 - step.alpha_bar_prev), 0.0)
    return math.sqrt(share)


def _check(steps: Sequence[Step]) -> None:
    if len(steps) < 2:
        raise UsageError(f"an inversion takes 2 or more timesteps, got {len(steps)}")
