"""Sinusoidal embedding of timesteps; learned rows before they have learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """cos then sin of t at `dim`/2 geometrically spaced frequencies (ADM's order): (B,) -> (B, dim) float32; dim
    even."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def random_parameter(*shape: int, std: float = 1.0) -> nn.Parameter:
    """A parameter of normal noise, for learned rows such as positions and nulls. On the meta device it stays empty:
    torch takes `randn` and products apart in Python there, and imports its compiler for it, which takes half as long as
    `import torch`.
    """
    empty = torch.empty(shape)
    return nn.Parameter(empty if empty.is_meta else torch.randn(shape) * std)
