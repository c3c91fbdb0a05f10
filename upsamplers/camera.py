"""Sensor noise of a simulated camera: a picture is taken back to raw light, exposed once more, and developed again.

After Brooks et al. 2019 ("Unprocessing Images for Learned Raw Denoising"), simplified: tone curve, sRGB curve, white
balance, Bayer mosaic, shot and read noise, demosaicking. There is no colour matrix, no lens and no in-camera denoising.
BSRGAN runs a pipeline of the same kind with the colour matrices and tone curves of measured cameras.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from upsamplers.corruption_config import CameraConfig
from upsamplers.filters import between, normal

# Interpolation at a Bayer sensor's places, divided by 8 (Malvar, He & Cutler 2004, Fig. 2).
_GREEN = ((0, 0, -1, 0, 0), (0, 0, 2, 0, 0), (-1, 2, 4, 2, -1), (0, 0, 2, 0, 0), (0, 0, -1, 0, 0))
_ALONG_ROW = ((0, 0, 0.5, 0, 0), (0, -1, 0, -1, 0), (-1, 4, 5, 4, -1), (0, -1, 0, -1, 0), (0, 0, 0.5, 0, 0))
_DIAGONAL = ((0, 0, -1.5, 0, 0), (0, 2, 0, 2, 0), (-1.5, 0, 6, 0, -1.5), (0, 2, 0, 2, 0), (0, 0, -1.5, 0, 0))


def random_camera(image: Tensor, config: CameraConfig, generator: torch.Generator) -> Tensor:
    """(1, 3, h, w) in [-1, 1], photographed by a camera whose noise and white balance are drawn."""
    gains = image.new_tensor([between(config.red_gain, generator), 1.0, between(config.blue_gain, generator)])
    gains = gains.view(1, 3, 1, 1)
    low, high = (math.log(bound) for bound in config.shot_noise)
    log_shot = between((low, high), generator)
    spread = float(torch.randn((), generator=generator, device=generator.device))
    log_read = 2.18 * log_shot + 1.2 + config.read_noise_spread * spread  # Brooks et al., eq. 4
    light = to_light(image) / gains
    shot, read = math.exp(log_shot), math.exp(log_read)
    if min(image.shape[-2:]) < 3:  # a mosaic needs more; each channel is exposed by itself
        return from_light(sensor_noise(light, shot, read, generator) * gains)
    # Balanced before it is interpolated: demosaicking expects the channels of grey things to be equal.
    balanced = sensor_noise(mosaic(light), shot, read, generator) * mosaic(gains.expand_as(light))
    return from_light(demosaic(balanced))


def sensor_noise(light: Tensor, shot: float, read: float, generator: torch.Generator) -> Tensor:
    """Poisson and Gaussian noise in the normal approximation: variance shot · light + read; light in [0, 1]."""
    deviation = (shot * light.clamp_min(0) + read).sqrt()
    return (light + deviation * normal(tuple(light.shape), light, generator)).clamp(0, 1)


def to_light(image: Tensor) -> Tensor:
    """Display values in [-1, 1] to linear light in [0, 1]: the tone curve 3x² − 2x³ and the sRGB curve undone."""
    value = ((image + 1) / 2).clamp(0, 1)
    value = 0.5 - torch.sin(torch.asin(1 - 2 * value) / 3)  # inverse of the smooth step
    return torch.where(value <= 0.04045, value / 12.92, ((value.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def from_light(light: Tensor) -> Tensor:
    """Linear light to display values in [-1, 1]; inverse of `to_light`."""
    light = light.clamp(0, 1)
    curved = 1.055 * light.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    value = torch.where(light <= 0.0031308, 12.92 * light, curved).clamp(0, 1)
    return 2 * (3 * value**2 - 2 * value**3) - 1


def mosaic(light: Tensor) -> Tensor:
    """(B, 3, h, w) to what a Bayer sensor (RGGB) sees: (B, 1, h, w)."""
    return (light * _bayer(light)).sum(1, keepdim=True)


def demosaic(raw: Tensor) -> Tensor:
    """A Bayer sensor's picture (B, 1, h, w), h and w at least 3, to (B, 3, h, w) (Malvar, He & Cutler 2004)."""
    along = torch.tensor(_ALONG_ROW)
    kernels = torch.stack([torch.tensor(_GREEN, dtype=along.dtype), along, along.T, torch.tensor(_DIAGONAL)])
    padded = F.pad(raw, (2, 2, 2, 2), mode="reflect")  # reflection keeps the colours of the mosaic in place
    green, row, column, diagonal = F.conv2d(padded, kernels[:, None].to(raw) / 8).split(1, dim=1)
    at_red, at_green, at_blue = _bayer(raw.expand(-1, 3, -1, -1)).split(1, dim=1)
    rows = torch.arange(raw.shape[2], device=raw.device).view(1, 1, -1, 1) % 2
    red_row, blue_row = (rows == 0).to(raw), (rows == 1).to(raw)
    red = at_red * raw + at_blue * diagonal + at_green * (red_row * row + blue_row * column)
    blue = at_blue * raw + at_red * diagonal + at_green * (blue_row * row + red_row * column)
    return torch.cat([red, at_green * raw + (1 - at_green) * green, blue], dim=1)


def _bayer(like: Tensor) -> Tensor:
    """(1, 3, h, w): 1 where the sensor sees that colour; red at even rows and columns, blue at odd ones."""
    row = torch.arange(like.shape[2], device=like.device).view(-1, 1) % 2
    column = torch.arange(like.shape[3], device=like.device).view(1, -1) % 2
    red, blue = (row == 0) & (column == 0), (row == 1) & (column == 1)
    return torch.stack([red, row != column, blue]).to(like)[None]
