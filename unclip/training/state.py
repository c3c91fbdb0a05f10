"""The engine's state as named pieces of whole parameters, which any ZeRO stage and number of processes can take up.

DeepSpeed's own checkpoints belong to one stage and one number of processes. Here every process writes the pieces it
owns, each with its place in the parameter, and reads those it needs out of everybody's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.errors import UnclipError
from unclip.training.ema import EMA
from unclip.training.partition import even, local_part, numel_of, shape_of

Pieces = dict[str, tuple[int, Tensor]]
"""Parameter's name -> where a piece begins in the flat parameter, and the piece."""


@dataclass(frozen=True)
class _Owned:
    """A piece of a parameter that this process's optimizer updates, and where it lies in which of its tensors."""

    name: str
    start: int
    length: int
    tensor: Tensor
    offset: int
    group: int


def capture(engine: Any, ema: EMA) -> dict[str, Any]:
    """What this process writes: its part of parameters, averages and optimizer state, copied to the CPU."""
    rank, world = ema.rank, ema.world_size
    moments: dict[str, Pieces] = {}
    counts: dict[str, dict[str, float]] = {}
    base = _base(engine)
    for owned in _owned(engine):
        with _at_hand(engine, owned):
            for key, value in base.state.get(owned.tensor, {}).items():
                if _alike(value, owned.tensor):
                    start, length = (
                        even(owned.length, rank, world) if _whole(engine) else (owned.start, owned.length)
                    )
                    first = owned.offset + (start if _whole(engine) else 0)
                    piece = value.detach().reshape(-1)[first : first + length]
                    moments.setdefault(key, {})[owned.name] = (start, _copy(piece))
                else:
                    counts.setdefault(key, {})[owned.name] = float(value)
    parameters = {name: (even(numel_of(p), rank, world)[0], _copy(local_part(p, rank, world)))
                  for name, p in ema.parameters.items()}  # fmt: skip
    return {
        "parameters": parameters,
        "moments": moments,
        "counts": counts,
        "group_steps": [group.get("step", 0) for group in base.param_groups],
        "ema": {name: (ema.part_of(name)[0], _copy(ema.part_of(name)[1])) for name in ema.shadow},
        "ema_updates": ema.updates,
        "buffers": {name: _copy(buffer) for name, buffer in engine.module.named_buffers()},
    }


class Shards:
    """All processes' files of one checkpoint, mapped into memory and read where needed."""

    def __init__(self, files: list[Path], own: int) -> None:
        self.files = [torch.load(file, weights_only=True, mmap=True, map_location="cpu") for file in files]
        self.own: dict[str, Any] = self.files[own]

    def names(self, *path: str) -> set[str]:
        return {name for file in self._sections(*path) for name in file}

    def numbers(self, *path: str) -> dict[str, float]:
        """What all files say of names, put together."""
        return {name: value for section in self._sections(*path) for name, value in section.items()}

    def read(self, name: str, start: int, length: int, *path: str) -> Tensor:
        """Elements [start, start + length) of a parameter, its average or a moment. UnclipError: a hole in them."""
        whole: Tensor | None = None
        covered = 0
        for section in self._sections(*path):
            if name not in section:
                continue
            first, piece = section[name]
            low, high = max(start, first), min(start + length, first + piece.numel())
            if low >= high:
                continue
            if whole is None:
                whole = torch.empty(length, dtype=piece.dtype)
            whole[low - start : high - start] = piece[low - first : high - first]
            covered += high - low
        if covered != length:
            raise UnclipError(f"the checkpoint holds {covered} of {length} elements of {name} ({'.'.join(path)})")
        return torch.empty(0) if whole is None else whole

    def _sections(self, *path: str) -> Iterator[dict[str, Any]]:
        for file in self.files:
            section: Any = file
            for key in path:
                section = section.get(key, {})
            yield section


@torch.no_grad()
def restore(engine: Any, ema: EMA, shards: Shards) -> None:
    """Fill engine and average from a checkpoint of any ZeRO stage and number of processes; all must call this.

    UnclipError: it is of a network with other parameters.
    """
    rank, world = ema.rank, ema.world_size
    _fits(ema, shards)
    for name, parameter in ema.parameters.items():
        if hasattr(parameter, "ds_tensor"):
            start, length = even(numel_of(parameter), rank, world)
            local_part(parameter, rank, world).copy_(shards.read(name, start, length, "parameters"))
        if not hasattr(parameter, "ds_tensor") or parameter.numel() == numel_of(parameter):
            whole = shards.read(name, 0, numel_of(parameter), "parameters")
            parameter.data.copy_(whole.view(shape_of(parameter)))
    for name, shadow in ema.shadow.items():
        start, length = even(numel_of(ema.parameters[name]), rank, world)
        shadow.copy_(shards.read(name, start, length, "ema"))
    ema.updates = shards.own["ema_updates"]
    for name, buffer in engine.module.named_buffers():
        if name in shards.own["buffers"]:
            buffer.copy_(shards.own["buffers"][name])
    _restore_optimizer(engine, shards)


