"""BSRGAN's degradation: from a sharp high-resolution image to a damaged low-resolution one (Zhang et al. 2021, §3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from upsamplers.camera import random_camera
from upsamplers.corruption_config import BSRGANConfig
from upsamplers.filters import (
    between,
    filter_image,
    gaussian_kernel,
    normal,
    random_jpeg,
    uniform,
    whole_between,
)

_DECIMATION_KERNEL = 25


class Scale(NamedTuple):
    """What the operations must know of the reduction: the factor still to go and the final size (h, w)."""

    factor: int
    size: tuple[int, int]


def degrade_seeded(images: Tensor, factor: int, config: BSRGANConfig, seeds: Sequence[int]) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, H/factor, W/factor), one seed an image; H and W divisible by the factor."""
    pairs = zip(images.split(1), seeds, strict=True)
    return torch.cat([degrade(image, factor, config, torch.Generator().manual_seed(seed)) for image, seed in pairs])


def degrade(image: Tensor, factor: int, config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    """One image (1, 3, H, W) -> (1, 3, H/factor, W/factor) in [-1, 1]."""
    scale = Scale(factor, (image.shape[2] // factor, image.shape[3] // factor))
    if factor > 2 and factor % 2 == 0 and uniform(generator) < config.halve_first:
        image = resize(image, (image.shape[2] // 2, image.shape[3] // 2), config, generator)
        scale = scale._replace(factor=factor // 2)
    for name in draw_order(generator):
        image = OPERATIONS[name](image, scale, config, generator).clamp(-1, 1)
    if uniform(generator) < config.final_jpeg_probability:
        image = random_jpeg(image, config.jpeg_quality, generator)
    return image


def draw_order(generator: torch.Generator) -> list[str]:
    """All operations in random order, uniform over those orders that have `resize` before `reduce`."""
    names = list(OPERATIONS)
    order = [names[i] for i in torch.randperm(len(names), generator=generator, device=generator.device).tolist()]
    first, second = sorted((order.index("resize"), order.index("reduce")))
    order[first], order[second] = "resize", "reduce"
    return order


def resize(image: Tensor, size: tuple[int, int], config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    """To `size` with one of the configured kernels; without antialiasing, whose lack is part of the damage."""
    mode = config.kernels[whole_between((0, len(config.kernels) - 1), generator)]
    return F.interpolate(image, size=size, mode="nearest-exact" if mode == "nearest" else mode)


def decimate(image: Tensor, factor: int, sigma: float) -> Tensor:
    """Blur and keep every factor-th pixel; the kernel is moved so that the picture does not shift."""
    kernel = gaussian_kernel(_DECIMATION_KERNEL, sigma, sigma, centre=(factor - 1) / 2)
    return filter_image(image, kernel, stride=factor)


def _blur(image: Tensor, scale: Scale, config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    smallest, largest = config.kernel_sizes
    size = smallest + 2 * whole_between((0, (largest - smallest) // 2), generator)
    if uniform(generator) < config.anisotropic:
        axes = [math.sqrt(between(config.blur_variance, generator)) for _ in range(2)]
        return filter_image(image, gaussian_kernel(size, axes[0], axes[1], math.pi * uniform(generator)))
    sigma = between(config.blur_sigma, generator)
    return filter_image(image, gaussian_kernel(size, sigma, sigma))


def _resize(image: Tensor, scale: Scale, config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    """Usually to a random size; else blurred and decimated by the whole factor."""
    height, width = image.shape[-2:]
    if uniform(generator) >= config.resize_probability:
        return decimate(image, scale.factor, between((0.1, 0.6 * scale.factor), generator))
    shrink = between((config.shrink[0], config.shrink[1] * scale.factor), generator)
    return resize(image, (max(1, round(height / shrink)), max(1, round(width / shrink))), config, generator)


def _reduce(image: Tensor, scale: Scale, config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    return resize(image, scale.size, config, generator)


def _noise(image: Tensor, scale: Scale, config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    """White Gaussian noise: independent in the channels, the same in all, or with a random covariance of them."""
    sigma = between(config.noise_sigma, generator) / 127.5  # 8-bit levels to the range [-1, 1]
    batch, channels, height, width = image.shape
    kind, (colour, grey, _) = uniform(generator), config.noise_shares
    if kind < colour:
        return image + sigma * normal((batch, channels, height, width), image, generator)
    if kind < colour + grey:
        return image + sigma * normal((batch, 1, height, width), image, generator)
    mixing = random_mixing(channels, generator).to(image)
    noise = normal((batch, channels, height, width), image, generator)
    return image + sigma * torch.einsum("ij,bjhw->bihw", mixing, noise)


def random_mixing(channels: int, generator: torch.Generator) -> Tensor:
    """M (C, C) float64 whose M Mᵀ = Q D Qᵀ: a random rotation of eigenvalues uniform in [0, 1)."""
    eigenvalues = torch.rand(channels, generator=generator, device=generator.device, dtype=torch.float64)
    square = torch.randn(channels, channels, generator=generator, device=generator.device, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(square)
    return rotation * eigenvalues.sqrt()


def _jpeg(image: Tensor, scale: Scale, config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    if uniform(generator) >= config.jpeg_probability:
        return image
    return random_jpeg(image, config.jpeg_quality, generator)


def _camera(image: Tensor, scale: Scale, config: BSRGANConfig, generator: torch.Generator) -> Tensor:
    if uniform(generator) >= config.camera_probability:
        return image
    return random_camera(image, config.camera, generator)


Operation = Callable[[Tensor, Scale, BSRGANConfig, torch.Generator], Tensor]
OPERATIONS: dict[str, Operation] = {
    "blur": _blur,
    "second_blur": _blur,
    "resize": _resize,
    "reduce": _reduce,
    "noise": _noise,
    "jpeg": _jpeg,
    "camera": _camera,
}
