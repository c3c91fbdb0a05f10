"""What ends a run early, on all processes at the same step and with one sentence."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from unclip.config import TrainConfig
from unclip.errors import UnclipError
from unclip.training.checkpoint import checkpoints
from unclip.training.distributed import Distributed, told_once
from unclip.training.ema import EMA

ENDED = ".ended"
_BROKEN = re.compile(r"gloo|connection (closed|reset|refused)|timed out|socket|broken pipe|NCCL", re.IGNORECASE)
_WAITED = re.compile(r"timed? ?out", re.IGNORECASE)


class Stopped(UnclipError):
    """A run that a signal ended, after it was saved; the exit code is the shell's, 128 + signal."""

    def __init__(self, number: int, step: int, saved: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which {saved} keeps; enter the same line to go on")
        self.exit_code = 128 + number


class Signals:
    """Within it SIGTERM and SIGINT are remembered, so that the step in progress can end and be saved.

    Ctrl-C a second time ends at once. Launchers may send SIGTERM several times, which changes nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = self.received or number

    def agreed(self, distributed: Distributed) -> int:
        """The largest number of a signal that any process has received, 0 for none; all must call this together."""
        if distributed.world_size == 1:
            return self.received
        number = torch.tensor(self.received, dtype=torch.int32, device=distributed.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)


class Skips:
    """Counts steps that had no finite loss and gradient, and so changed nothing."""

    def __init__(self, config: TrainConfig, distributed: Distributed) -> None:
        self.total = self.in_a_row = 0
        self._config, self._distributed = config, distributed

    def count(self, applied: bool, step: int) -> None:
        """Take in a step. UnclipError: too many in a row were skipped."""
        self.total += not applied
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if self.in_a_row >= self._config.guard.max_skipped:
            kept = newest(self._config)
            message = (
                f"{self.in_a_row} steps in a row up to step {step} had no finite loss or gradient; {kept} is from "
                "before them. Lower train.optimizer.lr, or look at the data"
            )
            raise told_once(UnclipError(message), self._distributed)


def compare_weights(ema: EMA, config: TrainConfig, step: int, distributed: Distributed) -> None:
    """UnclipError when the processes hold different weights, which ZeRO 0 to 2 keep whole on each.

    Compared are sums of the bit patterns: exact, and quicker than any step.
    """
    if distributed.world_size == 1 or config.zero_stage == 3:
        return
    total = torch.zeros((), dtype=torch.int64, device=distributed.device)
    for index, parameter in enumerate(ema.parameters.values(), start=1):
        total += index * _bits(parameter.detach()).sum(dtype=torch.int64)
    sums = [torch.zeros_like(total) for _ in range(distributed.world_size)]
    torch.distributed.all_gather(sums, total)
    different = [str(rank) for rank, other in enumerate(sums) if int(other) != int(sums[0])]
    if different:
        message = (
            f"the processes have drifted apart: at step {step} the weights of process {', '.join(different)} are not "
            f"those of process 0; {newest(config)} is from before. Check the devices' memory"
        )
        raise told_once(UnclipError(message), distributed)


def lost_process(error: RuntimeError, config: TrainConfig, step: int, distributed: Distributed) -> UnclipError | None:
    """What a failed exchange between processes means to the user; None for another error."""
    text = str(error)
    kind = getattr(torch.distributed, "DistError", ())
    if distributed.world_size == 1 or not (isinstance(error, kind) or _BROKEN.search(text)):
        return None
    if _WAITED.search(text):
        what = (
            f"process {distributed.rank} of {distributed.world_size} waited {config.guard.timeout_minutes:g} minutes "
            "(train.guard.timeout_minutes) for the others"
        )
    else:
        what = f"process {distributed.rank} of {distributed.world_size} lost another one"
    ended = UnclipError(f"{what} after step {step}; {newest(config)} is there to go on from: enter the same line again")
    ended.quiet = not _first_to_tell(Path(config.run_dir))  # type: ignore[attr-defined]
    return ended


def newest(config: TrainConfig) -> str:
    found = checkpoints(Path(config.run_dir) / "checkpoints")
    return f"the checkpoint {found[-1]}" if found else "the start (there is no checkpoint yet)"


def _first_to_tell(run_dir: Path) -> bool:
    """Those who are left cannot talk to each other any more; a file says that one has spoken."""
    try:
        os.close(os.open(run_dir / ENDED, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _bits(tensor: Tensor) -> Tensor:
    by_size: dict[int, Callable[[], Tensor]] = {
        2: lambda: tensor.view(torch.int16),
        4: lambda: tensor.view(torch.int32),
        8: lambda: tensor.view(torch.int64),
    }
    return by_size[tensor.element_size()]()
