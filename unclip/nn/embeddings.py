"""Sinusoidal embedding of timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """cos then sin of t at `dim`/2 geometrically spaced frequencies (ADM's order): (B,) -> (B, dim) float32; dim
    even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
