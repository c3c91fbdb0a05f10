"""diffusers' side of a sampling: the loop of its UnCLIPPipeline over its scheduler, on our noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from unclip.diffusion import SeededNoise

INSTALLED = True
try:
    import diffusers  # noqa: F401
except ImportError:
    INSTALLED = False


def unclip_scheduler(betas: Tensor, kept: Sequence[int], **options: object) -> object:
    """An UnCLIPScheduler over the timesteps `kept`, ascending as ours has them.

    Its tables are replaced by the float64 tables that ours has: in float32 1 − ᾱ_0 keeps three digits, which would
    make two samples differ that come of the same formulas.
    """
    from diffusers import UnCLIPScheduler

    scheduler = UnCLIPScheduler(1000, **options)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    scheduler.timesteps = torch.tensor(sorted(kept, reverse=True))
    return scheduler


@torch.no_grad()
def sample(
    scheduler: object,
    output_at: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    seeds: Sequence[int],
    device: torch.device,
) -> Tensor:
    """The pipeline's loop: guidance is `output_at`'s business, x_T and the noise of every step come from the seeds."""
    noise = SeededNoise(seeds)
    x = noise.draw(shape, device)
    kept = scheduler.timesteps.tolist()  # type: ignore[attr-defined]
    with _noise_from(noise):
        for index, t in enumerate(kept):
            before = kept[index + 1] if index + 1 < len(kept) else None
            output = output_at(x, torch.tensor(t, device=device))
            x = scheduler.step(output, t, x, prev_timestep=before).prev_sample  # type: ignore[attr-defined]
    return x


@contextmanager
def _noise_from(noise: SeededNoise) -> Iterator[None]:
    def draw(shape: Sequence[int], device: object = None, dtype: object = None, **_: object) -> Tensor:
        return noise.draw(shape[1:], device).to(dtype)  # type: ignore[arg-type]

    with patch("diffusers.schedulers.scheduling_unclip.randn_tensor", draw):
        yield
