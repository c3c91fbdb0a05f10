"""Samplers that draw from the reverse process: DDPM, and Analytic-DPM with the optimal variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import Prediction, Step
from unclip.diffusion.samplers.common import Callback, Noise, tell, timestep
from unclip.diffusion.variance import analytic_variance


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

    `eta` scales the noise's standard deviation; 1 is DDPM. The last step adds none and gives x̂_0 itself, as Karlo's
    does (there `fixed_small_log`, which is β̃ computed through its logarithm).
    """
    for number, step in enumerate(steps):
        prediction = denoiser(x, timestep(step.t, x))
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
        tell(callback, number, steps, prediction.x_start)
    return x


def ddpm_large(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """`ddpm` with the larger variance β of the kept steps, whatever the network says of it: σ̂ of DDIM (Song et al.
    2021, §5.1), which its table 1 compares.
    """

    def large(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoiser(x_t, t)
        return prediction._replace(variance_fraction=torch.ones_like(prediction.x_start))

    return ddpm(large, x, steps, noise, eta=eta, callback=callback)


def analytic(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Analytic-DPM (Bao et al. 2022, eq. 8): the optimal variance from the model's statistics, which `steps` carry.

    The mean is DDIM's with σ² = λ² = η² β̃, so that η = 1 is the analytic DDPM of the paper and η = 0 its analytic DDIM;
    both add noise. The last step adds none. Raises UnclipError: steps of a process without statistics.
    """
    for number, step in enumerate(steps):
        variance = analytic_variance(step, eta)
        prediction = denoiser(x, timestep(step.t, x))
        smallest = eta**2 * step.posterior_variance
        direction = math.sqrt(max(1 - step.alpha_bar_prev - smallest, 0.0))
        x = math.sqrt(step.alpha_bar_prev) * prediction.x_start + direction * prediction.epsilon
        if number < len(steps) - 1:
            x = x + math.sqrt(variance) * noise(x)
        tell(callback, number, steps, prediction.x_start)
    return x
