"""What the blocks of a U-Net compute, with less work and less memory; the results differ by rounding alone.

While no gradients are recorded, a feature map that was made for the next layer alone is overwritten by it, and a bias
or a sum goes into the convolution beside it.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LAST = torch.channels_last


def may_overwrite(x: Tensor) -> bool:
    """Whether what one layer makes of x may be overwritten by the next: no gradients are recorded, and nobody follows
    the network who arranges its memory himself (a compiler; stripes of rows, which are no tensors).
    """
    return isinstance(x, Tensor) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def doubled_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """conv(x with every pixel doubled in height and width), `conv` being a 3×3 convolution that keeps the edge.

    An output pixel meets 2×2 pixels of x alone, each with the sum of one to four of the nine weights. On a CPU these
    sums are the weights of a transposed convolution of stride 2: four products a pixel and pair of channels instead of
    nine (the sub-pixel convolution of Shi et al. 2016).
    """
    if (
        not _is_plain(conv, x)
        or conv.kernel_size != (3, 3)
        or conv.padding != (1, 1)
        or x.device.type != "cpu"
        or type(x) is not Tensor  # a plan counts what any device computes
        or x.dtype not in (torch.float32, torch.float64)  # halves would round the sums of the weights once more
    ):
        doubled: Tensor = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return doubled
    # Along an axis output 2y is w0·x[y−1] + (w1 + w2)·x[y], and 2y + 1 is (w0 + w1)·x[y] + w2·x[y+1].
    sums = conv.weight.new_tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    both = torch.einsum("yi,xj->yxij", sums, sums).flatten(2).flatten(0, 1)  # (16, 9)
    nine = conv.weight.transpose(0, 1).reshape(-1, 9)  # (I·O, 9)
    kernel = (nine @ both.t()).view(conv.in_channels, conv.out_channels, 4, 4)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def conv_and_shift(h: Tensor, conv: nn.Module, shift: Tensor, *, double: bool = False) -> Tensor:
    """conv(h) + shift, shift (B, C, 1, 1), with every pixel of h doubled first where `double`."""
    out: Tensor = doubled_conv(h, conv) if double else conv(h)
    return out.add_(shift) if may_overwrite(h) else out + shift


def scaled_and_shifted(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """h · (1 + scale) + shift, both (B, C, 1, 1); h may be overwritten."""
    if not may_overwrite(h):
        return h * (1 + scale) + shift
    return torch.addcmul(shift, h, 1 + scale, out=h)


def conv_and_shortcut(h: Tensor, conv: nn.Module, x: Tensor, shortcut: nn.Module) -> Tensor:
    """shortcut(x) + conv(h); `shortcut` is the identity or a 1×1 convolution.

    In channels-last order a 1×1 convolution is a matrix product, which adds to conv(h) as it goes.
    """
    if not may_overwrite(h):
        return shortcut(x) + conv(h)  # type: ignore[no-any-return]
    ordered = h.is_contiguous(memory_format=_LAST) and x.is_contiguous(memory_format=_LAST)
    if not (ordered and x.device.type == "cpu" and _is_plain(conv, h) and _is_plain(shortcut, x)):
        return conv(h).add_(shortcut(x))  # type: ignore[no-any-return]
    if shortcut.kernel_size != (1, 1) or shortcut.bias is None or conv.bias is None:
        return conv(h).add_(shortcut(x))  # type: ignore[no-any-return]
    h = F.conv2d(h, conv.weight, conv.bias + shortcut.bias, conv.stride, conv.padding).contiguous(memory_format=_LAST)
    rows, factors = (part.permute(0, 2, 3, 1).flatten(0, 2) for part in (h, x))  # views
    torch.addmm(rows, factors, shortcut.weight.flatten(1).t(), out=rows)
    return h


def add_doubled(h: Tensor, x: Tensor) -> Tensor:
    """h (B, C, 2H, 2W) + x (B, C, H, W) with every pixel doubled; h may be overwritten."""
    if not may_overwrite(h):
        return F.interpolate(x, scale_factor=2, mode="nearest") + h
    pixels = h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H, 2, W, 2), a view
    pixels.add_(x[:, :, :, None, :, None])
    return h


def _is_plain(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """A convolution with nothing wrapped around it, as adapters do, and a tensor of its own precision."""
    if type(conv) is not nn.Conv2d or not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return False
    simple = conv.groups == 1 and conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return simple and x.dtype == conv.weight.dtype and not cast
