"""Shards read in order: how an epoch of them is divided, shuffled and resumed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclip.data.order import Sample, check_kind
from unclip.data.rows import Reader, Row, Shards
from unclip.errors import UnclipError

_EMPTY_EPOCHS = 50  # in a row, of one part, before it is taken for certain that there is nothing for it
_FORMAT = 2


@dataclass(frozen=True)
class Unit:
    """The rows of a shard whose number is `first` modulo `step`: whole shards, unless there are fewer than parts."""

    shard: int
    first: int
    step: int

    def holds(self, row: int) -> bool:
        return row % self.step == self.first


def divide(shards: int, part: int, parts: int, seed: int, epoch: int) -> list[Unit]:
    """What one part reads in an epoch. Over all parts each row of each shard is in one unit, and which part has a
    unit changes with the epoch, so that unequal shards come to all alike.
    """
    step = -(-parts // shards)  # as few as give every part something, because each unit reads through its shard
    units = [Unit(shard, first, step) for shard in range(shards) for first in range(step)]
    order = np.random.default_rng((seed, epoch)).permutation(len(units))
    return [units[number] for number in order[part::parts]]


@dataclass(frozen=True)
class _Stretch:
    """Rows of a block that were read from one unit: `count` of them from number `start` on."""

    unit: Unit
    start: int
    count: int

    def address(self, offset: int) -> tuple[int, int]:
        first = self.start + (self.unit.first - self.start) % self.unit.step
        return self.unit.shard, first + offset * self.unit.step


class Done:
    """Rows of an epoch that were had before it was divided anew. `ranges`: [shard, first, step, stop], a unit's rows
    below `stop`, -1 for all of them; `rows`: [shard, row]."""

    def __init__(self, ranges: Sequence[Sequence[int]] = (), rows: Sequence[Sequence[int]] = ()) -> None:
        self.ranges: dict[int, list[tuple[int, int, int]]] = {}
        for shard, first, step, stop in ranges:
            self.ranges.setdefault(shard, []).append((first, step, stop))
        self.rows = {(shard, row) for shard, row in rows}

    def __contains__(self, address: tuple[int, int]) -> bool:
        shard, row = address
        had = any(row % step == first and (stop < 0 or row < stop) for first, step, stop in self.ranges.get(shard, ()))
        return had or address in self.rows

    def whole(self, unit: Unit) -> bool:
        """Whether nothing of a unit is left."""
        complete = [(first, step) for first, step, stop in self.ranges.get(unit.shard, ()) if stop < 0]
        return any(unit.step % step == 0 and unit.first % step == first for first, step in complete)

    def plain(self) -> dict[str, Any]:
        ranges = [[shard, *one] for shard, several in sorted(self.ranges.items()) for one in several]
        return {"ranges": ranges, "rows": sorted([list(address) for address in self.rows])}


class StreamOrder:
    """A part's share of a stream, shuffled block by block.

    `buffer` rows are read, permuted by a generator made from (seed, epoch, part, place), and handed out. Unlike a
    buffer refilled one by one, a block is rebuilt exactly from the state before it.
    """

    def __init__(self, source: Shards, name: str, buffer: int, part: int, parts: int, seed: int) -> None:
        self._source, self._where, self._size = source, name, buffer
        self._part, self._parts, self._seed = part, parts, seed
        self._done: dict[int, Done] = {}  # by epoch
        self._plain_done: dict[int, dict[str, Any]] = {}
        self._reader: Reader | None = None
        self._before: tuple[int, dict[str, Any] | None] = (0, None)  # unit and its reader's state before the block
        self._block: list[Sample] = []
        self._stretches: list[_Stretch] = []
        self._used = 0
        self._begin(0)

    def take(self, count: int) -> list[Sample]:
        samples: list[Sample] = []
        while len(samples) < count:
            if self._used == len(self._block):
                self._next_block()
            end = min(len(self._block), self._used + count - len(samples))
            fresh = self._block[self._used : end]
            done = self._done.get(self._epoch)
            samples += fresh if done is None else [one for one in fresh if one.place not in done]  # type: ignore[operator]
            self._used = end
        return samples

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "kind": "stream",
            "format": _FORMAT,
            "epoch": self._epoch,
            "shards": self._source.num_shards,
            "part": self._part,
            "world_size": self._parts,
            "seed": self._seed,
            "unit": self._before[0],
            "reader": self._before[1],
            "used": self._used,
            "buffer": max(self._size, len(self._block)),
            "stretches": [[s.unit.shard, s.unit.first, s.unit.step, s.start, s.count] for s in self._stretches],
        }
        done = {str(epoch): self._plain_done[epoch] for epoch in self._done if epoch >= self._epoch}
        return {**state, "done": done} if done else state

    def load_states(self, states: Sequence[dict[str, Any]], own: int | None) -> None:
        first = states[0] if own is None else states[own]
        check_kind(first, "stream")
        if any(one.get("format") != _FORMAT for one in states):
            self._next_epoch_instead(first, "was saved by an older version")
        elif first["shards"] != self._source.num_shards:
            reason = f"had {first['shards']} shards when the run was saved and now has {self._source.num_shards}"
            self._next_epoch_instead(first, reason)
        elif own is not None:
            self._continue(first)
        elif len(states) == first["world_size"]:
            self._set_done(_had(states))
            self._begin(min(state["epoch"] for state in states))
        else:
            was = f"was divided into {first['world_size']} parts, whose positions are not all known,"
            self._next_epoch_instead(first, f"{was} and now is divided into {self._parts}")

    def _next_epoch_instead(self, state: dict[str, Any], why: str) -> None:
        warnings.warn(f"the stream {self._where!r} {why}; it goes on with its next epoch", stacklevel=5)
        self._set_done({})
        self._begin(state["epoch"] + 1)

    def _continue(self, state: dict[str, Any]) -> None:
        plain = state.get("done", {})
        self._set_done({int(epoch): Done(one["ranges"], one["rows"]) for epoch, one in plain.items()})
        self._begin(state["epoch"])
        self._unit, reader = state["unit"], state["reader"]
        if reader is not None:
            self._reader = self._source.open(self._units[self._unit].shard, reader)
        self._before = (self._unit, reader)
        if state["used"]:
            self._fill(state["buffer"])
            if len(self._block) < state["used"]:
                raise UnclipError(f"the stream {self._where!r} is shorter than when the run was saved")
            self._used = state["used"]

    def _set_done(self, done: dict[int, Done]) -> None:
        self._done = done
        self._plain_done = {epoch: one.plain() for epoch, one in done.items()}

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        units = divide(self._source.num_shards, self._part, self._parts, self._seed, epoch)
        done = self._done.get(epoch)
        self._units = units if done is None else [unit for unit in units if not done.whole(unit)]
        self._unit = 0
        self._reader, self._before = None, (0, None)
        self._block, self._stretches, self._used = [], [], 0

    def _next_block(self) -> None:
        self._fill(self._size)
        for _ in range(_EMPTY_EPOCHS):
            if self._block:
                return
            self._begin(self._epoch + 1)
            self._fill(self._size)
        if not self._block:
            raise UnclipError(
                f"the stream {self._where!r} holds no sample for part {self._part} of {self._parts}: it has fewer "
                "samples than there are processes and workers"
            )

    def _fill(self, size: int) -> None:
        """Read the next block; nothing is left at the end of the epoch."""
        self._before = (self._unit, None if self._reader is None else self._reader.state())
        samples: list[Sample] = []
        self._stretches = []
        while len(samples) < size and self._unit < len(self._units):
            unit = self._units[self._unit]
            if self._reader is None:
                self._reader = self._source.open(unit.shard)
            start = self._reader.state()["row"]
            wanted = size - len(samples)
            rows = self._reader.read(wanted * unit.step)
            kept = [(start + i, row) for i, row in enumerate(rows) if unit.holds(start + i)]
            self._stretches.append(_Stretch(unit, start, len(kept)))
            samples += [self._sample(unit.shard, number, row) for number, row in kept]
            if len(rows) < wanted * unit.step:
                self._unit, self._reader = self._unit + 1, None
        rng = np.random.default_rng((self._seed, self._epoch, self._part, self._before[0], self._before_row()))
        self._block = [samples[i] for i in rng.permutation(len(samples))]
        self._used = 0

    def _before_row(self) -> int:
        return 0 if self._before[1] is None else int(self._before[1]["row"])

    def _sample(self, shard: int, number: int, row: Row) -> Sample:
        key = row.key if row.key is not None else f"{shard}/{number}"
        return Sample(self._epoch, (shard, number), key, row, self._seed)


def _had(states: Sequence[dict[str, Any]]) -> dict[int, Done]:
    """What all parts together had of the epochs in which some part still is."""
    ranges: dict[int, list[Sequence[int]]] = {}
    rows: dict[int, list[Sequence[int]]] = {}
    earliest, latest = min(s["epoch"] for s in states), max(s["epoch"] for s in states)
    for epoch in range(earliest, latest + 1):
        ranges[epoch], rows[epoch] = [], []
        for state in states:
            before = state.get("done", {}).get(str(epoch))
            if before is not None:
                ranges[epoch] += before["ranges"]
                rows[epoch] += before["rows"]
            if state["epoch"] < epoch:
                continue
            done = None if before is None else Done(before["ranges"], before["rows"])
            units = divide(state["shards"], state["part"], state["world_size"], state["seed"], epoch)
            units = units if done is None else [unit for unit in units if not done.whole(unit)]
            past = units if state["epoch"] > epoch else units[: state["unit"]]
            ranges[epoch] += [(unit.shard, unit.first, unit.step, -1) for unit in past]
            if state["epoch"] == epoch:
                reader = state["reader"]
                if reader is not None:
                    unit = units[state["unit"]]
                    ranges[epoch].append((unit.shard, unit.first, unit.step, reader["row"]))
                rows[epoch] += _used_of_block(state)
    return {epoch: Done(_unique(ranges[epoch]), rows[epoch]) for epoch in ranges}


def _unique(ranges: list[Sequence[int]]) -> list[Sequence[int]]:
    return list(dict.fromkeys(tuple(one) for one in ranges))


def _used_of_block(state: dict[str, Any]) -> list[tuple[int, int]]:
    """Addresses of the samples of the current block that were handed out."""
    addresses = []
    for shard, first, step, start, count in state["stretches"]:
        stretch = _Stretch(Unit(shard, first, step), start, count)
        addresses += [stretch.address(offset) for offset in range(count)]
    row = 0 if state["reader"] is None else state["reader"]["row"]
    rng = np.random.default_rng((state["seed"], state["epoch"], state["part"], state["unit"], row))
    return [addresses[i] for i in rng.permutation(len(addresses))[: state["used"]]]