def _restore_optimizer(engine: Any, shards: Shards) -> None:
    base = _base(engine)
    moments, counts = (sorted(shards.names(section)) for section in ("moments", "counts"))
    for group, step in zip(base.param_groups, shards.own["group_steps"], strict=False):
        if "step" in group:  # DeepSpeed's FusedAdam counts there
            group["step"] = step
    known = {key: shards.names("moments", key) for key in moments}
    counted = {key: shards.numbers("counts", key) for key in counts}
    for owned in _owned(engine):
        with _at_hand(engine, owned):
            if not _whole(engine):  # the weights that the optimizer updates are a copy of their own
                master = shards.read(owned.name, owned.start, owned.length, "parameters")
                _flat(owned.tensor, owned).copy_(master)
            state = base.state.setdefault(owned.tensor, {}) if any(owned.name in k for k in known.values()) else {}
            for key in moments:
                if owned.name not in known[key]:
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(owned.tensor, dtype=torch.float32)
                value = shards.read(owned.name, owned.start, owned.length, "moments", key)
                if _whole(engine):
                    state[key].copy_(value.view(owned.tensor.shape))
                else:
                    _flat(state[key], owned).copy_(value)
            for key, numbers in counted.items():
                # One count serves a flat tensor of many parameters; those without gradients have counted less.
                if owned.name in numbers:
                    largest = max(numbers.values()) if not _whole(engine) else numbers[owned.name]
                    state[key] = int(largest) if _counts_in_integers(base) else torch.tensor(largest)
                    if not _counts_in_integers(base) and any(g.get("fused") for g in base.param_groups):
                        state[key] = state[key].to(owned.tensor.device)
    _link(engine)


def _fits(ema: EMA, shards: Shards) -> None:
    here, there = set(ema.parameters), shards.names("parameters")
    if here != there:
        first = sorted(here ^ there)[0]
        where = "network" if first in here else "checkpoint"
        raise UnclipError(
            f"the checkpoint is of a network with other parameters: {first} is in the {where} alone; choose another "
            "train.run_dir"
        )


def _owned(engine: Any) -> Iterator[_Owned]:
    optimizer, base = engine.optimizer, _base(engine)
    if _whole(engine):
        names = {id(p): name for name, p in engine.module.named_parameters()}
        for index, group in enumerate(base.param_groups):
            for parameter in group["params"]:
                yield _Owned(names[id(parameter)], 0, parameter.numel(), parameter, 0, index)
        return
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            start, length = even(numel_of(parameter), rank, world)
            yield _Owned(name, start, length, optimizer.fp32_partitioned_groups_flat[group], int(offset), group)
        elif getattr(parameter, "_hp_mapping", None) is not None:
            mapping = parameter._hp_mapping
            place, there, group = mapping.lp_fragment_address, mapping.hp_fragment_address, mapping.param_group_index
            flat = optimizer.single_partition_of_fp32_groups[group]
            yield _Owned(name, place.start, place.numel, flat, there.start, group)


@contextmanager
def _at_hand(engine: Any, owned: _Owned) -> Iterator[None]:
    """Brings a group's state back from nvme for the time being."""
    optimizer = engine.optimizer
    swapped = hasattr(optimizer, "_swappable_optimizer_subgroup") and optimizer._swappable_optimizer_subgroup(
        owned.group
    )
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(owned.group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(owned.group)


def _link(engine: Any) -> None:
    """ZeRO 1 and 2 look at the optimizer's state through views, which they make at the first step."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False


def _base(engine: Any) -> Any:
    """torch's or DeepSpeed's AdamW behind the ZeRO optimizer."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _whole(engine: Any) -> bool:
    """Without ZeRO the optimizer holds the network's parameters themselves."""
    return int(engine.zero_optimization_stage()) == 0


def _alike(value: Any, tensor: Tensor) -> bool:
    return torch.is_tensor(value) and value.numel() == tensor.numel() and value.dim() > 0


def _flat(tensor: Tensor, owned: _Owned) -> Tensor:
    return tensor.data.view(-1)[owned.offset : owned.offset + owned.length]


def _counts_in_integers(base: Any) -> bool:
    return type(base).__module__.startswith("deepspeed")


def _copy(tensor: Tensor) -> Tensor:
    """A tensor of its own memory: a view would be stored with all it looks into."""
    return tensor.detach().cpu().clone()
