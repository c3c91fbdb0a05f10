"""Noise schedules and lists of timesteps."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from unclip.errors import UsageError

ScheduleName = Literal["linear", "cosine"]
Spacing = Literal["ends", "ddim"]


def betas(name: ScheduleName, timesteps: int) -> np.ndarray:
    """β_1 … β_T in float64, shape (T,).

    linear: 1e-4 … 0.02 at T = 1000, scaled by 1000/T otherwise (DDPM, §4).
    cosine: from ᾱ(t) = cos²((t/T + 0.008)/1.008 · π/2), β clipped at 0.999 (Improved DDPM, eq. 17).
    """
    if name == "linear":
        scale = 1000 / timesteps
        return np.linspace(scale * 1e-4, min(scale * 0.02, 0.999), timesteps, dtype=np.float64)
    if name == "cosine":
        steps = np.arange(timesteps + 1, dtype=np.float64) / timesteps
        alpha_bar = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise UsageError(f"unknown noise schedule {name!r}; known: linear, cosine")


def spaced_timesteps(timesteps: int, steps: int, spacing: Spacing = "ends") -> list[int]:
    """`steps` of the T original timesteps, ascending, as a list of indices in [0, T).

    ends: evenly with both ends included (Karlo; guided-diffusion's strides come to the same up to rounding).
    ddim: every (T // steps)-th from 0 (DDIM, §4.2, linear τ).
    Raises UsageError when steps is below 1 or above T.
    """
    if not 1 <= steps <= timesteps:
        raise UsageError(
            f"{steps} sampling steps asked for; the process has {timesteps}, so 1 to {timesteps} are possible"
        )
    if spacing == "ddim":
        return list(range(0, timesteps, timesteps // steps))[:steps]
    if steps == 1:
        return [timesteps - 1]
    return [round(i * (timesteps - 1) / (steps - 1)) for i in range(steps)]
