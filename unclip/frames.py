"""Squares of a picture: where a model that draws squares works on a picture of any size and aspect ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.errors import UsageError

Crop = Literal["fit", "whole", "mask"]
Box = tuple[int, int, int, int]
CROPS = ("fit", "whole", "mask")
LARGEST_CANVAS = 16_384
"""Edge in pixels beyond which an outpainted picture is taken for a mistake."""


@dataclass(frozen=True)
class Frame:
    """A square of `edge` pixels whose corner is (left, top); it may reach beyond the picture."""

    left: int
    top: int
    edge: int

    def cut(self, picture: Tensor, fill: float | None = None) -> Tensor:
        """The square (…, E, E) of a picture (…, H, W); beyond its borders `fill`, or else the picture mirrored."""
        rows, columns = self._indices(self.top, picture.shape[-2]), self._indices(self.left, picture.shape[-1])
        square = picture[..., rows, :][..., columns]
        if fill is None:
            return square
        inside = torch.zeros(self.edge, self.edge, dtype=torch.bool)
        top, left, bottom, right = self._overlap(picture.shape[-2], picture.shape[-1])
        inside[top - self.top : bottom - self.top, left - self.left : right - self.left] = True
        return torch.where(inside.to(picture.device), square, torch.full_like(square, fill))

    def paste(self, picture: Tensor, square: Tensor) -> Tensor:
        """A copy of the picture with the square (…, E, E) in its place; what lies beyond the borders is left out."""
        top, left, bottom, right = self._overlap(picture.shape[-2], picture.shape[-1])
        result = picture.clone()
        result[..., top:bottom, left:right] = square[
            ..., top - self.top : bottom - self.top, left - self.left : right - self.left
        ]
        return result

    def _indices(self, start: int, length: int) -> Tensor:
        """Mirrored at the borders, the border pixel twice, as often as it takes."""
        position = torch.arange(start, start + self.edge) % (2 * length)
        return torch.where(position < length, position, 2 * length - 1 - position)

    def _overlap(self, height: int, width: int) -> Box:
        bottom, right = min(self.top + self.edge, height), min(self.left + self.edge, width)
        return max(self.top, 0), max(self.left, 0), bottom, right


def frame_around(box: Box, width: int, height: int, crop: Crop = "fit", context: float | None = None) -> Frame:
    """The square to work on for the pixels in `box` (left, top, right, bottom) of a picture.

    fit: the shorter edge of the picture, or the box's longer one where that is more, as near to the box's centre as
    the picture's borders let it.
    whole: the picture's longer edge, the picture in the middle.
    mask: the box and `context` (default 0.5) of its longer edge on every side; the nearer, the more pixels the model
    spends on the place, and the less it sees of the rest.
    Raises UsageError: no such crop; a context without `mask`, or below 0.
    """
    if crop not in CROPS:
        raise UsageError(f"unknown crop {crop!r}; known: {', '.join(CROPS)}")
    if context is not None and crop != "mask":
        raise UsageError(f"context {context} is for crop 'mask' alone; with {crop!r} leave it out")
    if context is not None and not 0 <= context < math.inf:
        raise UsageError(f"context is {context}, expected 0 (nothing around the mask) or more")
    left, top, right, bottom = box
    longer = max(right - left, bottom - top)
    if crop == "whole":
        edge = max(width, height)
    elif crop == "fit":
        edge = max(min(width, height), longer)
    else:
        share = 0.5 if context is None else context
        edge = min(max(1, round(longer * (1 + 2 * share))), max(width, height))
    return Frame(_place((left + right) / 2, edge, width), _place((top + bottom) / 2, edge, height), edge)


def _place(centre: float, edge: int, length: int) -> int:
    """Where an edge around `centre` begins: inside 0 … length if it fits, else with the picture in its middle."""
    if edge >= length:
        return (length - edge) // 2
    return min(max(round(centre - edge / 2), 0), length - edge)


def margins(width: int, height: int, sides: Sequence[int], to: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """Pixels to add (left, top, right, bottom), from those or from the size of the whole (width, height).

    UsageError: both or none of them, a side below 0, a whole smaller than the picture or larger than 16384 pixels.
    """
    names = ("left", "top", "right", "bottom")
    for name, pixels in zip(names, sides, strict=True):
        if pixels < 0:
            raise UsageError(f"{name} is {pixels}, expected 0 pixels or more")
    left, top, right, bottom = sides
    if to is not None:
        if any(sides):
            raise UsageError("give either the size of the whole (to) or the pixels to add (left, right, top, bottom)")
        if to[0] < width or to[1] < height:
            raise UsageError(f"the picture is {width}x{height} pixels and cannot be outpainted to {to[0]}x{to[1]}")
        left, top = (to[0] - width) // 2, (to[1] - height) // 2
        right, bottom = to[0] - width - left, to[1] - height - top
    if not any((left, top, right, bottom)):
        raise UsageError("nothing to add; say how far to outpaint: left, right, top, bottom, or to with a larger size")
    if max(width + left + right, height + top + bottom) > LARGEST_CANVAS:
        raise UsageError(
            f"outpainting to {width + left + right}x{height + top + bottom} pixels; expected at most {LARGEST_CANVAS} "
            "along an edge"
        )
    return left, top, right, bottom


def plan_frames(width: int, height: int, picture: Box, edge: int, overlap: float = 0.5) -> list[Frame]:
    """Squares that cover a canvas, outwards from the picture on it, so that each meets what is there already.

    picture: (left, top, right, bottom) on the canvas. overlap: the share of a frame's edge, at least, that reaches into
    what is known in the direction of growth. An edge of the canvas that is shorter than the frame's is taken whole.
    Raises UsageError: an overlap that is not in (0, 1), which would leave frames without context or never end.
    """
    if not 0 < overlap < 1:
        raise UsageError(f"overlap is {overlap}, expected a share of the frame above 0 and below 1")
    left, top, right, bottom = picture
    columns = _positions(width, left, right, edge, overlap)
    rows = _positions(height, top, bottom, edge, overlap)
    order = sorted((max(x, y), x + y, i, j) for j, (_, y) in enumerate(rows) for i, (_, x) in enumerate(columns))
    return [Frame(columns[i][0], rows[j][0], edge) for _, _, i, j in order]


def _positions(length: int, first: int, last: int, edge: int, overlap: float) -> list[tuple[int, int]]:
    """(start, how many frames away from the picture) along one axis; 0 are those that lie on it."""
    if edge >= length:
        return [((length - edge) // 2, 0)]
    step = max(1, math.floor(edge * (1 - overlap)))
    if last - first <= edge:  # the whole picture in one frame
        start = _place((first + last) / 2, edge, length)
        inner, low, high = [start], start, start + edge
    else:
        count = math.ceil((last - first - edge) / step)
        inner = [first + round(i * (last - first - edge) / count) for i in range(count + 1)]
        low, high = first, last
    found, away = [(start, 0) for start in inner], 0
    while low > 0 or high < length:
        away += 1
        if low > 0:
            low = max(0, low - step)
            found.append((low, away))
        if high < length:
            high = min(length, high + step)
            found.append((high - edge, away))
    return found


def fill_unknown(squares: Tensor, known: Tensor) -> Tensor:
    """(B, 3, E, E) with what is not known made up smoothly from what is, so that resizing bleeds nothing else into it.

    known: (E, E) in [0, 1]. Averages of the known over ever larger cells take the place of what is missing in the
    smaller ones (pull-push; Gortler et al. 1996, §3.4). Zeros where nothing is known at all.
    """
    return _pull_push(squares, known[None, None].to(squares))


def _pull_push(x: Tensor, weight: Tensor) -> Tensor:
    if bool((weight == 1).all()):
        return x
    edge = x.shape[-1]
    if edge == 1:
        return torch.where(weight > 0, x, torch.zeros_like(x))
    half = (edge + 1) // 2
    coverage = F.adaptive_avg_pool2d(weight, half)
    mean = F.adaptive_avg_pool2d(x * weight, half) / coverage.clamp_min(1e-12)
    coarse = _pull_push(mean, (coverage > 0).to(x))
    return weight * x + (1 - weight) * F.interpolate(coarse, (edge, edge), mode="bilinear")


def resize(squares: Tensor, size: int) -> Tensor:
    """(B, 3, E, E) in [-1, 1] -> (B, 3, size, size), bicubic and antialiased; equal sizes are left alone."""
    if squares.shape[-1] == size:
        return squares
    return F.interpolate(squares, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
