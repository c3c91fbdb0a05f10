"""Data sets become batches: sources through Hugging Face `datasets`, decoding, augmentation, shapes.

`datasets` itself is imported when a source is opened, not with this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from unclip.data.batches import Batch, Batches, Complete, build_batches
    from unclip.data.images import ImageError, decode_image, load_image, make_grid, to_pil, to_tensor
    from unclip.data.tally import Tally

__all__ = [
    "Batch",
    "Batches",
    "Complete",
    "ImageError",
    "Tally",
    "build_batches",
    "decode_image",
    "load_image",
    "make_grid",
    "to_pil",
    "to_tensor",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "unclip.data.batches": ["Batch", "Batches", "Complete", "build_batches"],
        "unclip.data.images": ["ImageError", "decode_image", "load_image", "make_grid", "to_pil", "to_tensor"],
        "unclip.data.tally": ["Tally"],
    },
)
