"""What is told of a step: mean losses since the last line, also by quartile of the timestep, and `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.errors import UnclipError
from unclip.runs import read_rows
from unclip.training.distributed import Distributed

QUARTILE = "quartile"
_QUARTILES = 4


class Window:
    """Mean losses since the last line of metrics, over all micro-batches and processes, in float64.

    A diffusion objective names each sample's quartile of t/T in `quartile` (B,), and every loss is then told by
    quartile as well: `loss_q0` is the quarter with the least noise (as guided-diffusion logs it; Improved DDPM, fig. 2,
    shows why: the terms differ by orders of magnitude). Values that are not finite are left out. `state_dict` goes into
    a checkpoint, so that a line after it tells of all its steps.
    """

    def __init__(self, distributed: Distributed | None = None) -> None:
        self._shared = distributed is not None and distributed.world_size > 1
        self._device = torch.device("cpu") if distributed is None else distributed.device
        self._sums: dict[str, Tensor] = {}  # (2, 5): sums and counts of the four quartiles and of all

    @staticmethod
    def told(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses among an objective's answers."""
        return {name: value.detach() for name, value in losses.items() if name != QUARTILE}

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Take in a micro-batch's per-sample losses; the device is not waited for."""
        quartile = losses.get(QUARTILE)
        for name, value in self.told(losses).items():
            values = value.double().flatten()
            member = torch.zeros(len(values), _QUARTILES + 1, dtype=torch.float64, device=values.device)
            member[:, -1] = 1
            if quartile is not None and len(quartile) == len(values):
                member[:, :-1] = F.one_hot(quartile, _QUARTILES)
            finite = values.isfinite()
            stacked = torch.stack([torch.where(finite, values, 0.0), finite.double()]) @ member
            self._sums[name] = self._sums[name] + stacked if name in self._sums else stacked

    def means(self) -> dict[str, float]:
        """Mean of each loss, `name` and `name_q0` … `name_q3` where samples fell there; begins a new window.

        Every process must call this together.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names])  # (names, 2, 5)
        if self._shared:
            torch.distributed.all_reduce(table)
        self._sums = {}
        told: dict[str, float] = {}
        for name, (sums, counts) in zip(names, table.tolist(), strict=True):
            keys = [f"{name}_q{i}" for i in range(_QUARTILES)] + [name]
            told |= {key: total / count for key, total, count in zip(keys, sums, counts, strict=True) if count}
        return told

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._sums = {name: value.to(self._device) for name, value in state.items()}


@torch.no_grad()
def parameter_norm(network: nn.Module, distributed: Distributed) -> float:
    """Euclidean norm of all parameters; under ZeRO-3 every process must call this together."""
    partitioned = False
    total = torch.zeros((), dtype=torch.float64, device=distributed.device)
    for parameter in network.parameters():
        part: Any = parameter
        if hasattr(part, "ds_tensor"):  # this process's partition, whose end may be padding
            partitioned = True
            held = part.ds_tensor.numel()
            part = part.ds_tensor.flatten()[: max(0, min(held, part.ds_numel - distributed.rank * held))]
        total += part.detach().double().square().sum().to(total.device)
    if partitioned and distributed.world_size > 1:
        torch.distributed.all_reduce(total)
    return float(total.sqrt())


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, in the order of steps, each step once.

    A run that goes on from a checkpoint makes the steps after it again, so their lines are dropped at the start, and
    with them a line that a kill has cut. Raises UnclipError: it cannot be written.
    """

    def __init__(self, file: Path, start: int) -> None:
        self.file = file
        self._last: dict[str, Any] = {}
        self._last_offset = 0
        kept = {row["step"]: row for row in read_rows(file) if row["step"] <= start}
        if file.exists():
            temporary = file.with_name(f".tmp-{file.name}")
            try:
                temporary.write_text("".join(json.dumps(kept[step]) + "\n" for step in sorted(kept)), encoding="utf-8")
                temporary.replace(file)
            except OSError as error:
                raise self._unwritable(error) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a step's line; what is told of the same step again joins the line that is there."""
        row: dict[str, Any] = {"step": step, **{name: float(f"{value:.6g}") for name, value in metrics.items()}}
        try:
            with self.file.open("a+b") as out:
                if self._last.get("step") == step:
                    row = {**self._last, **row}
                    out.truncate(self._last_offset)
                self._last, self._last_offset = row, out.seek(0, 2)
                out.write((json.dumps(row) + "\n").encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UnclipError:
        return UnclipError(f"{self.file} cannot be written: {error.strerror or error}")
