"""An endless, exactly resumable iterator of training batches.

Every random choice about a sample (caption, crop, flip, augmentation) comes from a generator made from the
seed, the epoch and the sample's place, never from a running one: a resumed run makes the same choices, and
so does one on another number of processes or workers.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from unclip.config import DataConfig
from unclip.data.making import Batch, Complete, Maker, Making
from unclip.data.tally import Tally
from unclip.errors import UsageError

__all__ = ["Batch", "Batches", "Complete", "build_batches"]

State = dict[str, Any]


def build_batches(
    config: DataConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    complete: Complete | None = None,
) -> Batches:
    """Open the source of `config` and return this process's share of it, `batch_size` samples at a time.

    `complete(batch, seeds)` gives what a stage wants added to each, from one seed a sample; it is called where batches
    are made, and must be picklable where that is in worker processes.
    Raises UnclipError: no such source, an empty one, a missing column, nothing in it that can be decoded.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise UsageError(
            f"expected batch_size ≥ 1 and 0 ≤ rank < world_size, got {batch_size}, {rank}, {world_size}"
        )
    parts = max(1, config.workers) * world_size
    return Batches(Making(config, batch_size, parts, seed, complete), rank=rank, world_size=world_size)


class Batches:
    """Infinite iterator of `Batch`. The next batches are prepared while the last one is used: in a thread, or in
    `config.workers` processes that take turns.

    `state_dict` describes the point after the last batch that was returned; each rank saves its own.
    """

    def __init__(self, making: Making, *, rank: int, world_size: int) -> None:
        config = making.config
        self._rank, self._world_size, self._per_rank = rank, world_size, max(1, config.workers)
        self._preparer: Any
        if config.workers:
            from unclip.data.workers import InProcesses

            self._preparer = InProcesses(making, rank)
        else:
            self._preparer = _InThread(Maker(making, rank), config.prefetch)
        self._states: list[State] = self._preparer.initial_states()
        self._turn = 0  # the worker whose batch comes next

    @property
    def tally(self) -> Tally:
        """What this process's share has skipped up to the last batch returned."""
        return Tally.sum(state["tally"] for state in self._states)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self._states[self._turn] = self._preparer.next()
        self._turn = (self._turn + 1) % len(self._states)
        return batch

    def state_dict(self) -> State:
        """Plain numbers and strings, from which `load_state_dict` continues with the next batch."""
        if len(self._states) == 1:
            return copy.deepcopy(self._states[0])
        return {"kind": "workers", "turn": self._turn, "parts": copy.deepcopy(self._states)}

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Continue where `state_dict` was called, with the batch that came next there.

        `state` is this rank's own, or a list of the states of all ranks of the saved run in their order. With all
        of them another number of processes or workers goes on exactly, each sample of the epoch still once; with
        its own alone a rank goes on at the same place of an indexed set, and with the next epoch of a stream. The
        batch size may differ.
        Raises UnclipError: the state is of another kind (data.streaming or data.sources changed), or a stream got
        shorter.
        """
        ranks = [state] if isinstance(state, dict) else list(state)
        by_rank = [one["parts"] if one.get("kind") == "workers" else [one] for one in copy.deepcopy(ranks)]
        saved = [part for parts in by_rank for part in parts]
        same = saved[0]["world_size"] == self._per_rank * self._world_size and len(by_rank[0]) == self._per_rank
        turn = 0
        own: list[int] | None = None
        if same and (len(ranks) == 1 or len(ranks) == self._world_size):
            mine = 0 if len(ranks) == 1 else self._rank
            own = [mine * self._per_rank + worker for worker in range(self._per_rank)]
            turn = ranks[mine].get("turn", 0)
        self._states = self._preparer.restart(saved, own, turn)
        self._turn = turn


class _InThread:
    """One part, made in a background thread of this process."""

    def __init__(self, maker: Maker, ahead: int) -> None:
        self._maker, self._ahead = maker, ahead
        self._background = ThreadPoolExecutor(1, "batches")
        self._pending: deque[Future[tuple[Batch, State]]] = deque()

    def initial_states(self) -> list[State]:
        return [self._maker.state_dict()]

    def next(self) -> tuple[Batch, State]:
        if not self._pending:
            self._pending.append(self._background.submit(self._maker.make))
        try:
            result = self._pending.popleft().result()
        except BaseException:
            self._drain()  # a failure must not be met again at the next call
            raise
        while len(self._pending) < self._ahead:
            self._pending.append(self._background.submit(self._maker.make))
        return result

    def restart(self, states: Sequence[State], own: list[int] | None, turn: int) -> list[State]:
        self._drain()
        self._maker.load_states(states, own[0] if own else None)
        return self.initial_states()

    def _drain(self) -> None:
        """Wait for what is being prepared: its batches, or failures, belong to the place that is left."""
        for pending in self._pending:
            pending.cancel()
        for pending in self._pending:
            if not pending.cancelled():
                pending.exception()
        self._pending.clear()
