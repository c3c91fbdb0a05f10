"""unCLIP: text -> CLIP image embedding -> 64 px -> 256 px -> 1024 px. Heavy modules load when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unclip.errors import UnclipError, UsageError

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

_LAZY = {
    "UnCLIP": "unclip.pipeline",
    "Upscaler": "unclip.upscaling",
    "FrozenCLIP": "unclip.clip",
    "Latents": "unclip.latents",
    "LearnedTokens": "unclip.tokens",
    "Prompt": "unclip.manipulation",
}


def __dir__() -> list[str]:
    """For completion: what is not loaded yet, too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'unclip' has no attribute {name!r}")
