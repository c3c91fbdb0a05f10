"""Network building blocks. Nothing here knows a noise schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from unclip.nn.attention import AttentionMaps, watch_attention
    from unclip.nn.config import EfficientUNetConfig, UNetConfig
    from unclip.nn.efficient_unet import EfficientUNet
    from unclip.nn.embeddings import timestep_embedding
    from unclip.nn.unet import UNet

__all__ = [
    "AttentionMaps",
    "EfficientUNet",
    "EfficientUNetConfig",
    "UNet",
    "UNetConfig",
    "timestep_embedding",
    "watch_attention",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "unclip.nn.attention": ["AttentionMaps", "watch_attention"],
        "unclip.nn.config": ["EfficientUNetConfig", "UNetConfig"],
        "unclip.nn.efficient_unet": ["EfficientUNet"],
        "unclip.nn.embeddings": ["timestep_embedding"],
        "unclip.nn.unet": ["UNet"],
    },
)
