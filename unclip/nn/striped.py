"""Run a convolutional network on one image in stripes of rows, within a stated memory, with the result of a whole run.

A tile with a halo is not enough for these networks: GroupNorm looks at the whole image, and the receptive field of a
deep U-Net spans most of it. So the tiling goes layer by layer. `run_striped` calls the network's own `forward` on a
`StripedMap` in place of a tensor. Each convolution computes its output stripe by stripe, reading as many rows above and
below as its kernel reaches; a GroupNorm first gathers its mean and variance over all stripes, then is a scale and a
shift like any other; everything pointwise is left until its rows are asked for. Sums are ordered differently than in a
whole run, nothing else differs.

Only outputs of convolutions and of residual sums are kept, on the device while they fit into the limit, else in main
memory (for a GPU) or in a temporary file (for a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.nn.storage import Rows, StripeMemory, freed_at_once

_Read = Callable[[int, int], Tensor]


def run_striped(network: nn.Module, x: Tensor, *inputs: Any, memory: StripeMemory, **named: Any) -> Tensor:
    """network(x, …) for x (B, C, H, W), its feature maps and work kept within `memory`.

    The network may use convolutions (padding of zeros, dilation 1), GroupNorm, pointwise functions, 2×2 average
    pooling, nearest-neighbour doubling, pixel (un)shuffling, concatenation of channels, and attention where the whole
    feature map fits. Raises UnclipError when the limit does not hold even a few rows.
    """
    with torch.no_grad(), freed_at_once(memory.device):
        output = network(StripedMap.wrap(x, memory), *inputs, **named)
        return output.whole() if isinstance(output, StripedMap) else output


class StripedMap:
    """A feature map (B, C, H, W) that gives its rows on demand; stands for a tensor inside a network's `forward`."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory: StripeMemory,
        read: _Read,
        inputs: Sequence[StripedMap] = (),
    ) -> None:
        self.shape, self.dtype, self.memory = torch.Size(shape), dtype, memory
        self._read, self._inputs = read, tuple(inputs)
        self._stores = False  # computing it costs: keep the rows once they are needed more than once
        self._spread = 1.0  # pixels of the inputs behind one pixel of this map
        self.pending: bool = any(node.pending for node in self._inputs)

    @classmethod
    def wrap(cls, tensor: Tensor, memory: StripeMemory) -> StripedMap:
        """A map around a tensor that is there anyway."""
        return cls(tensor.shape, tensor.dtype, memory, lambda a, b: tensor[:, :, a:b])

    @property
    def work(self) -> float:
        """Channels that are alive at once for each pixel of this map in computing it."""
        return self.shape[1] + self._spread * sum(node.work for node in self._inputs)

    # ---- reading -----------------------------------------------------------------------------------------------

    def rows(self, first: int, end: int) -> Tensor:
        """(B, C, end − first, W) on the device."""
        return self._read(first, end)

    def whole(self) -> Tensor:
        """All of it as a tensor on the device."""
        return torch.cat([self.rows(a, b) for a, b in self._stripes()], dim=2)

    def settle(self) -> None:
        """Compute and keep what would otherwise be computed for every reader."""
        if not self.pending:
            return
        if self._stores:
            self._store()
        else:
            for node in self._inputs:
                node.settle()
        self.pending = False

    def _store(self) -> None:
        kept: Rows | None = None
        for first, end in self._stripes():
            stripe = self.rows(first, end)
            if kept is None:
                kept = self.memory.allocate(self.shape, stripe.dtype)
            kept.write(first, stripe)
        assert kept is not None
        self._read, self._inputs = kept.read, ()  # lets go of what it was computed from

    def _stripes(self) -> list[tuple[int, int]]:
        return self.memory.stripes(self.shape, self.work)

    # ---- what a network does with a tensor ---------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _FUNCTIONS:
            raise TypeError(f"{name} has no rule for running in stripes")
        return _FUNCTIONS[name](*args, **(kwargs or {}))

    def __add__(self, other: Any) -> StripedMap:
        return self._with(other, torch.add)

    __radd__ = __add__

    def __mul__(self, other: Any) -> StripedMap:
        return self._with(other, torch.mul)

    __rmul__ = __mul__

    def _with(self, other: Any, operation: Callable[[Any, Any], Tensor]) -> StripedMap:
        if isinstance(other, Tensor) and other.ndim == 4 and other.shape[2] > 1:
            other = StripedMap.wrap(other, self.memory)
        if not isinstance(other, StripedMap):  # a number, or a tensor that is the same in every row
            kept = torch.result_type(torch.empty((), dtype=self.dtype), other)
            return StripedMap(self.shape, kept, self.memory, lambda a, b: operation(self.rows(a, b), other), [self])
        dtype = torch.promote_types(self.dtype, other.dtype)
        result = StripedMap(
            self.shape, dtype, self.memory, lambda a, b: operation(self.rows(a, b), other.rows(a, b)), [self, other]
        )
        result._stores = result.pending  # the sum is kept in place of what it adds
        return result

    def float(self) -> StripedMap:
        return self.to(torch.float32)

    def to(self, dtype: torch.dtype) -> StripedMap:
        if dtype == self.dtype:
            return self
        return StripedMap(self.shape, dtype, self.memory, lambda a, b: self.rows(a, b).to(dtype), [self])

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> StripedMap:
        """The map as it is: its rows are kept channels_last."""
        return self

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        """Attention needs the whole map: it leaves the stripes here."""
        self.settle()
        return self.whole().flatten(start_dim, end_dim)


