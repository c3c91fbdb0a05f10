"""Resumable run state: DeepSpeed's shards plus, for each process, EMA, random states and the position in the data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from unclip.errors import UnclipError
from unclip.training.distributed import Distributed
from unclip.training.engine import barrier, load_engine, save_engine

_PREFIX = "step-"


def save_checkpoint(
    folder: Path, step: int, engine: Any, own: dict[str, Any], keep: int, distributed: Distributed
) -> None:
    """Write `folder/step-N` under a temporary name and rename it when every process is done; keep the newest `keep`."""
    temporary = folder / f".tmp-{_PREFIX}{step:08d}"
    if distributed.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    save_engine(engine, temporary)
    torch.save({**own, "step": step, "world_size": distributed.world_size}, temporary / f"rank-{distributed.rank}.pt")
    barrier()
    if distributed.is_main:
        final = folder / f"{_PREFIX}{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()


def load_checkpoint(folder: Path, engine: Any, zero_stage: int, distributed: Distributed) -> dict[str, Any] | None:
    """Restore the newest checkpoint into the engine and return this process's own part; None where there is none.

    Without ZeRO every process holds the whole state, so another number of processes may go on: each then takes the
    first
    one's part, without its random states ("generator" and "torch_rng" are None).
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    written_by = len(list(newest.glob("rank-*.pt")))
    moved = written_by != distributed.world_size
    if moved and zero_stage > 0:
        raise UnclipError(
            f"{newest} was written by {written_by} processes with ZeRO stage {zero_stage}, whose parts "
            "cannot be continued by "
            f"{distributed.world_size}; start {written_by}, or choose another train.run_dir"
        )
    rank = 0 if moved else distributed.rank
    own: dict[str, Any] = torch.load(newest / f"rank-{rank}.pt", weights_only=True)
    load_engine(engine, newest)
    return {**own, "generator": None, "torch_rng": None, "cuda_rng": None} if moved else own


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())
