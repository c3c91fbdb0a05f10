"""The upsamplers 64 → 256 → 1024: convolution-only diffusion models conditioned on the low-resolution image.

ADM U-Nets without attention, text or guidance (unCLIP §2.1, App. C), or Imagen's Efficient U-Nets. Modules are
imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

_HOME = {
    "Dalle2Upsampler": "dalle2",
    "Dalle2UpsamplerConfig": "dalle2",
    "Upsampler": "network",
    "UpsamplerConfig": "config",
    "UpsamplerRunConfig": "config",
    "UpsamplerStage": "sampling",
    "corrupt": "corruption",
    "read_upsampler_config": "sampling",
    "upsampler_loss": "objective",
    "upscale_picture": "upscale",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
