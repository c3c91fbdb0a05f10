"""What a caption becomes: the features that the stages take from a CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextFeatures:
    """What the stages take from a caption: `tokens` (B, L, D), `mask` (B, L) True = real token, `embedding` (B, E) of
    unit length, and in `norm` (B,) the length that the CLIP gave it.
    """

    tokens: Tensor
    mask: Tensor
    embedding: Tensor
    norm: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, index: Any) -> TextFeatures:
        norm = None if self.norm is None else self.norm[index]
        return TextFeatures(self.tokens[index], self.mask[index], self.embedding[index], norm)

    def to(self, device: torch.device | str) -> TextFeatures:
        norm = None if self.norm is None else self.norm.to(device)
        return TextFeatures(self.tokens.to(device), self.mask.to(device), self.embedding.to(device), norm)
