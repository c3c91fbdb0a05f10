"""Random changes of a picture, drawn from the sample's own generator, so that a resumed run repeats them."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY = 0.8  # of changing a picture at all, so that the plain picture is learnt as well
MAX_SHIFT = 0.08  # of the edge
SCALE = (0.8, 1.1)
MAX_ROTATION = math.radians(10)
COLOUR_JITTER = 0.15


def random_crop(image: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Cut a square of `size` pixels out of (3, H, W), all offsets equally likely. Returns a view."""
    top = int(rng.integers(image.shape[1] - size + 1))
    left = int(rng.integers(image.shape[2] - size + 1))
    return _square(image, top, left, size)


def _square(image: Tensor, top: int, left: int, size: int) -> Tensor:
    return image[:, top : top + size, left : left + size]


def random_paired_crop(
    image: Tensor, low: Tensor, size: int, factor: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Cut a square of `size` pixels, a multiple of `factor`, out of (3, H, W) and the same out of the picture
    `factor` times smaller, (3, H/factor, W/factor); all whole pixels of the smaller equally likely. Returns views.
    """
    small = size // factor
    top = int(rng.integers(low.shape[1] - small + 1))
    left = int(rng.integers(low.shape[2] - small + 1))
    return _square(image, factor * top, factor * left, size), _square(low, top, left, small)


def random_flip(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror (3, H, W) left to right with probability one half."""
    return image.flip(2) if rng.random() < 0.5 else image


def augment_batch(images: Tensor, rngs: list[np.random.Generator]) -> Tensor:
    """Shift, scale, rotate and jitter the colours of (B, 3, H, W) in [-1, 1]; one generator a picture.

    What comes into view from outside has the colour of the picture's top left pixel.
    """
    draws = [_draw(rng) for rng in rngs]
    chosen = [index for index, draw in enumerate(draws) if draw is not None]
    if not chosen:
        return images
    parameters = torch.tensor([draws[index] for index in chosen], dtype=torch.float32)  # (C, 7)
    result = images.clone()
    result[chosen] = _jitter(warp(images[chosen], parameters[:, :4]), parameters[:, 4:])
    return result


def _draw(rng: np.random.Generator) -> list[float] | None:
    """Shift x, shift y, scale, angle, brightness, contrast, saturation; None leaves the picture as it is."""
    if rng.random() >= PROBABILITY:
        return None
    shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
    colour = rng.uniform(1 - COLOUR_JITTER, 1 + COLOUR_JITTER, 3)
    return [*shift, rng.uniform(*SCALE), rng.uniform(-MAX_ROTATION, MAX_ROTATION), *colour]


def warp(images: Tensor, parameters: Tensor) -> Tensor:
    """Similarity transform of (C, 3, H, W) by (C, 4): shift x, shift y (of the edge), scale, angle."""
    shift_x, shift_y, scale, angle = parameters.unbind(1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # affine_grid maps output to input positions: p_in = R(-angle) / scale · (p_out - shift), in half edges.
    x, y = 2 * shift_x, 2 * shift_y
    rows = [torch.stack([cos, sin, -cos * x - sin * y], 1), torch.stack([-sin, cos, sin * x - cos * y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (C, H, W, 2)
    corner = images[:, :, :1, :1]
    # Zero padding of the difference to the corner's colour is padding with the corner's colour.
    return F.grid_sample(images - corner, grid, mode="bilinear", align_corners=False) + corner


def _jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply brightness, contrast and saturation of (C, 3, H, W) in [-1, 1] by (C, 3)."""
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    light = (images + 1) / 2 * brightness
    mean = light.mean((1, 2, 3), keepdim=True)
    light = mean + (light - mean) * contrast
    grey = (light * light.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(
        1, keepdim=True
    )  # Rec. 601 luma
    light = grey + (light - grey) * saturation
    return light.clamp(0, 1) * 2 - 1
