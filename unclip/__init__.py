"""unCLIP: text -> CLIP image embedding -> 64 px -> 256 px -> 1024 px. Heavy modules load when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.errors import UnclipError, UsageError
from unclip.lazy import attach

if TYPE_CHECKING:
    from unclip.clip import FrozenCLIP
    from unclip.latents import Latents
    from unclip.manipulation import Prompt
    from unclip.pipeline import UnCLIP
    from unclip.tokens import LearnedTokens
    from unclip.upscaling import Upscaler

__version__ = "0.1.0"
__all__ = [
    "FrozenCLIP",
    "Latents",
    "LearnedTokens",
    "Prompt",
    "UnCLIP",
    "UnclipError",
    "Upscaler",
    "UsageError",
    "__version__",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "unclip.clip": ["FrozenCLIP"],
        "unclip.latents": ["Latents"],
        "unclip.manipulation": ["Prompt"],
        "unclip.pipeline": ["UnCLIP"],
        "unclip.tokens": ["LearnedTokens"],
        "unclip.upscaling": ["Upscaler"],
    },
)
