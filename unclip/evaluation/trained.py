"""Which drawn scenes a model has met in training: whole captions, and combinations of an object's attributes and place.

A caption that was never trained on may still say nothing new: another background around the same object. What tells
whether a model composes is the combination of size, colour, shape and position, whatever the background and whatever
stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unclip.config import DataConfig
from unclip.data.images import Unwanted
from unclip.data.select import select
from unclip.data.sources import SyntheticRows
from unclip.errors import UsageError
from unclip.evaluation.scenes import parse

_BLOCK = 4096

Combination = tuple[str, str, str, str]
"""Size, colour, shape, and where: the place of a single object, else which of how many along which axis."""


@dataclass(frozen=True)
class Trained:
    """Captions of a training set of drawn shapes, and the combinations in them."""

    captions: frozenset[str]
    combinations: frozenset[Combination]

    @classmethod
    def of(cls, captions: Iterable[str]) -> Trained:
        known = frozenset(captions)
        return cls(known, frozenset(one for caption in known for one in combinations(caption)))

    @classmethod
    def read(cls, config: DataConfig) -> Trained:
        """Of the scenes that a run with this `data` section trains on: neither those of its `holdout`, nor what its
        filters leave out. UsageError: the data are no drawn shapes, or none is left.
        """
        if config.source != "synthetic" or config.sources:
            raise UsageError(f"the data {config.source!r} are no drawn shapes; expected synthetic")
        rows = SyntheticRows(config)
        found: set[str] = set()
        for start in range(0, len(rows), _BLOCK):
            for row in rows.rows(list(range(start, min(start + _BLOCK, len(rows))))):
                try:
                    found.update(select(row, config).captions)
                except Unwanted:
                    continue
        if not found:
            raise UsageError("no scene of the data was trained on: holdout or filter leave out all of them")
        return cls.of(found)

    def knows(self, prompt: str) -> bool:
        """Whether each object of a prompt was met at its place with its attributes, on whatever background."""
        return combinations(prompt) <= self.combinations


def combinations(caption: str) -> frozenset[Combination]:
    """Those that a caption names, one an object. UsageError: it is no caption of a drawn scene."""
    said = parse(caption)
    count = len(said.things)
    return frozenset(
        (one.size, one.colour, one.kind, said.relation if count == 1 else f"{place} of {count}, {said.relation}")
        for place, one in enumerate(said.things, 1)
    )
