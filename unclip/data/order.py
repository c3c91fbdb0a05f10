"""In which order the samples of a source come, and how that order is resumed, by the same processes or by others.

The unit that reads is a *part*: one worker of one rank. An epoch is divided among the parts so that each sample is in
exactly one of them, and a saved position holds what each part has had of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from unclip.data.images import ImageError, Unwanted
from unclip.data.rows import Row, Rows
from unclip.errors import UnclipError


@dataclass(frozen=True)
class Sample:
    """A row and its place in an epoch: `place` is the same however the epoch is divided, `key` tells rows apart."""

    epoch: int
    place: tuple[int, ...]
    key: int | str
    row: Row
    seed: int
    source: int = 0  # of a mixture, by number


class Order(Protocol):
    """Which sample comes next in this part."""

    def take(self, count: int) -> list[Sample]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_states(self, states: Sequence[dict[str, Any]], own: int | None) -> None:
        """Go on from the saved states of all parts, of which number `own` is this part's; None: they were divided
        otherwise, or this part's is missing."""
        ...


class IndexOrder:
    """Shuffled epochs over a source with random access; parts take interleaved positions.

    Positions count on over all epochs, so that what does not fill a batch wraps into the next permutation.
    """

    def __init__(self, source: Rows, cache: bool, part: int, parts: int, seed: int) -> None:
        self._source = source
        self._cache: dict[int, Row] | None = {} if cache else None
        self._part, self._parts, self._seed = part, parts, seed
        self._base = 0  # position at which this division began
        self._drawn = 0  # positions this part has passed since
        self._ahead: frozenset[int] = frozenset()  # positions after the base that were taken before it
        self._permutation: tuple[int, np.ndarray] | None = None

    def take(self, count: int) -> list[Sample]:
        places: list[tuple[int, int, int]] = []
        while len(places) < count:
            position = self._base + self._drawn * self._parts + self._part
            self._drawn += 1
            if position not in self._ahead:
                epoch, offset = divmod(position, len(self._source))
                places.append((epoch, offset, int(self._permuted(epoch)[offset])))
        rows = self._rows([index for _, _, index in places])
        return [
            Sample(epoch, (offset,), index, row, self._seed)
            for (epoch, offset, index), row in zip(places, rows, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "kind": "index",
            "epoch": (self._base + self._drawn * self._parts + self._part) // len(self._source),
            "base": self._base,
            "drawn": self._drawn,
            "world_size": self._parts,
            "length": len(self._source),
        }
        return {**state, "ahead": sorted(self._ahead)} if self._ahead else state

    def load_states(self, states: Sequence[dict[str, Any]], own: int | None) -> None:
        first = states[0] if own is None else states[own]
        check_kind(first, "index")
        if first["length"] != len(self._source):
            warnings.warn(
                f"the data set had {first['length']} samples when the run was saved, now it has "
                f"{len(self._source)}, so the order of this epoch differs",
                stacklevel=4,
            )
        if own is not None:
            self._base, self._drawn = first["base"], first["drawn"]
            self._ahead = frozenset(first.get("ahead", ()))
            return
        # Parts that met broken samples have gone further than others; what they had is passed over.
        base, parts, least = first["base"], first["world_size"], min(state["drawn"] for state in states)
        whole = base + least * parts
        ahead = {position for position in first.get("ahead", ()) if position >= whole}
        if len(states) == parts:
            for part, state in enumerate(states):
                ahead |= {base + step * parts + part for step in range(least, state["drawn"])}
        self._base, self._drawn, self._ahead = whole, 0, frozenset(ahead)

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
            pixels = None if row.pixels is None else _Remembered(row.pixels)
            low = None if row.low is None else _Remembered(row.low)
            fresh[index] = replace(row, pixels=pixels, low=low)
            # Its name in the place of its content, which would keep the encoded image as well.
            self._cache[index] = replace(fresh[index], encoded=False, key=row.identity(), content=None)
        return [fresh.get(index) or self._cache[index] for index in indices]


class _Remembered:
    """Decodes once, then keeps the pixels (or the failure) in place of the encoded image."""

    def __init__(self, load: Any) -> None:
        self._load = load
        self._result: Tensor | ImageError | Unwanted | None = None

    def __call__(self, size: int) -> Tensor:
        load = self._load  # another thread may hold the same row when a batch is larger than the data set
        if self._result is None:
            try:
                self._result = load(size)
            except (ImageError, Unwanted) as error:
                self._result = error
            self._load = None
        if isinstance(self._result, (ImageError, Unwanted)):
            raise self._result
        assert self._result is not None
        return self._result


class MixedOrder:
    """Several sources in proportion to weights: which comes next is drawn from (seed, part, number of the draw)."""

    _DRAWS = 1024

    def __init__(self, orders: list[Order], weights: list[float], part: int, parts: int, seed: int) -> None:
        self._orders, self._weights = orders, np.asarray(weights) / sum(weights)
        self._part, self._parts, self._seed = part, parts, seed
        self._number = 0
        self._choices: tuple[int, np.ndarray] | None = None

    def take(self, count: int) -> list[Sample]:
        chosen = [self._choice(number) for number in range(self._number, self._number + count)]
        self._number += count
        # One read a source, then back into the order of the draws.
        taken = {index: iter(self._orders[index].take(chosen.count(index))) for index in set(chosen)}
        return [replace(next(taken[index]), source=index) for index in chosen]

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "mixture",
            "number": self._number,
            "world_size": self._parts,
            "weights": self._weights.tolist(),
            "sources": [order.state_dict() for order in self._orders],
        }

    def load_states(self, states: Sequence[dict[str, Any]], own: int | None) -> None:
        for state in states:
            check_kind(state, "mixture")
            if len(state["sources"]) != len(self._orders):
                raise UnclipError(
                    f"the saved position is in a mixture of {len(state['sources'])} sources, and data.sources now "
                    f"names {len(self._orders)}; keep them as they were, or start another run"
                )
        for index, order in enumerate(self._orders):
            order.load_states([state["sources"][index] for state in states], own)
        if own is not None:
            self._number = states[own]["number"]
        else:  # as far as the whole mixture has gone, so that no draw comes twice
            total = states[0]["world_size"] * max(state["number"] for state in states)
            self._number = -(-total // self._parts)

    def _choice(self, number: int) -> int:
        block, offset = divmod(number, self._DRAWS)
        if self._choices is None or self._choices[0] != block:
            rng = np.random.default_rng((self._seed, self._part, block))
            self._choices = (block, rng.choice(len(self._weights), size=self._DRAWS, p=self._weights))
        return int(self._choices[1][offset])


def check_kind(state: dict[str, Any], kind: str) -> None:
    """UnclipError: the position was saved in data of another kind."""
    if state.get("kind") != kind:
        names = {"index": "read by index", "stream": "read as a stream", "mixture": "a mixture of sources"}
        before = names.get(str(state.get("kind")), "of a kind that is not known here")
        raise UnclipError(
            f"the saved position is that of a data set {before} and this one is {names[kind]}; data.streaming or "
            "data.sources was changed since"
        )
