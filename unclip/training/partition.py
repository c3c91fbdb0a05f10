"""Which part of each parameter lives in this process, whatever the ZeRO stage.

The even partition is ZeRO-3's: of n elements over N processes each has ⌈n/N⌉, the last ones fewer. The moving average
and checkpoints are cut that way at every stage, so that no process holds or writes what another one does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def even(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and length of a process's part of `numel` elements."""
    size = -(-numel // world_size)
    start = min(rank * size, numel)
    return start, min(size, numel - start)


def numel_of(parameter: Any) -> int:
    """Elements of a whole parameter, partitioned or not."""
    return int(parameter.ds_numel if hasattr(parameter, "ds_tensor") else parameter.numel())


def shape_of(parameter: Any) -> torch.Size:
    """Shape of a whole parameter, partitioned or not."""
    return torch.Size(parameter.ds_shape if hasattr(parameter, "ds_tensor") else parameter.shape)


def local_part(parameter: Any, rank: int, world_size: int) -> Tensor:
    """This process's part, flat; a view wherever the parameter's memory allows one."""
    start, length = even(numel_of(parameter), rank, world_size)
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.data.reshape(-1)[:length]  # type: ignore[no-any-return]
    return parameter.data.reshape(-1)[start : start + length]  # type: ignore[no-any-return]


def gather(part: Tensor, numel: int, world_size: int) -> Tensor:
    """The whole (numel,) out of every process's part; all of them must call this together."""
    if world_size == 1:
        return part
    size = -(-numel // world_size)
    padded = part.new_zeros(size)
    padded[: part.numel()] = part
    whole = part.new_empty(size * world_size)
    torch.distributed.all_gather_into_tensor(whole, padded)
    return whole[:numel]
