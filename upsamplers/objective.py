"""The upsampler's training objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.diffusion import GaussianDiffusion
from unclip.diffusion.guidance import Network
from upsamplers.config import UpsamplerConfig
from upsamplers.corruption import corrupt


def upsampler_loss(
    network: Network,
    process: GaussianDiffusion,
    config: UpsamplerConfig,
    batch: Mapping[str, Any],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Losses of a batch, each (B,), `loss` being the one to minimise (unCLIP, App. C).

    `batch["image"]` (B, 3, S, S) in [-1, 1] are crops of high-resolution images, S divisible by the factor.
    The condition is made from them by an antialiased reduction and the configured corruption.
    """
    x_start: Tensor = batch["image"]
    low_res = corrupt(downsample(x_start, config), config.corruption, generator)
    t = process.sample_timesteps(len(x_start), generator).to(x_start.device)
    noise = torch.randn(x_start.shape, generator=generator, device=generator.device).to(x_start)
    x_t = process.q_sample(x_start, t, noise)
    return process.losses(network(x_t, t, low_res=low_res), x_start, x_t, t, noise)


def downsample(images: Tensor, config: UpsamplerConfig) -> Tensor:
    """(B, 3, H, W) → (B, 3, H/factor, W/factor), antialiased, in [-1, 1]; H and W divisible by the factor."""
    height, width = images.shape[-2:]
    size = (height // config.factor, width // config.factor)
    if config.downsample == "area":
        return F.interpolate(images, size=size, mode="area")
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
