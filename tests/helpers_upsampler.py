"""Scenes and networks for the tests of the upsamplers."""

from __future__ import annotations

import torch
from torch import Tensor

from unclip.config import DataConfig
from unclip.data import build_batches
from upsamplers.config import UpsamplerConfig
from upsamplers.network import Upsampler


def scenes(count: int, size: int) -> Tensor:
    """Synthetic pictures (count, 3, size, size) in [-1, 1]."""
    batches = build_batches(DataConfig(image_size=size), batch_size=count)
    return next(batches)["image"]


def randomised(config: UpsamplerConfig) -> Upsampler:
    """A network whose zero-initialised layers are not zero, so that every input reaches the output."""
    torch.manual_seed(0)
    network = Upsampler(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()
