"""Which process this is, and how processes agree. The `deepspeed` launcher says the first in the environment; a plain
`python` run is one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from unclip.errors import UnclipError


@dataclass(frozen=True)
class Distributed:
    """Rank and number of processes, and the device this one trains on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks; all must call this together."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], Any], failure: str) -> list[Any]:
        """Run `action` on every process and return all results.

        Where it fails on one (OSError, or a writer's RuntimeError), UnclipError is raised on all: `failure` with what
        went wrong in the place of `{}`.
        """
        result, problem = None, None
        try:
            result = action()
        except (OSError, RuntimeError) as error:
            problem = str(getattr(error, "strerror", None) or error).splitlines()[0]
        answers = self.gather((result, problem))
        for _, problem in answers:
            if problem is not None:
                raise told_once(UnclipError(failure.format(problem)), self)
        return [answer for answer, _ in answers]


def told_once(error: UnclipError, distributed: Distributed) -> UnclipError:
    """Mark an error that every process meets, so that the command prints it once."""
    error.quiet = not distributed.is_main  # type: ignore[attr-defined]
    return error


def current() -> Distributed:
    """Read RANK, WORLD_SIZE and LOCAL_RANK as the launcher sets them."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Distributed(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)
