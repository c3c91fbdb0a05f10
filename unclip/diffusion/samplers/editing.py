"""Samplers that start from, or hold on to, a given picture: SDEdit and RePaint.

Both are made for one picture: they return a sampler with the signature of all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import Step
from unclip.diffusion.samplers.common import Callback, Noise, Sampler, timestep, transfer
from unclip.errors import UsageError


def sdedit(image: Tensor, inner: Sampler) -> Sampler:
    """A sampler that begins at `image` (B, C, …) in x_0's range, noised to the first of its steps (SDEdit, Meng et al.
    2022, algorithm 1), and goes on as `inner`.

    The noise is the x that it is handed, which else would be x_T: x_{t0} = sqrt(ᾱ_{t0}) image + sqrt(1−ᾱ_{t0}) x.
    """

    def sample(denoiser: Denoiser, x: Tensor, steps: Sequence[Step], noise: Noise, **options: object) -> Tensor:
        start = transfer(image.to(x), x, steps[0].alpha_bar)
        return inner(denoiser, start, steps, noise, **options)

    return sample


def sdedit_timesteps(timesteps: Sequence[int], strength: float, count: int) -> list[int]:
    """Kept `timesteps` of a process with `count`, shrunk in proportion, so that as many steps (or as many as there is
    room for) lead from t0 = strength·T − 1 to the end (SDEdit, algorithm 1: Δt = t0/N).

    Index t is noise of t + 1 steps, so t becomes strength·(t + 1) − 1. Strength 1 changes nothing; where strength·T is
    less than half a step, nothing is left. UsageError: a strength outside 0 … 1.
    """
    check_strength(strength)
    noisiest = round(strength * count) - 1
    return sorted({t for t in (min(round(strength * (t + 1)) - 1, noisiest) for t in timesteps) if t >= 0})


def check_strength(strength: float) -> None:
    """UsageError unless it lies in 0 … 1."""
    if not 0 <= strength <= 1:
        raise UsageError(f"strength is {strength}, expected 0 (the picture itself) to 1 (drawn from noise alone)")


def repaint_levels(steps: int, jump_length: int, resamplings: int) -> list[int]:
    """The way of RePaint through the noise levels: steps (x_T) … 0 (x_0), consecutive entries one apart.

    A fall is a step of denoising, a rise one of adding noise again. At every `jump_length`-th level, counted from the
    first above x_0 and `jump_length` or more below x_T, the way goes up by `jump_length` and down again,
    `resamplings` − 1 times (RePaint, Lugmayr et al. 2022, algorithm 1 and App. B, there j and r). With `resamplings` 1
    it is the plain way down. UsageError: a number below 1.
    """
    for name, value in (("jump_length", jump_length), ("resamplings", resamplings)):
        if value < 1:
            raise UsageError(f"{name} is {value}, expected 1 or more")
    left = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamplings - 1)
    levels = [steps]
    while levels[-1] > 0:
        if left.get(levels[-1], 0):
            left[levels[-1]] -= 1
            levels += range(levels[-1] + 1, levels[-1] + jump_length + 1)
        levels.append(levels[-1] - 1)
    return levels


def repaint(image: Tensor, known: Tensor, *, jump_length: int = 10, resamplings: int = 10) -> Sampler:
    """A sampler that paints what is not known of `image` (RePaint, Lugmayr et al. 2022, algorithm 1), for networks
    that were not trained to inpaint.

    image: (B, C, …) in x_0's range; known: (B, 1, …) or (B, C, …), 1 = given, 0 = to be painted. After each step the
    known part is put back, noised to the level reached (eq. 8a); going back up by `jump_length` levels,
    `resamplings` − 1 times at each halt, lets the two parts agree. The reverse steps are DDIM's (DDIM, eq. 12),
    `eta` 1 being DDPM with the posterior's variance; what is known comes out as given. The callback hears every step of
    denoising.
    """

    def sample(
        denoiser: Denoiser,
        x: Tensor,
        steps: Sequence[Step],
        noise: Noise,
        *,
        eta: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        given, keep = image.to(x), known.to(x).bool()
        levels = repaint_levels(len(steps), jump_length, resamplings)
        upwards = list(reversed(steps))  # upwards[k] leads from level k + 1 to level k
        total, number = sum(a > b for a, b in pairwise(levels)), 0
        for level, following in pairwise(levels):
            if following > level:  # q(x_t | x_{t−1}) (DDPM, eq. 2), algorithm 1, line 9
                beta = upwards[level].beta
                x = math.sqrt(1 - beta) * x + math.sqrt(beta) * noise(x)
                continue
            step = upwards[following]
            prediction = denoiser(x, timestep(step.t, x))
            variance = eta**2 * step.posterior_variance
            direction = math.sqrt(max(1 - step.alpha_bar_prev - variance, 0.0))
            unknown = math.sqrt(step.alpha_bar_prev) * prediction.x_start + direction * prediction.epsilon
            if following:
                if eta > 0:
                    unknown = unknown + math.sqrt(variance) * noise(x)
                x = torch.where(keep, transfer(given, noise(x), step.alpha_bar_prev), unknown)
            else:
                x = torch.where(keep, given, unknown)
            number += 1
            if callback is not None:
                callback(number, total, prediction.x_start)
        return x

    return sample
