"""The data set that a model is measured on: which samples, in which order, cut into pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.config import DataConfig
from unclip.data.embeddings import EmbeddingInfo, find_embeddings, holds_embeddings
from unclip.data.images import ImageError, Unwanted
from unclip.data.rows import Row, Rows, Shards, is_sharded
from unclip.data.select import select
from unclip.data.sources import open_source
from unclip.data.tally import Tally
from unclip.errors import UnclipError, UsageError

PIECE = 32
"""Samples of a piece of work; the same however many processes share it."""
_THREADS = 8


@dataclass(frozen=True)
class Sample:
    """A row that is wanted, and its number among those."""

    number: int
    row: Row

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.row.captions[0]


class EvaluationData:
    """The samples of `config` that are selected: all of them in their order, or `limit` of them.

    With random access the `limit` is drawn, with a seed of its own that is the same for every limit, so that a smaller
    one is part of a larger; of shards that are read in order it is the first ones. Raises UsageError: a mixture of
    several sources; UnclipError: as unclip.data.sources.open_source.
    """

    def __init__(self, config: DataConfig, limit: int | None = None) -> None:
        if config.sources:
            raise UsageError("a mixture of several sources cannot be measured against; name one data.source")
        if limit is not None and limit < 1:
            raise UsageError(f"{limit} samples are asked for, expected 1 or more")
        self.config, self.limit = config, limit
        self.tally = Tally()
        self._source: Rows | Shards = open_source(config, self.tally)
        self.info: EmbeddingInfo | None = None
        if config.source != "synthetic" and holds_embeddings(config.source):
            self.info = find_embeddings(config).info  # type: ignore[union-attr]
        limits = config.filter
        filtered = limits.score_column or limits.min_caption or limits.max_caption is not None
        self._all_wanted = not config.holdout and not filtered
        self._decoders = ThreadPoolExecutor(_THREADS, "decode")

    def pieces(self, own: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, list[Sample]]]:
        """(number, samples) of each piece; with an empty list those that are not `own`. Rows without captions, and
        those that cannot be read, are counted in `tally` and left out.
        """
        if not is_sharded(self._source) and self._all_wanted:
            order = self._order(self._source)
            for number, start in enumerate(range(0, len(order), PIECE)):
                indices = order[start : start + PIECE]
                rows = self._source.rows(indices) if own(number) else []
                found = [(start + i, self._wanted(row)) for i, row in enumerate(rows)]
                yield number, [Sample(place, row) for place, row in found if row is not None]
            return
        rows_wanted = (wanted for row in self._rows() if (wanted := self._wanted(row)) is not None)
        samples = (Sample(i, row) for i, row in enumerate(islice(rows_wanted, self.limit)))
        number = -1
        for number, piece in enumerate(_cut(samples)):
            yield number, piece if own(number) else []
        if number < 0:
            raise UnclipError(f"no sample of the data set {self.config.source!r} can be used: {self.tally.report()}")

    @property
    def has_pictures(self) -> bool:
        return self.info is None or self.info.pixels is not None

    def first(self, count: int) -> list[Sample]:
        """The first samples of the order in which pieces come."""
        wanted = -(-count // PIECE)
        found: list[Sample] = []
        for number, piece in self.pieces(lambda number: number < wanted):
            if number >= wanted:
                break
            found += piece
        return found[:count]

    def fetch(self, numbers: Iterable[int]) -> dict[int, Sample]:
        """Samples by their numbers."""
        wanted = set(numbers)
        pieces = {number // PIECE for number in wanted}
        found: dict[int, Sample] = {}
        for _, piece in self.pieces(lambda number: number in pieces):
            found |= {sample.number: sample for sample in piece if sample.number in wanted}
            if len(found) == len(wanted):
                break
        return found

    def pixels(self, samples: list[Sample], size: int) -> tuple[list[Sample], Tensor]:
        """Those whose picture can be decoded, and uint8 (B, 3, size, size). UsageError: there are no pictures."""
        if not self.has_pictures:
            raise UsageError(
                f"{self.config.source} holds embeddings without pictures, of which only FD-CLIP, KD-CLIP, precision, "
                "recall and CLIP's scores can be measured; name the pictures, or embed them with --pixels"
            )
        results = list(self._decoders.map(lambda sample: self._decoded(sample, size), samples))
        kept = [(s, r) for s, r in zip(samples, results, strict=True) if isinstance(r, Tensor)]
        for sample, result in zip(samples, results, strict=True):
            if isinstance(result, Unwanted):
                self.tally.leave_out(str(result))
            elif isinstance(result, ImageError):
                self.tally.add(sample.row.name, sample.row.name, str(result))
        empty = torch.zeros(0, 3, size, size, dtype=torch.uint8)
        return [s for s, _ in kept], torch.stack([r for _, r in kept]) if kept else empty

    def _decoded(self, sample: Sample, size: int) -> Tensor | ImageError | Unwanted:
        try:
            if sample.row.pixels is None:
                raise ImageError(f"{sample.row.name} has no image")
            return sample.row.pixels(size)
        except (ImageError, Unwanted) as error:
            return error

    def _order(self, source: Rows) -> list[int]:
        length = len(source)
        if self.limit is None or self.limit >= length:
            return list(range(length))
        return [int(i) for i in np.random.default_rng(0).permutation(length)[: self.limit]]

    def _rows(self) -> Iterator[Row]:
        if is_sharded(self._source):
            for shard in range(self._source.num_shards):
                reader = self._source.open(shard)
                while rows := reader.read(PIECE):
                    yield from rows
            return
        length = len(self._source)
        order = np.arange(length) if self.limit is None else np.random.default_rng(0).permutation(length)
        for start in range(0, length, PIECE):
            yield from self._source.rows([int(i) for i in order[start : start + PIECE]])

    def _wanted(self, row: Row) -> Row | None:
        try:
            if row.error is not None:
                raise ImageError(row.error)
            row = select(row, self.config)
            if not row.captions:
                raise ImageError("has no caption")
        except Unwanted as reason:
            self.tally.leave_out(str(reason))
            return None
        except ImageError as error:
            self.tally.add(row.name, row.name, str(error))
            return None
        return row


def _cut(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while piece := list(islice(samples, PIECE)):
        yield piece


def describe(config: DataConfig) -> dict[str, Any]:
    """What a report says of the data."""
    chosen = ("source", "split", "holdout", "part")
    body = config.model_dump(mode="json")
    told = {name: body[name] for name in chosen}
    if config.source == "synthetic":
        return {**told, "synthetic": body["synthetic"]}
    usual = DataConfig().model_dump(mode="json")
    others = ("streaming", "image_column", "caption_column", "key_column", "filter")
    return told | {name: body[name] for name in others if body[name] != usual[name]}
