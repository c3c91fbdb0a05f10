"""DDIM, and its inversion from an image to the noise that it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import Prediction, Step
from unclip.diffusion.samplers.common import Callback, Noise, refuse_noise, tell, timestep, transfer


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
        prediction = denoiser(x, timestep(step.t, x))
        x = ddim_step(prediction, step, eta, noise(x) if eta > 0 and number < len(steps) - 1 else None)
        tell(callback, number, steps, prediction.x_start)
    return x


def ddim_step(prediction: Prediction, step: Step, eta: float, noise: Tensor | None) -> Tensor:
    """x_{t−1} from what the denoiser says of x_t; `noise` None leaves the last term of eq. 12 out."""
    variance = eta**2 * step.posterior_variance
    direction = math.sqrt(max(1 - step.alpha_bar_prev - variance, 0.0))
    x = math.sqrt(step.alpha_bar_prev) * prediction.x_start + direction * prediction.epsilon
    return x if noise is None else x + math.sqrt(variance) * noise


def ddim_inversion(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
    refinements: int = 0,
) -> Tensor:
    """x_0 -> x_T by DDIM run backwards (DDIM, §4.3; unCLIP §3), over the same `steps` as the sampling to come.

    A step of DDIM from t to s uses ε̂(x_t, t). Its inverse starts at x_s and does not have x_t yet; it takes
    ε̂(x_s, t), so that x_t = sqrt(ᾱ_t) (x_s − sqrt(1−ᾱ_s) ε̂)/sqrt(ᾱ_s) + sqrt(1−ᾱ_t) ε̂. Each refinement evaluates ε̂
    again at the x_t found (fixed-point inversion, Pan et al. 2023), at the price of one more pass through the network
    a step; sampling then comes back to x_0 ever more closely. Deterministic: `noise` is not drawn. ᾱ_T may be 0.
    """
    refuse_noise("ddim_inversion", eta)
    for number, step in enumerate(reversed(steps)):
        t, before = timestep(step.t, x), x
        for _ in range(1 + refinements):
            prediction = denoiser(x, t)
            sigma = math.sqrt(1 - step.alpha_bar_prev)
            x_start = (before - sigma * prediction.epsilon) / math.sqrt(step.alpha_bar_prev)
            x = transfer(x_start, prediction.epsilon, step.alpha_bar)
        tell(callback, number, steps, prediction.x_start)
    return x