def _pointwise(function: Callable[..., Tensor]) -> Callable[..., StripedMap]:
    def apply(x: StripedMap, *args: Any, **kwargs: Any) -> StripedMap:
        return StripedMap(x.shape, x.dtype, x.memory, lambda a, b: function(x.rows(a, b), *args, **kwargs), [x])

    return apply


def _dropout(x: StripedMap, p: float = 0.5, training: bool = True, inplace: bool = False) -> StripedMap:
    if training and p:
        raise RuntimeError("dropout is active; a network runs in stripes in eval mode only")
    return x


def _cat(maps: Sequence[StripedMap | Tensor], dim: int = 0) -> StripedMap:
    if dim != 1:
        raise ValueError(f"stripes are concatenated along channels, dimension 1, not along dimension {dim}")
    memory = next(one.memory for one in maps if isinstance(one, StripedMap))
    nodes = [one if isinstance(one, StripedMap) else StripedMap.wrap(one, memory) for one in maps]
    batch, _, height, width = nodes[0].shape
    shape = (batch, sum(node.shape[1] for node in nodes), height, width)
    dtype = nodes[0].dtype
    for node in nodes[1:]:
        dtype = torch.promote_types(dtype, node.dtype)
    return StripedMap(shape, dtype, memory, lambda a, b: torch.cat([node.rows(a, b) for node in nodes], dim=1), nodes)


