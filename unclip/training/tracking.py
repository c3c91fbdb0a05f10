"""Watching a run: metrics.jsonl, status.json, a bar or lines on the terminal, Weights & Biases where wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from unclip.config import Config, TrainConfig
from unclip.runs import METRICS, State, StatusFile
from unclip.training.distributed import Distributed
from unclip.training.metrics import MetricsFile
from unclip.training.progress import Progress
from unclip.training.speed import Speed
from unclip.training.wandb_run import WandbRun

_SIGNAL_CODES = (130, 143)  # 128 + SIGINT, SIGTERM


class Tracker:
    """Tells of a run from its start at step `start` to its end, however it ends; use it as a context manager.

    Processes other than the first write nothing. Raises UnclipError: metrics that cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        full_config: dict[str, Any],
        start: int,
        main: bool,
        *,
        stage: str = "",
        distributed: Distributed | None = None,
    ) -> None:
        self.main, self.step, self.steps = main, start, config.steps
        if not main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        here = distributed or Distributed(0, 1, torch.device("cpu"))
        self.metrics = MetricsFile(run_dir / METRICS, start)
        self._speed = Speed(config, here.device, here.world_size, start)
        self.progress = Progress(config.steps, start)
        self.status: StatusFile | None = StatusFile(
            run_dir, stage=stage, step=start, steps=config.steps, processes=here.world_size
        )
        self._speed.flops_per_image = self.status["flops_per_image"]
        self.wandb = WandbRun(run_dir, config, full_config, stage)
        if self._speed.complaint:
            self.say(self._speed.complaint)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            state: State = "finished" if self.step >= self.steps else "interrupted"
            self.close(state)
        elif isinstance(error, KeyboardInterrupt | SystemExit) or getattr(error, "exit_code", None) in _SIGNAL_CODES:
            self.close("interrupted", _first_line(error))
        else:
            self.close("failed", _first_line(error))

    def counting_flops(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Around every step; in the first its FLOPs are counted."""
        return self._speed.counting(network) if self.main else nullcontext()

    def advance(self) -> None:
        """A step is done."""
        self.step += 1
        if self.main:
            self.progress.advance()
            if self.status is not None:
                self.status.update(step=self.step)

    def speed(self, step: int) -> dict[str, float]:
        """Images a second since the last question, MFU, memory; nothing on the other processes."""
        return self._speed.measure(step) if self.main else {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, everywhere else as well."""
        if not self.main:
            return
        self.metrics.write(step, metrics)
        self.progress.show(step, metrics)
        self.wandb.log(step, metrics)
        if self.status is not None:
            self.status.update(flops_per_image=self._speed.flops_per_image)

    def image(self, step: int, file: Path, caption: str = "") -> None:
        if self.main:
            self.wandb.image(step, "samples", file, caption)

    def say(self, text: str) -> None:
        if self.main and text:
            self.progress.say(text)

    def close(self, state: State = "finished", reason: str = "") -> None:
        """Say how the run ended; a second call says nothing more."""
        if not self.main or self.status is None:
            return
        self.progress.close()
        self.status.close(state, reason)
        self.status = None
        self.wandb.close(exit_code=0 if state == "finished" else 1)


def stage_of(run_config: Config) -> str:
    """The stage that a run's configuration belongs to, by the name of its class: 'prior' of PriorRunConfig."""
    return type(run_config).__name__.removesuffix("RunConfig").lower()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
