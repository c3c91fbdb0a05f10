"""In which order the samples of a source come, and how that order is resumed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from unclip.config import DataConfig
from unclip.data.images import ImageError
from unclip.data.sources import Row, Rows, StreamRows, Tally
from unclip.errors import UnclipError


@dataclass(frozen=True)
class Sample:
    """A row and its place: `position` is unique in the epoch over all ranks, `key` tells rows apart."""

    epoch: int
    position: int
    key: int | str
    row: Row


class Order(Protocol):
    """Which sample comes next on this rank."""

    def take(self, count: int) -> list[Sample]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def all_broken(self, tally: Tally, since_epoch: int, epoch: int) -> bool: ...


class IndexOrder:
    """Shuffled epochs over a source with random access; ranks take interleaved positions.

    Positions count on over all epochs, so that what does not fill a batch wraps into the next permutation.
    """

    def __init__(self, source: Rows, cache: bool, rank: int, world_size: int, seed: int) -> None:
        self._source = source
        self._cache: dict[int, Row] | None = {} if cache else None
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._base = 0  # position at which this world size began
        self._drawn = 0  # samples this rank has taken since
        self._permutation: tuple[int, np.ndarray] | None = None

    def take(self, count: int) -> list[Sample]:
        places = []
        for step in range(count):
            position = self._base + (self._drawn + step) * self._world_size + self._rank
            epoch, offset = divmod(position, len(self._source))
            places.append((epoch, offset, int(self._permuted(epoch)[offset])))
        self._drawn += count
        rows = self._rows([index for _, _, index in places])
        return [
            Sample(epoch, offset, index, row)
            for (epoch, offset, index), row in zip(places, rows, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "index",
            "base": self._base,
            "drawn": self._drawn,
            "world_size": self._world_size,
            "length": len(self._source),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_kind(state, "index")
        if state["length"] != len(self._source):
            warnings.warn(
                f"the data set had {state['length']} samples when the run was saved, now it has "
                f"{len(self._source)}, so the order of this epoch differs",
                stacklevel=3,
            )
        if state["world_size"] == self._world_size:
            self._base, self._drawn = state["base"], state["drawn"]
        else:
            self._base, self._drawn = state["base"] + state["drawn"] * state["world_size"], 0

    def all_broken(self, tally: Tally, since_epoch: int, epoch: int) -> bool:
        return tally.count == len(self._source)

    def _permuted(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._permutation = (epoch, rng.permutation(len(self._source)))
        return self._permutation[1]

    def _rows(self, indices: list[int]) -> list[Row]:
        if self._cache is None:
            return self._source.rows(indices)
        missing = [index for index in dict.fromkeys(indices) if index not in self._cache]
        fresh = {}
        for index, row in zip(missing, self._source.rows(missing), strict=True):
            fresh[index] = replace(row, pixels=_Remembered(row.pixels))
            self._cache[index] = replace(fresh[index], encoded=False)
        return [fresh.get(index) or self._cache[index] for index in indices]


class _Remembered:
    """Decodes once, then keeps the pixels (or the failure) in place of the encoded image."""

    def __init__(self, load: Any) -> None:
        self._load = load
        self._result: Tensor | ImageError | None = None

    def __call__(self, size: int) -> Tensor:
        load = self._load  # another thread may hold the same row when a batch is larger than the data set
        if self._result is None:
            try:
                self._result = load(size)
            except ImageError as error:
                self._result = error
            self._load = None
        if isinstance(self._result, ImageError):
            raise self._result
        assert self._result is not None
        return self._result


class StreamOrder:
    """A stream, shuffled block by block.

    `shuffle_buffer` rows are read, permuted by a generator made from (seed, epoch, rank, place), and handed
    out. Unlike a buffer refilled one by one, a block is rebuilt exactly from the stream's state before it.
    """

    def __init__(self, source: StreamRows, config: DataConfig, rank: int, world_size: int, seed: int) -> None:
        self._source = source
        self._where = config.source
        self._size = config.shuffle_buffer
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._opened = False
        self._epoch = 0
        self._first = 0  # rows of this rank's epoch before the block
        self._before: dict[str, Any] | None = None  # state of the stream there; None at the start of an epoch
        self._block: list[Sample] = []
        self._used = 0

    def take(self, count: int) -> list[Sample]:
        samples: list[Sample] = []
        while len(samples) < count:
            if self._used == len(self._block):
                self._next_block()
            end = min(len(self._block), self._used + count - len(samples))
            samples += self._block[self._used : end]
            self._used = end
        return samples

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "stream",
            "epoch": self._epoch,
            "first": self._first,
            "used": self._used,
            "buffer": max(self._size, len(self._block)),
            "world_size": self._world_size,
            "stream": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_kind(state, "stream")
        self._opened = False
        self._block, self._used = [], 0
        if state["world_size"] != self._world_size:
            # A stream's state counts one rank's own rows, which mean nothing once they are dealt out anew.
            warnings.warn(
                f"the stream {self._where!r} was split over {state['world_size']} processes and now is over "
                f"{self._world_size}; it goes on with its next epoch",
                stacklevel=3,
            )
            self._epoch, self._first, self._before = state["epoch"] + 1, 0, None
            return
        self._epoch, self._first, self._before = state["epoch"], state["first"], state["stream"]
        if state["used"]:
            self._open()
            self._fill(state["buffer"])
            if len(self._block) < state["used"]:
                raise UnclipError(f"the stream {self._where!r} is shorter than when the run was saved")
            self._used = state["used"]

    def all_broken(self, tally: Tally, since_epoch: int, epoch: int) -> bool:
        return epoch >= since_epoch + 2  # a whole epoch lies between

    def _open(self) -> None:
        self._source.start(self._epoch, self._before, self._first)
        self._opened = True

    def _next_block(self) -> None:
        if not self._opened:
            self._open()
        self._first += len(self._block)
        self._fill(self._size)
        if not self._block:  # the end of the epoch
            self._epoch, self._first = self._epoch + 1, 0
            self._before = None
            self._open()
            self._fill(self._size)
        if not self._block:
            raise UnclipError(
                f"the stream {self._where!r} holds no sample for rank {self._rank} of {self._world_size}: it "
                "has fewer samples than there are processes"
            )

    def _fill(self, size: int) -> None:
        self._before = self._source.state()
        rows = self._source.read(size)
        samples = []
        for number, row in enumerate(rows, start=self._first):
            position = number * self._world_size + self._rank
            samples.append(Sample(self._epoch, position, row.name, row))
        rng = np.random.default_rng((self._seed, self._epoch, self._rank, self._first))
        self._block = [samples[i] for i in rng.permutation(len(samples))]
        self._used = 0


def _check_kind(state: dict[str, Any], kind: str) -> None:
    if state.get("kind") != kind:
        raise UnclipError(
            f"the saved position is that of a data set read by {state.get('kind')!r} and this one is read by "
            f"{kind!r}; data.streaming was changed since"
        )
