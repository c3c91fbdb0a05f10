"""Sizes at which the networks are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.clip import TextFeatures


@dataclass(frozen=True)
class PriorShape:
    batch: int
    heads: int
    depth: int
    embedding: int
    tokens: int
    steps: int
    guidance: float = 4.0
    head_dim: int = 64


@dataclass(frozen=True)
class UNetShape:
    batch: int
    image: int
    widths: tuple[int, ...]
    blocks: int
    steps: int
    head_dim: int = 64
    # The decoder's conditioning
    embedding: int = 768
    tokens: int = 77
    context: int = 256
    guidance: float = 3.0


@dataclass(frozen=True)
class Size:
    prior: PriorShape
    decoder: UNetShape
    upsampler: UNetShape


SIZES = {
    # For the benchmark's own tests.
    "tiny": Size(
        PriorShape(2, 4, 2, 32, 9, 3, head_dim=8),
        UNetShape(2, 16, (32, 64), 1, 3, head_dim=16, embedding=20, tokens=7, context=24),
        UNetShape(1, 16, (32, 64), 1, 3),
    ),
    # A tenth of a second a forward pass on one core.
    "small": Size(
        PriorShape(2, 8, 4, 512, 77, 8),
        UNetShape(1, 64, (32, 64, 96, 128), 2, 3, head_dim=32),
        UNetShape(1, 96, (32, 64, 96), 2, 3),
    ),
    # Karlo's; training needs 16 bytes a parameter and a copy of it, so a GPU of 80 GB.
    "karlo": Size(
        PriorShape(4, 32, 20, 768, 77, 25),
        UNetShape(4, 64, (320, 640, 960, 1280), 3, 25, context=1536),
        UNetShape(1, 256, (320, 640, 960, 1280), 3, 7),
    ),
}


# ε̂ becomes x̂_0 by a division by sqrt(ᾱ), which at the last timestep of the cosine schedule makes 2·10⁴ of a rounding
# error. Here two implementations can be compared.
_HIGHEST_TIMESTEP = 800


def kept_timesteps(steps: int) -> list[int]:
    """Evenly spaced timesteps of a sampling, ascending."""
    return [round(index * _HIGHEST_TIMESTEP / (steps - 1)) for index in range(steps)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timesteps(batch: int) -> Tensor:
    return torch.linspace(999, 1, batch).long()


def captions(batch: int, tokens: int, dim: int, seed: int = 0) -> TextFeatures:
    """Token features and raw embeddings as a CLIP gives them, for captions of a tenth to half of the context."""
    lengths = torch.linspace(tokens / 10, tokens / 2, batch).ceil().long().clamp_min(2)
    raw = 5 * rand(batch, dim, seed=seed + 1)
    return TextFeatures(
        rand(batch, tokens, dim, seed=seed),
        torch.arange(tokens) < lengths[:, None],
        F.normalize(raw, dim=1),
        raw.norm(dim=1),
    )


def empty_caption(tokens: int, dim: int) -> TextFeatures:
    """What stands for the CLIP's features of '', a batch of one: start and end, two tokens."""
    found = captions(1, tokens, dim, seed=50)
    return TextFeatures(found.tokens, torch.arange(tokens)[None] < 2, found.embedding, found.norm)
