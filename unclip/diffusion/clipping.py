"""What is done to x̂_0 before a step uses it: nothing, a static clamp, or Imagen's dynamic threshold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unclip.config import XStartClipConfig

Clip = Callable[[Tensor], Tensor]


def static_clip(limit: float = 1.0) -> Clip:
    """x̂_0 clamped to ±limit."""
    return lambda x_start: x_start.clamp(-limit, limit)


def dynamic_threshold(percentile: float = 0.995) -> Clip:
    """Imagen's dynamic thresholding: clamp at the sample's percentile s ≥ 1 of |x̂_0|, then divide by s (Imagen,
    §2.3)."""

    def clip(x_start: Tensor) -> Tensor:
        s = torch.quantile(x_start.flatten(1).abs().float(), percentile, dim=1).clamp_min(1.0)
        s = s.view(-1, *[1] * (x_start.ndim - 1)).to(x_start.dtype)
        return x_start.clamp(-s, s) / s

    return clip


def clip_from(config: XStartClipConfig | None, default: Clip | None = None) -> Clip | None:
    """What a configuration says is done to x̂_0; `default`, the stage's own treatment, where it says nothing."""
    if config is None:
        return default
    if config.kind == "none":
        return None
    return static_clip(config.limit) if config.kind == "static" else dynamic_threshold(config.percentile)