def _conv2d(
    x: StripedMap,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> StripedMap:
    (step, step_x), (margin, margin_x) = _pair(stride), _pair(padding)
    if _pair(dilation) != (1, 1):
        raise ValueError("a dilated convolution cannot be run in stripes")
    x.settle()
    batch, _, height, width = x.shape
    tall, wide = weight.shape[2:]
    shape = (
        batch,
        weight.shape[0],
        (height + 2 * margin - tall) // step + 1,
        (width + 2 * margin_x - wide) // step_x + 1,
    )

    def read(first: int, end: int) -> Tensor:
        top, bottom = first * step - margin, (end - 1) * step - margin + tall
        rows = x.rows(max(top, 0), min(bottom, height))
        rows = F.pad(rows, (0, 0, max(-top, 0), max(bottom - height, 0)))
        return F.conv2d(rows, weight, bias, (step, step_x), (0, margin_x), 1, groups)

    kind = x.memory.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    result = StripedMap(shape, dtype, x.memory, read, [x])
    result._spread = 2.0 * step * step_x  # the padded rows are a copy
    result._stores = result.pending = True
    return result


def _group_norm(
    x: StripedMap, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> StripedMap:
    """The statistics of all stripes are put together (Chan et al. 1979), in float64."""
    x.settle()
    batch, channels = x.shape[:2]
    count, mean, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for first, end in x._stripes():
        values = x.rows(first, end).float().reshape(batch, num_groups, -1)
        own = values.shape[-1]
        variance, centre = (part.double() for part in torch.var_mean(values, dim=-1, correction=0))
        if count:
            total = count + own
            shift = centre - mean
            squares = squares + variance * own + shift**2 * (count * own / total)
            mean, count = mean + shift * (own / total), total
        else:
            count, mean, squares = own, centre, variance * own
    inverse = (squares / count + eps).rsqrt()
    scale, shift = (part.repeat_interleave(channels // num_groups, dim=1) for part in (inverse, -mean * inverse))
    if weight is not None:
        scale, shift = scale * weight.double(), shift * weight.double()
    if bias is not None:
        shift = shift + bias.double()
    scale, shift = scale.float()[:, :, None, None], shift.float()[:, :, None, None]  # (B, C, 1, 1)
    return StripedMap(
        x.shape, x.dtype, x.memory, lambda a, b: torch.addcmul(shift, x.rows(a, b).float(), scale).to(x.dtype), [x]
    )


def _avg_pool2d(x: StripedMap, kernel_size: Any, stride: Any = None, **_: Any) -> StripedMap:
    factor, _across = _pair(kernel_size)
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // factor, width // factor)
    node = StripedMap(
        shape, x.dtype, x.memory, lambda a, b: F.avg_pool2d(x.rows(factor * a, factor * b), factor), [x]
    )
    node._spread = factor**2
    return node


def _interpolate(
    x: StripedMap, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **_: Any
) -> StripedMap:
    if mode != "nearest" or scale_factor is None or int(scale_factor) != scale_factor:
        raise ValueError(f"interpolation {mode} cannot be run in stripes")
    return _enlarged(x, int(scale_factor), 1, lambda rows: F.interpolate(rows, scale_factor=scale_factor, mode=mode))


def _pixel_shuffle(x: StripedMap, upscale_factor: int) -> StripedMap:
    return _enlarged(x, upscale_factor, upscale_factor**2, lambda rows: F.pixel_shuffle(rows, upscale_factor))


def _enlarged(x: StripedMap, factor: int, fold: int, function: Callable[[Tensor], Tensor]) -> StripedMap:
    """Every row becomes `factor` rows; `fold` channels become one."""
    batch, channels, height, width = x.shape

    def read(first: int, end: int) -> Tensor:
        start = first // factor
        rows = function(x.rows(start, -(-end // factor)))
        return rows[:, :, first - start * factor : end - start * factor]

    shape = (batch, channels // fold, height * factor, width * factor)
    node = StripedMap(shape, x.dtype, x.memory, read, [x])
    node._spread = 1 / factor**2
    return node


def _pixel_unshuffle(x: StripedMap, downscale_factor: int) -> StripedMap:
    factor = downscale_factor
    batch, channels, height, width = x.shape
    shape = (batch, channels * factor**2, height // factor, width // factor)
    node = StripedMap(
        shape, x.dtype, x.memory, lambda a, b: F.pixel_unshuffle(x.rows(factor * a, factor * b), factor), [x]
    )
    node._spread = factor**2
    return node


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "silu": _pointwise(lambda x, inplace=False: F.silu(x)),
    "relu": _pointwise(lambda x, inplace=False: F.relu(x)),
    "dropout": _dropout,
    "cat": _cat,
    "conv2d": _conv2d,
    "group_norm": _group_norm,
    "avg_pool2d": _avg_pool2d,
    "interpolate": _interpolate,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "add": lambda x, other: x + other if isinstance(x, StripedMap) else other + x,
    "mul": lambda x, other: x * other if isinstance(x, StripedMap) else other * x,
}
