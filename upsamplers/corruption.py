"""Corruptions of the low-resolution condition in training (unCLIP, App. C).

They hide from the upsampler how its condition differs from a decoder's picture. All take and return
(B, 3, h, w) in [-1, 1] of the same size, and every random choice comes from an explicit generator.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unclip.data.images import to_pil
from upsamplers.config import BlurConfig, BSRConfig, NoCorruptionConfig

_INTERPOLATIONS = ("area", "bilinear", "bicubic")


def corrupt(
    images: Tensor, config: NoCorruptionConfig | BlurConfig | BSRConfig, generator: torch.Generator
) -> Tensor:
    """Corrupt each image (B, 3, h, w) with the configured kind and probability; the others pass unchanged."""
    if isinstance(config, NoCorruptionConfig):
        return images
    chosen = torch.rand(len(images), generator=generator, device=generator.device) < config.probability
    chosen = chosen.to(images.device)
    if not bool(chosen.any()):
        return images
    result = images.clone()
    if isinstance(config, BlurConfig):
        result[chosen] = gaussian_blur(images[chosen], config.kernel_size, config.sigma)
    else:
        result[chosen] = bsr(images[chosen], config, generator)
    return result


def gaussian_kernel(kernel_size: int, sigma_x: float, sigma_y: float, angle: float = 0.0) -> Tensor:
    """(k, k) samples of a Gaussian with axes rotated by `angle` (radians), normalised to sum 1; float32."""
    offsets = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) / 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    kernel = torch.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return (kernel / kernel.sum()).float()


def gaussian_blur(images: Tensor, kernel_size: int = 3, sigma: float = 0.6) -> Tensor:
    """Isotropic blur with edge pixels repeated outside; defaults of unCLIP, App. C."""
    return _filter(images, gaussian_kernel(kernel_size, sigma, sigma))


def draw_order(generator: torch.Generator) -> list[str]:
    """The names of BSR's operations in a uniformly random order."""
    names = list(OPERATIONS)
    order = torch.randperm(len(names), generator=generator, device=generator.device)
    return [names[i] for i in order.tolist()]


def bsr(images: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    """Blur, resize, noise and JPEG in an order drawn for each image (Zhang et al. 2021, §3; "BSRGAN")."""
    results = []
    for image in images.split(1):
        for name in draw_order(generator):
            image = OPERATIONS[name](image, config, generator).clamp(-1, 1)
        results.append(image)
    return torch.cat(results)


def _random_blur(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    sigma = _between(config.blur_sigma, generator)
    if _uniform(generator) < config.isotropic:
        return _filter(image, gaussian_kernel(config.kernel_size, sigma, sigma))
    other = _between(config.blur_sigma, generator)
    angle = math.pi * _uniform(generator)
    return _filter(image, gaussian_kernel(config.kernel_size, sigma, other, angle))


def _random_resize(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    """To a random size and back, each with an interpolation of its own."""
    height, width = image.shape[-2:]
    scale = _between(config.resize_scale, generator)
    middle = (max(1, round(height * scale)), max(1, round(width * scale)))
    for size in (middle, (height, width)):
        mode = _INTERPOLATIONS[int(_uniform(generator) * len(_INTERPOLATIONS))]
        image = F.interpolate(image, size=size, mode=mode, antialias=mode != "area")
    return image


def _random_noise(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    sigma = _between(config.noise_sigma, generator) / 127.5  # 8-bit levels to the range [-1, 1]
    noise = torch.randn(image.shape, generator=generator, device=generator.device).to(image)
    return image + sigma * noise


def _random_jpeg(image: Tensor, config: BSRConfig, generator: torch.Generator) -> Tensor:
    low, high = config.jpeg_quality
    quality = low + int(_uniform(generator) * (high - low + 1))
    file = io.BytesIO()
    to_pil(image[0]).save(file, format="JPEG", quality=quality)
    with Image.open(file) as decoded:
        pixels = torch.from_numpy(np.array(decoded.convert("RGB")))  # (h, w, 3)
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(image)


Operation = Callable[[Tensor, BSRConfig, torch.Generator], Tensor]
OPERATIONS: dict[str, Operation] = {
    "blur": _random_blur,
    "resize": _random_resize,
    "noise": _random_noise,
    "jpeg": _random_jpeg,
}


def _filter(images: Tensor, kernel: Tensor) -> Tensor:
    channels, margin = images.shape[1], len(kernel) // 2
    weight = kernel.to(images).expand(channels, 1, -1, -1)
    padded = F.pad(images, (margin, margin, margin, margin), mode="replicate")
    return F.conv2d(padded, weight, groups=channels)


def _uniform(generator: torch.Generator) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=generator, device=generator.device, dtype=torch.float64))


def _between(bounds: tuple[float, float], generator: torch.Generator) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * _uniform(generator)
