"""Pseudo linear multistep methods (PNDM, Liu et al. 2022): DDIM's move with ε̂ mixed from several evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import Prediction, Step
from unclip.diffusion.samplers.common import Callback, Noise, refuse_noise, tell, timestep, transfer

# Below this ᾱ an ε that is a mixture says nothing of x_0: its error is divided by sqrt(ᾱ), as at the cosine schedule's
# last timestep (2e-9). Such a step is one of first order, by the network's own x̂_0.
_NO_SIGNAL = 1e-6


def plms(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """PLMS: Adams-Bashforth of order 4 on ε̂ (PNDM, eq. 12), started by lower orders as in latent diffusion.

    The first step is repeated with the mean of ε̂ at both its ends, so that N steps cost N + 1 evaluations (one step
    costs one). Deterministic.
    """
    refuse_noise("plms", eta)
    history: list[Tensor] = []
    for number, step in enumerate(steps):
        prediction = denoiser(x, timestep(step.t, x))
        epsilon = prediction.epsilon
        if step.alpha_bar < _NO_SIGNAL:
            x = transfer(prediction.x_start, epsilon, step.alpha_bar_prev)
        elif not history and number < len(steps) - 1:
            after = denoiser(_move(x, epsilon, step), timestep(steps[number + 1].t, x)).epsilon
            x = _move(x, (epsilon + after) / 2, step)
            history.append(epsilon)
        else:
            history = [*history[-3:], epsilon]
            x = _last_or_move(x, prediction, _adams_bashforth(history), step)
        tell(callback, number, steps, prediction.x_start)
    return x


def pndm(
    denoiser: Denoiser,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """F-PNDM (Liu et al. 2022, algorithm 2): three pseudo Runge-Kutta steps (eq. 13), then PLMS of order 4.

    A Runge-Kutta step costs four evaluations, two of them at the timestep halfway. Deterministic.
    """
    refuse_noise("pndm", eta)
    history: list[Tensor] = []
    for number, step in enumerate(steps):
        prediction = denoiser(x, timestep(step.t, x))
        if step.alpha_bar < _NO_SIGNAL:
            x = transfer(prediction.x_start, prediction.epsilon, step.alpha_bar_prev)
        elif len(history) < 3 and number < len(steps) - 1:
            history.append(prediction.epsilon)
            x = _runge_kutta(denoiser, x, prediction.epsilon, step, steps[number + 1].t)
        else:
            history = [*history[-3:], prediction.epsilon]
            x = _last_or_move(x, prediction, _adams_bashforth(history), step)
        tell(callback, number, steps, prediction.x_start)
    return x


def _runge_kutta(denoiser: Denoiser, x: Tensor, first: Tensor, step: Step, t_prev: int) -> Tensor:
    t_middle, alpha_bar_middle = step.middle
    middle = timestep(t_middle, x)
    second = denoiser(_move(x, first, step, alpha_bar_middle), middle).epsilon
    third = denoiser(_move(x, second, step, alpha_bar_middle), middle).epsilon
    fourth = denoiser(_move(x, third, step), timestep(t_prev, x)).epsilon
    return _move(x, (first + 2 * second + 2 * third + fourth) / 6, step)


def _adams_bashforth(history: Sequence[Tensor]) -> Tensor:
    """The weighted mean of the last four ε̂, newest last, or of as many as there are."""
    if len(history) == 1:
        return history[-1]
    if len(history) == 2:
        return (3 * history[-1] - history[-2]) / 2
    if len(history) == 3:
        return (23 * history[-1] - 16 * history[-2] + 5 * history[-3]) / 12
    return (55 * history[-1] - 59 * history[-2] + 37 * history[-3] - 9 * history[-4]) / 24


def _move(x: Tensor, epsilon: Tensor, step: Step, alpha_bar: float | None = None) -> Tensor:
    """PNDM's transfer φ(x, ε, t, t − δ) (eq. 11): DDIM's move, with x̂_0 read from x and this ε."""
    x_start = (x - math.sqrt(1 - step.alpha_bar) * epsilon) / math.sqrt(step.alpha_bar)
    return transfer(x_start, epsilon, step.alpha_bar_prev if alpha_bar is None else alpha_bar)


def _last_or_move(x: Tensor, prediction: Prediction, epsilon: Tensor, step: Step) -> Tensor:
    """A single evaluation needs no detour over ε, which loses digits where ᾱ is small."""
    if epsilon is prediction.epsilon:
        return transfer(prediction.x_start, epsilon, step.alpha_bar_prev)
    return _move(x, epsilon, step)
