"""Worker processes that make batches in turns: torch's DataLoader moves them, and finds out when one has died."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from unclip.data.making import Batch, Maker, Making, open_sources
from unclip.data.tally import Tally
from unclip.errors import UnclipError

State = dict[str, Any]


class InProcesses:
    """Rank `rank`'s batches from `config.workers` processes; worker w makes part `rank * workers + w`."""

    def __init__(self, making: Making, rank: int) -> None:
        self._making, self._config = making, making.config
        self._first = rank * self._config.workers
        # Opened here too, so that a source that is missing is said at once, and once.
        self._sources = open_sources(self._config, Tally())
        self._initial = [self._maker(worker).state_dict() for worker in range(self._config.workers)]
        self._start: _Start | None = None
        self._iterator: Iterator[Any] | None = None

    def initial_states(self) -> list[State]:
        return list(self._initial)

    def next(self) -> tuple[Batch, State]:
        if self._iterator is None:
            self._iterator = self._begin()
        try:
            message, batch, state = next(self._iterator)
        except RuntimeError as error:  # DataLoader says so when a process is gone
            self._iterator = None
            raise UnclipError(f"a data worker ended unexpectedly: {str(error).splitlines()[0]}") from error
        if message is not None:
            self._iterator = None
            raise UnclipError(message)
        return batch, state

    def restart(self, states: Sequence[State], own: list[int] | None, turn: int) -> list[State]:
        self._iterator = None
        self._start = _Start(tuple(states), tuple(own) if own else None, turn)
        if own is not None:
            return [states[number] for number in own]
        result = []
        for worker in range(self._config.workers):
            maker = self._maker(worker)
            maker.load_states(states, None)
            result.append(maker.state_dict())
        return result

    def _maker(self, worker: int) -> Maker:
        return Maker(self._making, self._first + worker, self._sources)

    def _begin(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _Share(self._making, self._first, self._start),
            batch_size=None,
            num_workers=self._config.workers,
            prefetch_factor=self._config.prefetch,
            multiprocessing_context=_context(),
            worker_init_fn=_one_thread,
        )
        return iter(loader)


class _Start:
    def __init__(self, states: tuple[State, ...], own: tuple[int, ...] | None, turn: int) -> None:
        self.states, self.own, self.turn = states, own, turn


class _Share(IterableDataset[Any]):
    """In worker w: (error or None, batch, state), for ever."""

    def __init__(self, making: Making, first: int, start: _Start | None) -> None:
        self.making, self.first, self.start = making, first, start

    def __iter__(self) -> Iterator[tuple[str | None, Batch, State]]:
        info = get_worker_info()
        assert info is not None
        # DataLoader begins with worker 0; the batch that comes next may be another's.
        worker = (info.id + (self.start.turn if self.start else 0)) % info.num_workers
        # `datasets` would divide the shards among the workers once more.
        torch_worker._worker_info = None
        try:
            maker = Maker(self.making, self.first + worker)
            if self.start is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # said by the training process
                    maker.load_states(self.start.states, self.start.own[worker] if self.start.own else None)
            while True:
                batch, state = maker.make()
                yield None, batch, state
        except UnclipError as error:
            yield str(error), {}, {}


def _context() -> Any:
    """Processes that are no fork of this one, which would copy the locks of the threads that train; where there is
    a fork server, it imports once for all of them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "unclip.data.workers"])
    return context


def _one_thread(worker: int) -> None:
    """Parallel by processes, not by threads below them."""
    torch.set_num_threads(1)
