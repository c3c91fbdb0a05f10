"""Which parts of a picture are known, while an inpainting decoder trains and when it samples (GLIDE, §3.3).

Two conventions meet here. What people hand in is a *mask of what to repaint*: 1 = repaint, 0 = keep. What the network
sees is what is *known*: 1 = given, 0 = to be painted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion import Clip
from unclip.errors import UsageError

_BOXES = 4
_VERTICES = 8


def random_known(count: int, size: int, generator: torch.Generator, everything: float = 0.25) -> Tensor:
    """Training masks (B, 1, S, S) float, 1 = known. Half of the samples lose one to four boxes with edges of 1/8 to 5/8
    of the picture's, half the track of a brush 1/16 to 1/4 wide; a share `everything` of all loses the whole picture.
    """
    device = generator.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    axis = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([y, x], dim=-1).view(1, 1, size * size, 2)
    erased = torch.where(uniform(1) < 0.5, _boxes(pixels, uniform), _brush(pixels, uniform))
    erased |= uniform(1) < everything
    return (~erased).float().view(count, 1, size, size)


def _boxes(pixels: Tensor, uniform: Any) -> Tensor:
    """(B, pixels) bool: inside one of one to four boxes."""
    centre = uniform(_BOXES, 1, 2)
    half = uniform(_BOXES, 1, 2, low=1 / 16, high=5 / 16)
    drawn = torch.arange(_BOXES, device=pixels.device) < 1 + (uniform(1) * _BOXES).long()  # (B, boxes)
    inside = ((pixels - centre).abs() <= half).all(dim=-1)  # (B, boxes, pixels)
    return (inside & drawn[..., None]).any(dim=1)


def _brush(pixels: Tensor, uniform: Any) -> Tensor:
    """(B, pixels) bool: within the width of a brush that wanders in straight strokes."""
    angle = uniform(_VERTICES - 1, high=2 * math.pi)
    length = uniform(_VERTICES - 1, low=0.1, high=0.4)
    strokes = length[..., None] * torch.stack([angle.sin(), angle.cos()], dim=-1)
    track = torch.cat([uniform(1, 2), strokes], dim=1).cumsum(dim=1).clamp(0, 1)  # (B, vertices, 2)
    start, along = track[:, :-1, None], (track[:, 1:] - track[:, :-1])[:, :, None]  # (B, strokes, 1, 2)
    squared = along.square().sum(-1).clamp_min(1e-8)
    nearest = (((pixels - start) * along).sum(-1) / squared).clamp(0, 1)
    distance = (pixels - start - nearest[..., None] * along).norm(dim=-1)  # (B, strokes, pixels)
    return (distance <= uniform(1, 1, low=1 / 32, high=1 / 8)).any(dim=1)


def check_inpainting(image: Tensor, mask: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Image (3, S, S) or (B, 3, S, S) in [-1, 1] and mask (S, S), (1, S, S) or (B, 1, S, S), 1 = repaint, 0 = keep
    -> image (B, 3, S, S) and what is known (B, 1, S, S), 1 = given.

    Raises UsageError: shapes that do not fit the decoder or each other, a mask with values other than 0 and 1.
    """
    image = image[None] if image.ndim == 3 else image
    if image.shape[1:] != (3, size, size) or len(image) not in (1, count):
        raise UsageError(
            f"the image to inpaint has shape {tuple(image.shape)}; this decoder takes ({count}, 3, {size}, {size}), or "
            "one image for all samples"
        )
    while mask.ndim < 4:
        mask = mask[None]
    if mask.shape[1:] != (1, size, size) or len(mask) not in (1, count):
        raise UsageError(
            f"the inpainting mask has shape {tuple(mask.shape)}, the image is {size}x{size}; expected ({count}, 1, "
            f"{size}, {size}), or one mask for all samples"
        )
    mask = mask.float()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UsageError("the inpainting mask holds values other than 0 and 1; expected 1 = repaint, 0 = keep")
    return image.float().expand(count, -1, -1, -1), (1 - mask).expand(count, -1, -1, -1)


def keeping(known_image: Tensor, known: Tensor, clip: Clip | None) -> Clip:
    """A treatment of x̂_0 that, after `clip`, puts the known pixels in their places, so that they come out as given."""

    def keep(x_start: Tensor) -> Tensor:
        x_start = x_start if clip is None else clip(x_start)
        return torch.where(known.bool(), known_image.to(x_start.dtype), x_start)

    return keep
