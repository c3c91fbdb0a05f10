"""What all samplers share: their types, noise by seed, and small helpers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unclip.diffusion.process import Step
from unclip.errors import UsageError

Noise = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor], None]
Sampler = Callable[..., Tensor]


class SeededNoise:
    """Standard normal noise with one generator a sample, so that a seed gives the same sample in any batch.

    Drawn on the CPU in float32 whatever the device, so that the device does not change the picture's noise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Noise (len(seeds), *shape)."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators]).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:], x.device).to(x.dtype)


def timestep(t: int, x: Tensor) -> Tensor:
    """t for every sample of x, (B,) int64."""
    return torch.full((len(x),), t, dtype=torch.long, device=x.device)


def half_log_snr(alpha_bar: float) -> float:
    """λ = log(sqrt(ᾱ)/sqrt(1−ᾱ)); −∞ for pure noise, ∞ for pure data."""
    if alpha_bar in (0, 1):
        return math.inf if alpha_bar else -math.inf
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def transfer(x_start: Tensor, epsilon: Tensor, alpha_bar: float) -> Tensor:
    """sqrt(ᾱ) x̂_0 + sqrt(1−ᾱ) ε̂: DDIM's deterministic move to the noise level ᾱ (DDIM, eq. 13)."""
    return math.sqrt(alpha_bar) * x_start + math.sqrt(1 - alpha_bar) * epsilon


def refuse_noise(name: str, eta: float) -> None:
    """UsageError for a deterministic solver that is asked to add noise."""
    if eta:
        raise UsageError(f"{name} is deterministic and takes eta 0 only, got {eta}; use ddim or ddpm")


def tell(callback: Callback | None, number: int, steps: Sequence[Step], x_start: Tensor) -> None:
    if callback is not None:
        callback(number + 1, len(steps), x_start)
