"""Multistep solvers of the probability flow in λ = log(sqrt(ᾱ)/sqrt(1−ᾱ)), on x̂_0: DPM-Solver++ and UniPC."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import Step
from unclip.diffusion.samplers.common import Callback, Noise, half_log_snr, refuse_noise, tell, timestep


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
    refuse_noise("dpmpp_2m", eta)
    previous: Tensor | None = None
    previous_lambda = 0.0
    for number, step in enumerate(steps):
        x_start = denoiser(x, timestep(step.t, x)).x_start
        lambda_s = half_log_snr(step.alpha_bar)
        if number == len(steps) - 1:  # λ → ∞: the solver's limit is x̂_0 itself
            x = math.sqrt(step.alpha_bar_prev) * x_start
        else:
            h = half_log_snr(step.alpha_bar_prev) - lambda_s
            data = x_start
            if previous is not None:  # after pure noise, λ = −∞, r is ∞ and the step of first order
                r = (lambda_s - previous_lambda) / h
                data = x_start + (x_start - previous) / (2 * r)
            x = _exponential(x, data, step)
        previous, previous_lambda = x_start, lambda_s
        tell(callback, number, steps, x_start)
    return x


def unipc(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC-2 with B(h) = e^h − 1 on x̂_0 (Zhao et al. 2023, algorithms 5 and 6): a predictor of order 2, and a
    corrector that reuses the next step's evaluation, so that N steps cost N evaluations.

    First order at the start and at the last step. Deterministic.
    """
    refuse_noise("unipc", eta)
    older: tuple[float, Tensor] | None = None  # (λ, x̂_0) of two evaluations before
    old: tuple[float, Tensor] | None = None  # and of the one before
    before = x  # what the last predictor started from
    for number, step in enumerate(steps):
        x_start = denoiser(x, timestep(step.t, x)).x_start
        lambda_s = half_log_snr(step.alpha_bar)
        if old is not None and math.isfinite(old[0]):
            x = _correct(before, x_start, lambda_s, old, older, steps[number - 1])
        older, old, before = old, (lambda_s, x_start), x
        if number == len(steps) - 1:
            x = math.sqrt(step.alpha_bar_prev) * x_start
        else:
            data = x_start
            if older is not None and math.isfinite(older[0]):
                h = half_log_snr(step.alpha_bar_prev) - lambda_s
                data = x_start + 0.5 * (older[1] - x_start) * h / (older[0] - lambda_s)
            x = _exponential(x, data, step)
        tell(callback, number, steps, x_start)
    return x


def _correct(
    before: Tensor,
    x_start: Tensor,
    lambda_t: float,
    old: tuple[float, Tensor],
    older: tuple[float, Tensor] | None,
    step: Step,
) -> Tensor:
    """UniC: the step from `before` once more, now that x̂_0 at its end is known (Zhao et al. 2023, eq. 5 and 9)."""
    lambda_s, data = old
    newest = x_start - data
    if older is None or not math.isfinite(older[0]):
        return _exponential(before, data + 0.5 * newest, step)
    h = lambda_t - lambda_s
    # b_k = h φ_{k+1}(−h) k! / B(h) up to sign, with ψ_1 = (e^{−h} − 1)/(−h) − 1 and so on.
    first = math.expm1(-h) / -h - 1
    second = first / -h - 0.5
    b1, b2 = first / math.expm1(-h), 2 * second / math.expm1(-h)
    r = (older[0] - lambda_s) / h
    # ρ solves [[1, 1], [r, 1]] ρ = b.
    rho_older = (b1 - b2) / (1 - r)
    rho_newest = b1 - rho_older
    return _exponential(before, data + rho_older * (older[1] - data) / r + rho_newest * newest, step)


def _exponential(x: Tensor, data: Tensor, step: Step) -> Tensor:
    """σ_t/σ_s x − sqrt(ᾱ_t)(e^{−h} − 1) x̂_0: exact where x̂_0 stays `data` (DPM-Solver++, eq. 9)."""
    h = half_log_snr(step.alpha_bar_prev) - half_log_snr(step.alpha_bar)
    ratio = math.sqrt((1 - step.alpha_bar_prev) / (1 - step.alpha_bar))
    return ratio * x - math.sqrt(step.alpha_bar_prev) * math.expm1(-h) * data
