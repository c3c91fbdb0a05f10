"""Noise conditioning augmentation: a condition that is noised by a known amount, which the network is told.

Between the stages of a cascade (Ho et al. 2022, §4; Imagen, §2.4) it is the low-resolution image, in Stable unCLIP the
image embedding. The receiving stage learns not to trust details finer than the noise, and so forgives the errors of the
stage before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from unclip.diffusion.process import GaussianDiffusion
from unclip.errors import UsageError


def noise_augment(x: Tensor, level: int | Tensor, noise: Tensor, process: GaussianDiffusion) -> tuple[Tensor, Tensor]:
    """x (B, …) noised to `level`, and the levels (B,) int64 to feed to the network.

    A level counts steps of `process`, one for all samples or (B,) integers: 0 leaves x as it is, l ≥ 1 gives
    sqrt(ᾱ_l) x + sqrt(1−ᾱ_l) ε with the papers' index l (table index l − 1). `noise` is standard normal, x's shape; x
    should have about unit variance, as the process's data have.
    Raises UsageError: a level outside 0 … T, or not one a sample.
    """
    levels = torch.as_tensor(level, dtype=torch.long, device=x.device)
    levels = levels.expand(len(x)) if levels.ndim == 0 else levels
    if levels.shape != (len(x),):
        raise UsageError(f"noise levels of shape {tuple(levels.shape)} for {len(x)} samples; expected one each")
    # On a GPU looking at the values would wait for the device at every training step; a plan's tensors have none.
    seen = levels.device.type == "cpu" and len(x) > 0 and not isinstance(levels, FakeTensor)
    if seen and not 0 <= levels.min() <= levels.max() <= process.timesteps:
        raise UsageError(
            f"noise levels from {int(levels.min())} to {int(levels.max())}; expected 0 (none) to {process.timesteps}"
        )
    noised = process.q_sample(x, (levels - 1).clamp_min(0), noise)
    return torch.where((levels == 0).view(-1, *[1] * (x.ndim - 1)), x, noised), levels


def sample_levels(count: int, largest: int, generator: torch.Generator) -> Tensor:
    """Levels for a training batch, (count,) int64, uniform on 0 … largest."""
    return torch.randint(0, largest + 1, (count,), generator=generator, device=generator.device)
