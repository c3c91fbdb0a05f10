"""Times of several contestants taken in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], Any]
BUDGET = "UNCLIP_BENCHMARKS_SECONDS"
"""Of the environment: after so many seconds of the process no further round is begun, though each work gets one."""
CUT = "cut short: "
"""How the line on stderr begins that tells of rounds left out."""
_STARTED = time.perf_counter()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        if not figures:
            raise ValueError("no figures to take a median of")
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, low, high)


def in_turns(works: Mapping[str, Work], runs: int, device: torch.device, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of `runs` runs of each work. Every round runs all of them once, every second round in reverse order, so
    that a machine that grows slower or faster favours none. `warm_up` rounds go before and are not timed. Rounds that
    the budget leaves no time for are left out, which stderr is told.
    """
    if runs < 1 or warm_up < 0:
        raise ValueError(f"{runs} runs after {warm_up} rounds of warming up; expected 1 or more after 0 or more")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    until = _STARTED + float(os.environ.get(BUDGET) or "inf")
    gc.collect()
    gc.disable()  # a collection would fall on whoever's turn it is
    try:
        for number in range(-warm_up, runs):
            if number > 0 and time.perf_counter() >= until:
                told = ", ".join(filter(None, works))
                print(f"{CUT}{number} of {runs} rounds of {told}", file=sys.stderr, flush=True)
                break
            names = list(works) if number % 2 == 0 else list(works)[::-1]
            for name in names:
                _wait(device)
                start = time.perf_counter()
                works[name]()
                _wait(device)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times faster ours was, round by round: theirs / ours."""
    return Spread.of([slow / fast for slow, fast in zip(theirs, ours, strict=True)])


def count_flops(work: Work) -> tuple[Any, int]:
    """What `work` gives, and the floating-point operations of its matrix products and convolutions; one multiply-add
    counts two.
    """
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, int(counter.get_total_flops())


def matrix_product(device: torch.device, dtype: torch.dtype, edge: int) -> tuple[Work, int]:
    """A product of two square matrices and its floating-point operations: what the machine can do at best."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(edge, edge, generator=generator).to(device, dtype) for _ in range(2))
    return lambda: left @ right, 2 * edge**3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
