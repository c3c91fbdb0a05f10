"""Building blocks of the corruptions: Gaussian kernels, filtering, JPEG, and numbers from explicit generators.

Images are (B, 3, h, w) in [-1, 1].
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unclip.data.images import to_pil


def gaussian_kernel(
    kernel_size: int, sigma_x: float, sigma_y: float, angle: float = 0.0, centre: float = 0.0
) -> Tensor:
    """(k, k) samples of a Gaussian with axes rotated by `angle` (radians), normalised to sum 1; float32.

    `centre` moves the Gaussian right and down by so many pixels from the middle of the kernel.
    """
    offsets = torch.arange(kernel_size, dtype=torch.float64) - (kernel_size - 1) / 2 - centre
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    exponent = -0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2)
    kernel = torch.exp(exponent - exponent.max())  # a narrow Gaussian between two pixels must not vanish
    return (kernel / kernel.sum()).float()


def filter_image(images: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Filter each channel with a (k, k) kernel, edge pixels repeated outside; keep every `stride`-th pixel."""
    channels, margin = images.shape[1], len(kernel) // 2
    weight = kernel.to(images).expand(channels, 1, -1, -1)
    padded = F.pad(images, (margin, margin, margin, margin), mode="replicate")
    return F.conv2d(padded, weight, stride=stride, groups=channels)


def random_jpeg(image: Tensor, quality: tuple[int, int], generator: torch.Generator) -> Tensor:
    """One image (1, 3, h, w) through JPEG at a quality drawn from first to last, both included."""
    file = io.BytesIO()
    to_pil(image[0]).save(file, format="JPEG", quality=whole_between(quality, generator))
    with Image.open(file) as decoded:
        pixels = torch.from_numpy(np.array(decoded.convert("RGB")))  # (h, w, 3)
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(image)


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of that shape, on `like`'s device and in its dtype."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like)


def uniform(generator: torch.Generator) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=generator, device=generator.device, dtype=torch.float64))


def between(bounds: tuple[float, float], generator: torch.Generator) -> float:
    """One number, uniform between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * uniform(generator)


def whole_between(bounds: tuple[int, int], generator: torch.Generator) -> int:
    """One integer, uniform from first to last, both included."""
    return bounds[0] + int(uniform(generator) * (bounds[1] - bounds[0] + 1))
