"""Masks of what to repaint, as people paint them: white (1) = repaint, black (0) = keep, grey = blend.

This polarity holds for everything that is handed in, in files and in Python. `decoder.inpainting` turns it round for
the networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unclip.data.images import decode_raw, to_rgb
from unclip.errors import UsageError

Channel = Literal["brightness", "alpha"]
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def read_mask(source: Any, channel: Channel = "brightness", invert: bool = False) -> Tensor:
    """A mask file, PIL image, array or tensor -> (H, W) float32 in [0, 1], 1 = repaint.

    Pictures of any mode are read. `brightness`: how bright a pixel is, what is transparent counting as black, so that
    white strokes on an empty layer are a mask. `alpha`: how transparent it is, so that a picture with a hole erased
    into it is a mask of the hole. Arrays and tensors, (H, W) or (1, H, W), are taken as they are: booleans, or
    numbers in [0, 1]. `invert` swaps repaint and keep.
    Raises ImageError: a file that is none; UsageError: no transparency where `alpha` asks for it, another shape,
    values outside [0, 1].
    """
    if channel not in ("brightness", "alpha"):
        raise UsageError(f"unknown mask channel {channel!r}; known: brightness, alpha")
    if isinstance(source, (str, Path)):
        name = f"the mask {source}"
        values = _pixels(decode_raw(Path(source).expanduser(), str(source)), channel, name)
    elif isinstance(source, Image.Image):
        values = _pixels(source, channel, "the mask")
    elif isinstance(source, (Tensor, np.ndarray)):
        values = _numbers(source if isinstance(source, Tensor) else torch.from_numpy(np.asarray(source)))
    else:
        raise UsageError(f"a mask of type {type(source).__name__}; expected a path, a PIL image, an array or a tensor")
    return 1 - values if invert else values


def _pixels(image: Image.Image, channel: Channel, name: str) -> Tensor:
    has_alpha = image.mode in _ALPHA or "transparency" in image.info
    if channel == "alpha":
        if not has_alpha:
            raise UsageError(
                f"{name} has no transparency (its mode is {image.mode}); take its brightness, or a picture with an "
                "alpha channel"
            )
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        return torch.from_numpy(255.0 - alpha).float() / 255
    if has_alpha:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    return torch.from_numpy(np.array(to_rgb(image).convert("L"))).float() / 255


def _numbers(values: Tensor) -> Tensor:
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or not values.numel():
        raise UsageError(f"a mask of shape {tuple(values.shape)}; expected (H, W) or (1, H, W)")
    whole = values.dtype != torch.bool and not values.is_floating_point()
    numbers = values.detach().float().cpu()
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):  # NaN too
        hint = "; divide 8-bit values by 255" if whole else ""
        raise UsageError(f"a mask with values outside 0 (keep) to 1 (repaint){hint}")
    return numbers.clone()


def check_mask(mask: Tensor, width: int, height: int) -> Tensor:
    """The mask, if it fits a picture of that size and leaves both something to repaint and something to keep.

    UsageError: another size; black everywhere; white everywhere.
    """
    if mask.shape != (height, width):
        raise UsageError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} pixels, the picture {width}x{height}; expected the same size"
        )
    if not bool((mask > 0).any()):
        raise UsageError("the mask is black everywhere, so that nothing is to be repainted; white means repaint")
    if bool((mask == 1).all()):
        raise UsageError(
            "the mask is white everywhere, so that nothing of the picture is kept; white means repaint: mark less, or "
            "draw a new picture with sample"
        )
    return mask


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """(H, W) -> (H, W): what is to be repainted grows by a disc of radius `pixels`, grey values with it."""
    if pixels < 0:
        raise UsageError(f"dilate is {pixels}, expected 0 pixels or more")
    if not pixels or not bool((mask > 0).any()):
        return mask
    whole, area = mask.clone(), _around(mask, pixels)
    mask = mask[area]
    height, width = mask.shape
    result = whole[area]  # nothing grows further
    for dy in range(-min(pixels, height - 1), min(pixels, height - 1) + 1):
        reach = min(int((pixels**2 - dy**2) ** 0.5), width - 1)
        rows = mask[max(dy, 0) : height + min(dy, 0)]
        spread = F.max_pool1d(rows[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]
        target = result[max(-dy, 0) : height - max(dy, 0)]
        torch.maximum(target, spread, out=target)
    return whole


def feather(mask: Tensor, pixels: int) -> Tensor:
    """(H, W) -> (H, W): a ramp `pixels` wide along the inside of what is to be repainted.

    What was to be kept stays so. A pixel's value becomes the mean of the smallest values within 0, 1, … `pixels` steps
    of it, steps alternately to four and to eight neighbours; so it rises from 1/(pixels + 1) beside what is kept.
    The picture's own border makes no ramp. A stroke thinner than twice the ramp stays grey in its middle.
    """
    if pixels < 0:
        raise UsageError(f"feather is {pixels}, expected 0 pixels or more")
    if not pixels or not bool((mask > 0).any()):
        return mask
    whole, area = mask.clone(), _around(mask, 1)  # with what is kept beside it, where the ramp begins
    keep, total = -mask[area][None, None], whole[area]
    for step in range(pixels):
        if step % 2:
            keep = F.max_pool2d(keep, 3, stride=1, padding=1)
        else:
            down, across = F.max_pool2d(keep, (3, 1), 1, (1, 0)), F.max_pool2d(keep, (1, 3), 1, (0, 1))
            keep = torch.maximum(down, across)
        total -= keep[0, 0]
    total /= pixels + 1
    return whole


def _around(mask: Tensor, pixels: int) -> tuple[slice, slice]:
    """Rows and columns of the box around everything that is not kept, and of so many pixels beside it."""
    left, top, right, bottom = mask_box(mask)
    return slice(max(top - pixels, 0), bottom + pixels), slice(max(left - pixels, 0), right + pixels)


def mask_box(mask: Tensor) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around everything that is not kept, in pixels, ends excluded."""
    rows = (mask > 0).any(dim=1).nonzero()[:, 0]
    columns = (mask > 0).any(dim=0).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def repainted_cells(mask: Tensor, size: int) -> Tensor:
    """A square mask (E, E) -> (1, 1, size, size) of 0 and 1: the cells that touch anything to be repainted.

    A network at a low resolution must not be told that a cell is known when a part of it is not.
    """
    square = mask[None, None]
    larger = size >= len(mask)
    touched = F.interpolate(square, (size, size), mode="bilinear") if larger else F.adaptive_max_pool2d(square, size)
    return (touched > 0).float()
