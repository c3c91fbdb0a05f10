"""Noise schedules: β_1 … β_T of the forward process, in float64."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np

from unclip.config import ScheduleName
from unclip.diffusion.timesteps import Spacing, spaced_timesteps
from unclip.errors import UsageError

__all__ = ["BETA_RANGE", "Spacing", "betas", "spaced_timesteps", "zero_terminal_snr"]

BETA_RANGE = (1e-4, 0.02)
"""Smallest and largest β of DDPM's schedule at T = 1000 (DDPM, §4)."""


def betas(
    name: ScheduleName,
    timesteps: int,
    beta_range: tuple[float, float] | None = None,
    *,
    zero_snr: bool = False,
) -> np.ndarray:
    """β_1 … β_T in float64, shape (T,).

    linear: evenly from `beta_range[0]` to `beta_range[1]` (DDPM, §4: 1e-4 … 0.02, the default).
    quadratic: sqrt(β) evenly between the roots of the range (`scaled_linear` of latent diffusion, 0.00085 … 0.012).
    sigmoid: σ(−6 … 6) stretched over the range (GeoDiff, Xu et al. 2022).
    cosine: from ᾱ(t) = cos²((t/T + 0.008)/1.008 · π/2), β clipped at 0.999 (Improved DDPM, eq. 17); takes no range.

    A range is meant for T = 1000 and scaled by 1000/T otherwise, β held below 1. `zero_snr` rescales the result by
    `zero_terminal_snr`. Raises UsageError: an unknown name.
    """
    if name == "cosine":
        steps = np.arange(timesteps + 1, dtype=np.float64) / timesteps
        alpha_bar = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        table = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        return zero_terminal_snr(table) if zero_snr else table
    scale = 1000 / timesteps
    low, high = (min(scale * beta, 0.999) for beta in beta_range or BETA_RANGE)
    if name == "linear":
        table = np.linspace(low, high, timesteps, dtype=np.float64)
    elif name == "quadratic":
        table = np.linspace(math.sqrt(low), math.sqrt(high), timesteps, dtype=np.float64) ** 2
    elif name == "sigmoid":
        table = low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, timesteps, dtype=np.float64)))
    else:
        raise UsageError(f"unknown noise schedule {name!r}; known: {', '.join(get_args(ScheduleName))}")
    return zero_terminal_snr(table) if zero_snr else table


def zero_terminal_snr(table: np.ndarray) -> np.ndarray:
    """β (T,) rescaled so that ᾱ_T is exactly 0 while ᾱ_1 stays (Lin et al. 2024, algorithm 1); the last β is 1."""
    root = np.sqrt(np.cumprod(1 - table))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - np.append(alpha_bar[0], alpha_bar[1:] / alpha_bar[:-1])
