"""Data sets become batches: sources through Hugging Face `datasets`, decoding, augmentation, shapes.

`datasets` itself is imported when a source is opened, not with this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unclip.data.batches import Batch, Batches, build_batches
    from unclip.data.images import ImageError, decode_image, load_image, make_grid, to_pil, to_tensor
    from unclip.data.tally import Tally

__all__ = [
    "Batch",
    "Batches",
    "ImageError",
    "Tally",
    "build_batches",
    "decode_image",
    "load_image",
    "make_grid",
    "to_pil",
    "to_tensor",
]

_HOME = {
    **dict.fromkeys(("Batch", "Batches", "build_batches"), "batches"),
    **dict.fromkeys(
        ("ImageError", "decode_image", "load_image", "make_grid", "to_pil", "to_tensor"), "images"
    ),
    "Tally": "tally",
}


def __getattr__(name: str) -> Any:
    """Import a name's module at its first use, so that `import unclip.data` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
