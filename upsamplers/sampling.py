"""Sampling with a trained upsampler: whole images of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unclip.autoencoder import FrozenAutoencoder, located, open_autoencoder
from unclip.bundle import load_network, load_weights, read_part_json
from unclip.config import parse_config
from unclip.diffusion import (
    GaussianDiffusion,
    SeededNoise,
    clip_from,
    get_sampler,
    make_denoiser,
    noise_augment,
    static_clip,
    timesteps_from,
)
from unclip.diffusion.samplers import Callback
from unclip.digest import hold_in
from unclip.errors import UnclipError, UsageError
from unclip.nn.storage import StripeMemory, kept_for_reuse
from unclip.text_features import TextFeatures
from upsamplers.config import UpsamplerConfig
from upsamplers.dalle2 import Dalle2Upsampler, Dalle2UpsamplerConfig, enlarge_nearest
from upsamplers.network import CHANNELS, Upsampler, pad

KIND = "upsampler"
# Pixels of the result that go through the network together; beyond it images are done one after another.
_PIXELS_AT_ONCE = 4 * 256 * 256
# Tensors of the result's size that sampler, denoiser and network hold at once: x_t, noise, condition, x̂_0, ε̂, …
_PICTURES = 16
# What convolutions take for themselves, beside twice the weights that they rearrange.
_LIBRARY = 32 * 2**20
# Convolutions copy their input or rearrange it on some devices, which a count of tensors does not see.
_WHOLE_MARGIN = 1.25


class UpsamplerStage:
    """A network with its process: (B, 3, h, w) in [-1, 1] → (B, 3, factor·h, factor·w) in [-1, 1].

    `dtype` other than float32 means autocast: the parameters stay float32 unless `hold_in` is asked for, the state of
    the sampler in any case.
    """

    def __init__(
        self,
        network: Upsampler | Dalle2Upsampler,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = network.eval().to(device)
        self.config: UpsamplerConfig = network.config
        self.process = GaussianDiffusion(self.config.diffusion)
        self.device = torch.device(device)
        self.dtype = dtype
        own = self.config.condition_process
        self._condition_process = self.process if own == self.config.diffusion else GaussianDiffusion(own)
        self._autoencoder: FrozenAutoencoder | None = None

    def hold_in(self, dtype: torch.dtype) -> None:
        """Keep the weights in this precision: half the memory, and autocast casts none of them at each step."""
        hold_in(self.network, dtype, self.config)

    @property
    def autoencoder(self) -> FrozenAutoencoder | None:
        """Of an upsampler in latents, loaded when it is first used. Raises UnclipError: it cannot be loaded, or is
        another than the upsampler was trained with.
        """
        latent = self.config.latent
        if latent is not None and self._autoencoder is None:
            self._autoencoder = open_autoencoder(latent, self.device)
        return self._autoencoder

    @classmethod
    def load(
        cls, folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> UpsamplerStage:
        """Read an exported model folder. Raises UnclipError: missing, damaged, weights that do not fit."""
        config = read_upsampler_config(Path(folder))
        network = load_network(lambda: build_network(config), load_weights(Path(folder)), Path(folder))
        return cls(network, device, dtype)

    @classmethod
    def from_network(
        cls,
        network: Upsampler | Dalle2Upsampler,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> UpsamplerStage:
        """Use a network in memory, where it is unless `device` says otherwise; puts it into eval mode."""
        return cls(network, device or next(network.parameters()).device, dtype)

    @torch.no_grad()
    def sample(
        self,
        low_res: Tensor,
        seeds: Sequence[int],
        steps: int | str | Sequence[int] | None = None,
        callback: Callback | None = None,
        *,
        noise_level: int | None = None,
        memory_limit: int | None = None,
        text: TextFeatures | None = None,
    ) -> Tensor:
        """Upsample low_res (B, 3, h, w) in [-1, 1]; a seed gives the same image in any batch.

        steps: overrides the model's default.
        callback: hears `(number, total, x̂_0)` after each step, x̂_0 being that of the images in work: fewer than
        B where large images are done one after another.
        noise_level: noise added to the condition, in steps of the process; the network is told. For a model trained
        with `noise_augmentation` only.
        text: captions, for a network that reads them, as some of DALLE2-pytorch do (`config.text_dim`); others take no
        notice, and one that gets none is told so.
        memory_limit: bytes that an image in work may take beside the weights. Where a whole forward pass takes more,
        the network runs in stripes (unclip.nn.striped) with the same result, more slowly. Not in latents, whose
        autoencoder takes pictures whole, and not for DALLE2-pytorch's networks.
        Raises UnclipError: another shape or type, NaN, values far outside [-1, 1], not one seed an image, steps or
        noise level out of range, a limit that is too small.
        """
        self._check(low_res, seeds)
        level = self.check_noise_level(noise_level)
        reverse = self.process.steps(self.timesteps(steps))
        memory_of = None if memory_limit is None else self._memory_within(memory_limit)
        factor = self.config.factor
        height, width = factor * low_res.shape[2], factor * low_res.shape[3]
        autoencoder, low_res = self.autoencoder, pad(low_res, self.config.low_multiple)
        pixels = 1 if autoencoder is None else autoencoder.facts.factor
        edges = (factor * low_res.shape[2] // pixels, factor * low_res.shape[3] // pixels)
        shape = (self.config.channels, *edges)
        chunk = max(1, _PIXELS_AT_ONCE // (height * width)) if memory_limit is None else 1
        memory = None if memory_of is None else memory_of(shape)
        results: list[Tensor] = []
        chunks = range(0, len(seeds), chunk)
        for index, start in enumerate(chunks):
            noise = SeededNoise(seeds[start : start + chunk])
            x = noise.draw(shape, self.device).contiguous(memory_format=torch.channels_last)
            part = low_res[start : start + chunk].to(self.device, torch.float32).clamp(-1, 1)
            own = None if text is None else text[start : start + chunk]
            condition = self._condition(part, edges, level, noise, own)
            network = partial(self._network, memory=memory)
            clip = clip_from(self.config.diffusion.x_start_clip, static_clip() if autoencoder is None else None)
            denoiser = make_denoiser(network, self.process, condition, clip=clip)
            done, total = index * len(reverse), len(chunks) * len(reverse)
            heard = None if callback is None else _shifted(callback, done, total)
            sampler = get_sampler(self.config.sampler)
            with kept_for_reuse(self.device) if memory is None else nullcontext():
                x = sampler(denoiser, x, reverse, noise, eta=self.config.eta, callback=heard)
            made = x.clamp(-1, 1) if autoencoder is None else autoencoder.decode(x)
            results.append(made[..., :height, :width].contiguous())
        return torch.cat(results)

    def _condition(
        self, low_res: Tensor, edges: tuple[int, int], level: int, noise: SeededNoise, text: TextFeatures | None
    ) -> dict[str, Tensor | None]:
        """What the network is shown beside x_t, for pictures (B, 3, h, w) whose result is diffused at `edges`."""
        if self.config.condition == "latent" and self.autoencoder is not None:
            low_res = self.autoencoder.encode(low_res)
        if isinstance(self.network, Dalle2Upsampler):  # its condition is noised after it was enlarged
            low_res = enlarge_nearest(low_res, edges)
        condition: dict[str, Tensor | None] = {"low_res": low_res}
        if self.config.noise_augmentation is not None:
            # Drawn after x_T, which so depends on the seed alone.
            drawn = noise(low_res) if level else torch.zeros_like(low_res)
            condition["low_res"], condition["noise_level"] = noise_augment(
                low_res, level, drawn, self._condition_process
            )
        if text is not None and self.config.text_dim is not None:
            text = text.to(self.device)
            condition |= {"text_tokens": text.tokens, "text_mask": text.mask}
        return condition

    def timesteps(self, steps: int | str | Sequence[int] | None = None) -> list[int]:
        """The original timesteps kept, ascending: a number spreads evenly from `lowest_timestep` to T − 1."""
        steps = self.config.steps if steps is None else steps
        return timesteps_from(steps, self.process.timesteps, lowest=self.config.lowest_timestep)

    def _network(
        self,
        x_t: Tensor,
        t: Tensor,
        low_res: Tensor,
        noise_level: Tensor | None = None,
        memory: StripeMemory | None = None,
        **caption: Tensor,
    ) -> Tensor:
        autocast = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if autocast else nullcontext():
            return self.network(x_t, t, low_res, noise_level, memory, **caption)  # type: ignore[no-any-return]

    def check_noise_level(self, given: int | None) -> int:
        """The level to sample with, the model's own for None. UsageError: the model knows none, or not this one."""
        largest = self.config.noise_augmentation
        if largest is None:
            if given:
                raise UsageError(
                    f"noise level {given} for a model without noise augmentation; leave it out, or train one with "
                    "model.noise_augmentation"
                )
            return 0
        level = self.config.noise_level if given is None else given
        if not 0 <= level <= largest:
            raise UsageError(f"noise level {level} is out of range; this model knows 0 (none) to {largest}")
        return level

    def _memory_within(self, limit: int) -> Callable[[tuple[int, int, int]], StripeMemory | None]:
        """For a shape (C, H, W), where feature maps go; None where a whole forward pass keeps the limit. UsageError:
        this network keeps none.
        """
        if self.config.latent is not None:
            raise UsageError(
                "a memory limit is kept by upsamplers in pixels, and this one works in latents, whose autoencoder "
                "takes pictures whole; leave it out"
            )
        network = self.network
        if isinstance(network, Dalle2Upsampler):
            raise UsageError(
                "a memory limit is kept by upsamplers of convolutions, and this one of DALLE2-pytorch's has attention; "
                "leave it out"
            )
        return partial(self._memory, network, limit)

    def _memory(self, network: Upsampler, limit: int, shape: tuple[int, int, int]) -> StripeMemory | None:
        if limit < 1:
            raise UsageError(f"a memory limit of {limit} bytes; expected 1 or more")
        largest = max(parameter.numel() * 4 for parameter in network.parameters())
        beside = _PICTURES * CHANNELS * shape[1] * shape[2] * 4 + _LIBRARY + 2 * largest
        if network.activation_bytes(1, shape[1], shape[2]) * _WHOLE_MARGIN + beside <= limit:
            return None
        if limit <= beside:
            raise UnclipError(
                f"a memory limit of {limit / 2**20:.0f} MiB is too small for a picture of {shape[2]} x {shape[1]} "
                f"pixels; beside feature maps it takes {beside / 2**20:.0f} MiB"
            )
        return StripeMemory(limit - beside, self.device)

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


def build_network(config: UpsamplerConfig) -> Upsampler | Dalle2Upsampler:
    """The network that a configuration describes, with fresh weights."""
    return Dalle2Upsampler(config) if isinstance(config, Dalle2UpsamplerConfig) else Upsampler(config)


def read_upsampler_config(folder: Path) -> UpsamplerConfig:
    """The configuration of an upsampler's folder, of the class that its `architecture` names; an autoencoder that the
    folder carries has its place in it as its name. Raises UnclipError.
    """
    body = read_part_json(folder, KIND)["config"]
    foreign = isinstance(body, dict) and body.get("architecture") == "dalle2"
    config = parse_config(
        Dalle2UpsamplerConfig if foreign else UpsamplerConfig, body, origin=str(folder / "config.json")
    )
    return config.model_copy(update={"latent": located(config.latent, folder)})


def _shifted(callback: Callback, before: int, total: int) -> Callback:
    """Count the steps of all chunks as one run."""
    return lambda number, _, x_start: callback(before + number, total, x_start)
