"""One training loop for every stage; DeepSpeed stands behind `engine`."""

from unclip.training.distributed import Distributed, current
from unclip.training.launch import main_for, open_batches
from unclip.training.loop import fit
from unclip.training.memo import EmbeddingMemo, open_memo

__all__ = ["Distributed", "EmbeddingMemo", "current", "fit", "main_for", "open_batches", "open_memo"]
