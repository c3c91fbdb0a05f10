"""Sampling with a trained upsampler: whole images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from unclip.bundle import load_part, load_strict
from unclip.diffusion import (
    GaussianDiffusion,
    SeededNoise,
    get_sampler,
    make_denoiser,
    spaced_timesteps,
    static_clip,
)
from unclip.diffusion.samplers import Callback
from unclip.errors import UnclipError, UsageError
from upsamplers.config import UpsamplerConfig
from upsamplers.network import CHANNELS, Upsampler

KIND = "upsampler"
# Pixels of the result that go through the network together; beyond it images are done one after another.
_PIXELS_AT_ONCE = 4 * 256 * 256


class UpsamplerStage:
    """A network with its process: (B, 3, h, w) in [-1, 1] → (B, 3, factor·h, factor·w) in [-1, 1].

    `dtype` other than float32 means autocast: the parameters and the state of the sampler stay float32.
    """

    def __init__(
        self, network: Upsampler, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.network = network.eval().to(device)
        self.config = network.config
        self.process = GaussianDiffusion(self.config.diffusion)
        self.device = torch.device(device)
        self.dtype = dtype

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> UpsamplerStage:
        """Read an exported model folder. Raises UnclipError: missing, damaged, weights that do not fit."""
        config, state = load_part(Path(folder), KIND, UpsamplerConfig)
        network = Upsampler(config)
        load_strict(network, state, Path(folder))
        return cls(network, device, dtype)

    @classmethod
    def from_network(
        cls, network: Upsampler, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> UpsamplerStage:
        """Use a network in memory, where it is unless `device` says otherwise; puts it into eval mode."""
        return cls(network, device or next(network.parameters()).device, dtype)

    @torch.no_grad()
    def sample(
        self,
        low_res: Tensor,
        seeds: Sequence[int],
        steps: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Upsample low_res (B, 3, h, w) in [-1, 1]; a seed gives the same image in any batch.

        `steps` overrides the model's default. The callback hears `(number, total, x̂_0)` after each step, x̂_0
        being that of the images in work: fewer than B where large images are done one after another.
        Raises UnclipError: another shape or type, NaN, values far outside [-1, 1], not one seed an image,
        steps out of range.
        """
        self._check(low_res, seeds)
        reverse = self.process.steps(self.timesteps(steps))
        factor = self.config.factor
        shape = (CHANNELS, factor * low_res.shape[2], factor * low_res.shape[3])
        chunk = max(1, _PIXELS_AT_ONCE // (shape[1] * shape[2]))
        results: list[Tensor] = []
        chunks = range(0, len(seeds), chunk)
        for index, start in enumerate(chunks):
            noise = SeededNoise(seeds[start : start + chunk])
            x = noise.draw(shape, self.device).contiguous(memory_format=torch.channels_last)
            part = low_res[start : start + chunk].to(self.device, torch.float32).clamp(-1, 1)
            denoiser = make_denoiser(self._network, self.process, {"low_res": part}, clip=static_clip())
            done, total = index * len(reverse), len(chunks) * len(reverse)
            heard = None if callback is None else _shifted(callback, done, total)
            sampler = get_sampler(self.config.sampler)
            x = sampler(denoiser, x, reverse, noise, eta=self.config.eta, callback=heard)
            results.append(x.clamp(-1, 1).contiguous())
        return torch.cat(results)

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The original timesteps kept, ascending: evenly from `lowest_timestep` to T − 1."""
        steps = self.config.steps if steps is None else steps
        lowest = self.config.lowest_timestep
        return [t + lowest for t in spaced_timesteps(self.process.timesteps - lowest, steps)]

    def _network(self, x_t: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
        autocast = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if autocast else nullcontext():
            return self.network(x_t, t, low_res)  # type: ignore[no-any-return]

    def _check(self, low_res: Tensor, seeds: Sequence[int]) -> None:
        got = f"got {tuple(low_res.shape)} of {low_res.dtype}"
        if low_res.ndim != 4 or low_res.shape[1] != CHANNELS or not low_res.is_floating_point():
            raise UsageError(f"expected low_res of shape (B, {CHANNELS}, h, w), floating point, {got}")
        if low_res.numel() == 0:
            raise UsageError(f"expected at least one image of at least one pixel, {got}")
        if len(seeds) != len(low_res):
            raise UsageError(f"expected one seed an image, got {len(seeds)} for {len(low_res)} images")
        if not bool(torch.isfinite(low_res).all()):
            raise UnclipError("low_res holds NaN or infinite values; the stage that made it has failed")
        largest = float(low_res.abs().max())
        if largest > 2:
            raise UsageError(
                f"expected low_res in [-1, 1], got values up to {largest:g}; scale 0..255 by x / 127.5 - 1"
            )


def _shifted(callback: Callback, before: int, total: int) -> Callback:
    """Count the steps of all chunks as one run."""
    return lambda number, _, x_start: callback(before + number, total, x_start)
