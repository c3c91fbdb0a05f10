"""One training loop for every stage; DeepSpeed stands behind `engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from unclip.training.distributed import Distributed, current
    from unclip.training.launch import main_for, open_batches
    from unclip.training.loop import fit
    from unclip.training.memo import EmbeddingMemo, open_memo

__all__ = [
    "Distributed",
    "EmbeddingMemo",
    "current",
    "fit",
    "main_for",
    "open_batches",
    "open_memo",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "unclip.training.distributed": ["Distributed", "current"],
        "unclip.training.launch": ["main_for", "open_batches"],
        "unclip.training.loop": ["fit"],
        "unclip.training.memo": ["EmbeddingMemo", "open_memo"],
    },
)
