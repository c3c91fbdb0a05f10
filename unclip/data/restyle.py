"""Known pictures in other styles, so that a CLIP trained on drawings recognises what comes from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.config_data import Style
from unclip.data.augment import warp

SHIFT, SMALLEST = 0.06, 0.7  # of the edge
TURN = math.radians(35)  # largest rotation
BLUR = 0.03  # largest standard deviation of the blur, of the edge
GRAIN = 0.04  # largest standard deviation of the noise, of the range of light
_LUMA = (0.299, 0.587, 0.114)  # Rec. 601
_ORDERS = tuple(permutations(range(3)))  # of the channels


def restyle_batch(
    images: Tensor,
    rngs: list[np.random.Generator],
    shares: Sequence[float],
    weights: Mapping[Style, float] | None = None,
) -> Tensor:
    """Give pictures (B, 3, H, W) in [-1, 1] another place, size and style; `shares` are the chances of each to be
    changed, `weights` how often each of STYLES is taken, relative to 1 for those not named.

    Every picture draws from its own generator, so that the result does not depend on the batch it is in.
    """
    result = images.clone()
    reach = np.cumsum([(weights or {}).get(name, 1.0) for name in STYLES])
    styles = tuple(STYLES.values())
    for index, (rng, share) in enumerate(zip(rngs, shares, strict=True)):
        if rng.random() < share:
            style = styles[int(np.searchsorted(reach, rng.random() * reach[-1], side="right"))]
            result[index] = style(_placed((images[index] + 1) / 2, rng), rng).clamp(0, 1) * 2 - 1
    return result


def hue(light: Tensor, rng: np.random.Generator) -> Tensor:
    """Colours of (3, H, W) turned around the grey axis by any angle (Rodrigues' rotation), paler or stronger."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.2)
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * sin + torch.eye(3) * cos
    grey = light.mean(0, keepdim=True)
    return grey + strength * torch.einsum("ij,jhw->ihw", across, light - grey)


def palette(light: Tensor, rng: np.random.Generator) -> Tensor:
    """Other colours on tinted paper: the channels of (3, H, W) become a mixture of two orders of them, paler or
    stronger, and darker or lighter. Grey stays grey but for the tint.
    """
    first, second = (light[list(_ORDERS[int(rng.integers(len(_ORDERS)))])] for _ in range(2))
    share, strength = float(rng.random()), float(rng.uniform(0.6, 1.2))
    mixed = first + share * (second - first)
    grey = mixed.mean(0, keepdim=True)
    toned = (grey + strength * (mixed - grey)).clamp(0, 1) ** math.exp(rng.uniform(-0.4, 0.4))
    return toned * light.new_tensor(rng.uniform(0.85, 1, 3)).view(3, 1, 1)


def contours(light: Tensor, rng: np.random.Generator) -> Tensor:
    """Dark lines where the brightness of (3, H, W) changes, fine or thick, hard or soft, on white."""
    luma = (light * light.new_tensor(_LUMA).view(3, 1, 1)).sum(0)
    down, across = torch.gradient(luma)
    ink = (float(rng.uniform(2, 6)) * (down.square() + across.square()).sqrt()).clamp(0, 1)[None]
    if rng.random() < 0.6:
        ink = F.max_pool2d(ink, 3, stride=1, padding=1)
    if rng.random() < 0.6:
        ink = _blur(ink, float(rng.uniform(0.3, 0.9)))
    return (1 - float(rng.uniform(0.7, 1)) * ink).expand_as(light)


def fine_lines(light: Tensor, rng: np.random.Generator) -> Tensor:
    """Lines of a pixel or two where any colour of (3, H, W) changes, as of a pen on white."""
    framed = F.pad(light[None], (0, 1, 0, 1), mode="replicate")[0]
    down = framed[:, 1:, :-1] - light
    across = framed[:, :-1, 1:] - light
    ink = (down.square() + across.square()).sqrt().amax(0)
    ink = (float(rng.uniform(1.2, 4)) * (ink - float(rng.uniform(0, 0.08)))).clamp(0, 1)[None]
    if rng.random() < 0.4:
        ink = _blur(ink, float(rng.uniform(0.3, 0.6)))
    pen = light.new_tensor(rng.uniform(0, 0.3, 3)).view(3, 1, 1)
    return 1 - ink * (1 - pen)


def turned(light: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) rotated by up to TURN."""
    return warp(light[None], light.new_tensor([[0, 0, 1, rng.uniform(-TURN, TURN)]]))[0]


def blurred(light: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) out of focus: a Gaussian blur."""
    return _blur(light, max(0.3, float(rng.uniform(0.2, 1)) * BLUR * light.shape[1]))


def lit(light: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) under a coloured light that fades to one side, with grain."""
    height, width = light.shape[1:]
    side, fall = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.5)
    down, across = torch.meshgrid(torch.linspace(-0.5, 0.5, height), torch.linspace(-0.5, 0.5, width), indexing="ij")
    fade = 1 + float(fall) * (math.cos(side) * across + math.sin(side) * down)
    colour = light.new_tensor(rng.uniform(0.6, 1, 3)).view(3, 1, 1)
    grain = torch.from_numpy(rng.normal(0, GRAIN * rng.random(), light.shape)).to(light)
    return light * colour * fade + grain


def _placed(light: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) somewhat smaller, and not quite in the middle."""
    return warp(light[None], light.new_tensor([[*rng.uniform(-SHIFT, SHIFT, 2), rng.uniform(SMALLEST, 1), 0]]))[0]


def _blur(values: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of (C, H, W), sigma in pixels."""
    radius = math.ceil(2.5 * sigma)
    weights = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(len(values), 1, 1, -1)
    padded = F.pad(values[None], (radius,) * 4, mode="replicate")
    across = F.conv2d(padded, weights, groups=len(values))
    return F.conv2d(across, weights.transpose(2, 3), groups=len(values))[0]


STYLES: dict[Style, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "hue": hue,
    "palette": palette,
    "contours": contours,
    "fine_lines": fine_lines,
    "turned": turned,
    "blurred": blurred,
    "lit": lit,
}
