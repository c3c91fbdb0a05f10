"""Which samples a run reads: the configured filters, and the part that is held out."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

from unclip.config import DataConfig
from unclip.data.images import Unwanted
from unclip.data.rows import Row


def select(row: Row, config: DataConfig) -> Row:
    """The row, with the captions that fit. What only the picture's header tells is checked as it is decoded.

    Raises Unwanted: the sample is not of this part of the data, or its caption or score is out of bounds.
    """
    if config.holdout and held_out(row.identity(), config.holdout) != (config.part == "validation"):
        raise Unwanted("held out" if config.part == "train" else "of the training part")
    limits = config.filter
    if limits.score_column is not None and not _score_fits(row.score, limits.min_score, limits.max_score):
        raise Unwanted("score")
    if limits.min_caption or limits.max_caption is not None:
        most = limits.max_caption or float("inf")
        fitting = tuple(text for text in row.captions if limits.min_caption <= len(text) <= most)
        if row.captions and not fitting:
            raise Unwanted("caption length")
        if fitting != row.captions:
            return _with_captions(row, fitting)
    return row


def held_out(key: str, share: float) -> bool:
    """Whether the sample of this key belongs to the validation part: a hash of the key alone decides."""
    return int.from_bytes(blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big") < share * 2**64


def _score_fits(score: float | None, least: float | None, most: float | None) -> bool:
    """A sample without a score, or with NaN for one, does not fit."""
    if score is None or score != score:
        return False
    return (least is None or score >= least) and (most is None or score <= most)


def _with_captions(row: Row, fitting: tuple[str, ...]) -> Row:
    features = row.features
    if features is None:
        return replace(row, captions=fitting)
    numbers = [number for number, text in enumerate(row.captions) if text in fitting]
    return replace(row, captions=fitting, features=lambda number: features(numbers[number]))
