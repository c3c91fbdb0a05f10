"""Corruptions of the low-resolution condition in training (unCLIP, App. C).

They hide from the upsampler how its condition differs from a decoder's picture. Images are (B, 3, h, w) in [-1, 1].
Every image has a seed of its own, so that its corruption does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from upsamplers.corruption_config import BlurConfig, BSRConfig, NoCorruptionConfig
from upsamplers.filters import (
    between,
    filter_image,
    gaussian_kernel,
    normal,
    random_jpeg,
    uniform,
)

_INTERPOLATIONS = ("area", "bilinear", "bicubic")


def draw_seeds(count: int, generator: torch.Generator) -> list[int]:
    """A seed for each image of a batch."""
    seeds = torch.randint(0, 2**63 - 1, (count,), generator=generator, device=generator.device)
    return [int(seed) for seed in seeds.tolist()]


def corrupt(
    images: Tensor, config: NoCorruptionConfig | BlurConfig | BSRConfig, generator: torch.Generator
) -> Tensor:
    """Corrupt each image (B, 3, h, w) with the configured kind and probability; the others pass unchanged."""
    if isinstance(config, NoCorruptionConfig):
        return images
    return corrupt_seeded(images, config, draw_seeds(len(images), generator))


def corrupt_seeded(images: Tensor, config: BlurConfig | BSRConfig, seeds: Sequence[int]) -> Tensor:
    """As `corrupt`, with one seed an image: a seed gives the same corruption in any batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    chosen = [uniform(generator) < config.probability for generator in generators]
    if isinstance(config, BlurConfig):
        blurred = gaussian_blur(images, config.kernel_size, config.sigma)
        return torch.where(torch.tensor(chosen, device=images.device)[:, None, None, None], blurred, images)
    return torch.cat([
        bsr(image, config, generator) if hit else image
        for image, generator, hit in zip(images.split(1), generators, chosen, strict=True)
    ])  # fmt: skip


def gaussian_blur(images: Tensor, kernel_size: int = 3, sigma: float = 0.6) -> Tensor:
    """Isotropic blur with edge pixels repeated outside; defaults of unCLIP, App. C."""
    return filter_image(images, gaussian_kernel(kernel_size, sigma, sigma))


def draw_order(generator: torch.Generator) -> list[str]:
    """The names of BSR's operations in a uniformly random order."""
    names = list(OPERATIONS)
    order = torch.randperm(len(names), generator=generator, device=generator.device)
    return [names[i] for i in order.tolist()]


def bsr(images: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    """Blur, resize, noise and JPEG in an order drawn for each image (after Zhang et al. 2021, §3; "BSRGAN")."""
    results = []
    for image in images.split(1):
        for name in draw_order(generator):
            image = OPERATIONS[name](image, config, generator).clamp(-1, 1)
        results.append(image)
    return torch.cat(results)


def _random_blur(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    sigma = between(config.blur_sigma, generator)
    if uniform(generator) < config.isotropic:
        return filter_image(image, gaussian_kernel(config.kernel_size, sigma, sigma))
    other = between(config.blur_sigma, generator)
    angle = math.pi * uniform(generator)
    return filter_image(image, gaussian_kernel(config.kernel_size, sigma, other, angle))


def _random_resize(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    """To a random size and back, each with an interpolation of its own."""
    height, width = image.shape[-2:]
    scale = between(config.resize_scale, generator)
    middle = (max(1, round(height * scale)), max(1, round(width * scale)))
    for size in (middle, (height, width)):
        mode = _INTERPOLATIONS[int(uniform(generator) * len(_INTERPOLATIONS))]
        image = F.interpolate(image, size=size, mode=mode, antialias=mode != "area")
    return image


def _random_noise(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    sigma = between(config.noise_sigma, generator) / 127.5  # 8-bit levels to the range [-1, 1]
    return image + sigma * normal(tuple(image.shape), image, generator)


def _random_jpeg(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    return random_jpeg(image, config.jpeg_quality, generator)


Operation = Callable[[Tensor, BSRConfig, torch.Generator], Tensor]
OPERATIONS: dict[str, Operation] = {
    "blur": _random_blur,
    "resize": _random_resize,
    "noise": _random_noise,
    "jpeg": _random_jpeg,
}
