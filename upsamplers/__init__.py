"""The upsamplers 64 → 256 → 1024: convolution-only diffusion models conditioned on the low-resolution image.

ADM U-Nets without attention, text or guidance (unCLIP §2.1, App. C), or Imagen's Efficient U-Nets. Modules are
imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from upsamplers.config import UpsamplerConfig, UpsamplerRunConfig
    from upsamplers.corruption import corrupt
    from upsamplers.dalle2 import Dalle2Upsampler, Dalle2UpsamplerConfig
    from upsamplers.network import Upsampler
    from upsamplers.objective import upsampler_loss
    from upsamplers.sampling import UpsamplerStage, read_upsampler_config
    from upsamplers.upscale import upscale_picture

__all__ = [
    "Dalle2Upsampler",
    "Dalle2UpsamplerConfig",
    "Upsampler",
    "UpsamplerConfig",
    "UpsamplerRunConfig",
    "UpsamplerStage",
    "corrupt",
    "read_upsampler_config",
    "upsampler_loss",
    "upscale_picture",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "upsamplers.config": ["UpsamplerConfig", "UpsamplerRunConfig"],
        "upsamplers.corruption": ["corrupt"],
        "upsamplers.dalle2": ["Dalle2Upsampler", "Dalle2UpsamplerConfig"],
        "upsamplers.network": ["Upsampler"],
        "upsamplers.objective": ["upsampler_loss"],
        "upsamplers.sampling": ["UpsamplerStage", "read_upsampler_config"],
        "upsamplers.upscale": ["upscale_picture"],
    },
)
