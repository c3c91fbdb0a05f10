"""Known pictures in other styles, so that a CLIP trained on drawings recognises what comes from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.data.augment import warp

TURN = math.radians(35)  # largest rotation
BLUR = 0.03  # largest standard deviation of the blur, of the edge
GRAIN = 0.04  # largest standard deviation of the noise, of the range of light
_LUMA = (0.299, 0.587, 0.114)  # Rec. 601


def restyle_batch(images: Tensor, rngs: list[np.random.Generator], share: float) -> Tensor:
    """Give the expected `share` of (B, 3, H, W) in [-1, 1] another style, each of STYLES as often.

    Every picture draws from its own generator, so that the result does not depend on the batch it is in.
    """
    result = images.clone()
    for index, rng in enumerate(rngs):
        if rng.random() < share:
            style = STYLES[int(rng.integers(len(STYLES)))]
            result[index] = style((images[index] + 1) / 2, rng).clamp(0, 1) * 2 - 1
    return result


def hue(light: Tensor, rng: np.random.Generator) -> Tensor:
    """Colours of (3, H, W) turned around the grey axis by any angle (Rodrigues' rotation), paler or stronger."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.2)
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * sin + torch.eye(3) * cos
    grey = light.mean(0, keepdim=True)
    return grey + strength * torch.einsum("ij,jhw->ihw", across, light - grey)


def contours(light: Tensor, rng: np.random.Generator) -> Tensor:
    """Dark lines where the brightness of (3, H, W) changes, on white."""
    luma = (light * light.new_tensor(_LUMA).view(3, 1, 1)).sum(0)
    down, across = torch.gradient(luma)
    ink = (float(rng.uniform(2, 6)) * (down.square() + across.square()).sqrt()).clamp(0, 1)
    return (1 - float(rng.uniform(0.7, 1)) * ink).expand_as(light)


def turned(light: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) rotated by up to TURN and made smaller."""
    parameters = light.new_tensor([[0, 0, rng.uniform(0.7, 1), rng.uniform(-TURN, TURN)]])
    return warp(light[None], parameters)[0]


def blurred(light: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) out of focus: a Gaussian blur."""
    sigma = max(0.3, float(rng.uniform(0.2, 1)) * BLUR * light.shape[1])
    radius = math.ceil(2.5 * sigma)
    weights = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(light[None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights, groups=3), weights.transpose(2, 3), groups=3)[0]


def lit(light: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) under a coloured light that fades to one side, with grain, smaller than it was."""
    small = warp(light[None], light.new_tensor([[*rng.uniform(-0.06, 0.06, 2), rng.uniform(0.7, 1), 0]]))[0]
    height, width = light.shape[1:]
    side, fall = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.5)
    down, across = torch.meshgrid(torch.linspace(-0.5, 0.5, height), torch.linspace(-0.5, 0.5, width), indexing="ij")
    fade = 1 + float(fall) * (math.cos(side) * across + math.sin(side) * down)
    colour = light.new_tensor(rng.uniform(0.6, 1, 3)).view(3, 1, 1)
    grain = torch.from_numpy(rng.normal(0, GRAIN * rng.random(), light.shape)).to(light)
    return small * colour * fade + grain


STYLES: tuple[Callable[[Tensor, np.random.Generator], Tensor], ...] = (hue, contours, turned, blurred, lit)
