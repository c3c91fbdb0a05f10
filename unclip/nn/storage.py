"""Where feature maps lie while a network runs in stripes, and how much memory a network takes when it does not."""

from __future__ import annotations

import ctypes
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from unclip.errors import UnclipError

_MAPS_SHARE = 0.6  # of the limit; the rest is for the rows in work
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h: larger blocks are mapped and unmapped by themselves
_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD: free memory at the heap's end beyond it goes back to the system
_LARGEST_MMAP_THRESHOLD = 2**25  # what glibc accepts, and where it ends up itself after a few large blocks
_HALO = 2  # rows beside a stripe that a 3×3 convolution reads


class Rows(Protocol):
    """A feature map (B, C, H, W) that is written and read by rows."""

    def write(self, first: int, stripe: Tensor) -> None: ...
    def read(self, first: int, end: int) -> Tensor: ...


class StripeMemory:
    """Keeps feature maps and the work on them within `limit` bytes of the device's memory.

    What does not fit goes to main memory if the device is a GPU, else into temporary files (in $TMPDIR). Weights, and
    the pictures themselves, are not counted.
    """

    def __init__(self, limit: int, device: torch.device | str) -> None:
        self.limit, self.device = limit, torch.device(device)
        self.used = 0
        self.spilled = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Rows:
        """Room for a map; given back when the last reference to it goes."""
        size = int(np.prod(shape)) * dtype.itemsize
        rows: TensorRows | FileRows
        if self.used + size <= _MAPS_SHARE * self.limit:
            self.used += size
            rows = TensorRows(shape, dtype, self.device, self.device)
            weakref.finalize(rows, self._freed, size)
        elif self.device.type == "cpu":
            self.spilled += size
            rows = FileRows(shape, dtype)
        else:
            self.spilled += size
            rows = TensorRows(shape, dtype, torch.device("cpu"), self.device)
        return rows

    def stripes(self, shape: Sequence[int], work: float) -> list[tuple[int, int]]:
        """Rows [first, end) of a map (B, C, H, W) to compute together, `work` channels being alive in doing so.

        UnclipError when not even one row fits.
        """
        row = shape[0] * work * shape[3] * 4
        room = (1 - _MAPS_SHARE) * self.limit
        count = int(room // row) - _HALO if row else shape[2]
        if count < 1:
            needed = (1 + _HALO) * row / (1 - _MAPS_SHARE)
            raise UnclipError(
                f"a memory limit of {self.limit / 2**20:.1f} MiB is too small for this picture; "
                f"the network needs at least {needed / 2**20:.1f} MiB for its feature maps"
            )
        return [(first, min(first + count, shape[2])) for first in range(0, shape[2], count)]

    def _freed(self, size: int) -> None:
        self.used -= size


class TensorRows:
    """A map in memory, as (H, B, W, C): rows are contiguous, and for one image that is the fast channels_last."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, place: torch.device, device: torch.device) -> None:
        batch, channels, height, width = shape
        self.device = device
        self.tensor = torch.empty(height, batch, width, channels, dtype=dtype, device=place)

    def write(self, first: int, stripe: Tensor) -> None:
        self.tensor[first : first + stripe.shape[2]].permute(1, 3, 0, 2).copy_(stripe)

    def read(self, first: int, end: int) -> Tensor:
        return self.tensor[first:end].to(self.device).permute(1, 3, 0, 2)


class FileRows:
    """A map in a temporary file without a name, as (H, B, W, C); read and written, not mapped, so that it takes no
    memory of the process.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        batch, channels, _, width = shape
        self.row, self.dtype = (batch, width, channels), dtype
        self.bytes = batch * width * channels * dtype.itemsize
        try:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115
        except OSError as error:
            raise _no_room(error) from error

    def write(self, first: int, stripe: Tensor) -> None:
        rows = stripe.permute(2, 0, 3, 1).contiguous().view(torch.uint8)
        try:
            self.file.seek(first * self.bytes)
            self.file.write(rows.numpy().data)
            self.file.flush()
        except OSError as error:
            raise _no_room(error) from error

    def read(self, first: int, end: int) -> Tensor:
        content = np.empty((end - first) * self.bytes, dtype=np.uint8)
        self.file.seek(first * self.bytes)
        if self.file.readinto(content.data) != len(content):  # type: ignore[attr-defined]
            raise UnclipError(f"the temporary file for feature maps in {tempfile.gettempdir()} has been cut short")
        rows = torch.from_numpy(content).view(self.dtype).view(end - first, *self.row)
        return rows.permute(1, 3, 0, 2)


@contextmanager
def freed_at_once(device: torch.device) -> Iterator[None]:
    """Let glibc give freed blocks back to the system. It otherwise keeps them for later blocks of the same size, and
    between layers of many sizes that comes to as much as is in use.
    """
    libc = _glibc(device)
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


@contextmanager
def kept_for_reuse(device: torch.device) -> Iterator[None]:
    """Let glibc keep freed blocks until the block ends. The feature maps of a step come and go at the heap's end, and
    glibc otherwise gives their memory back to the system and asks for it again, cleared page by page, at every layer.
    """
    libc = _glibc(device)
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2**30)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)  # as glibc sets it beside the other
            libc.malloc_trim(0)


def _glibc(device: torch.device) -> Any:
    """The C library where its allocator can be adjusted and the feature maps are its; else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _no_room(error: OSError) -> UnclipError:
    return UnclipError(
        f"feature maps beyond the memory limit cannot be written to {tempfile.gettempdir()}: "
        f"{error.strerror or error}; raise the limit or set TMPDIR to a larger disk"
    )


def peak_memory(network: nn.Module, *inputs: Any, **named: Any) -> int:
    """Most bytes that tensors take at once in network(…) without gradients, found without computing anything.

    `inputs` are on the meta device and not counted, nor are the weights.
    """
    state = {name: torch.empty_like(value, device="meta") for name, value in network.state_dict().items()}
    with torch.no_grad(), _Peak() as peak:
        torch.func.functional_call(network, state, inputs, named)
    return peak.most


class _Peak(TorchDispatchMode):
    """Follows the storages that operations make, until the last tensor on them is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.tensors: Counter[int] = Counter()  # by storage
        self.given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, Tensor) and not self.tensors[_storage(tensor)]:
                self.given.add(_storage(tensor))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and _storage(tensor) not in self.given:
                self._made(tensor, _storage(tensor), tensor.untyped_storage().nbytes())
        return result

    def _made(self, tensor: Tensor, key: int, size: int) -> None:
        if not self.tensors[key]:
            self.live += size
            self.most = max(self.most, self.live)
        self.tensors[key] += 1
        weakref.finalize(tensor, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            self.live -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
