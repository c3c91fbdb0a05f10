"""The upsampler's training objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.diffusion import GaussianDiffusion, noise_augment, sample_levels
from unclip.diffusion.guidance import Network
from upsamplers.bsrgan import degrade_seeded
from upsamplers.config import BSRGANConfig, UpsamplerConfig
from upsamplers.corruption import corrupt, corrupt_seeded, draw_seeds
from upsamplers.corruption_config import NoCorruptionConfig
from upsamplers.filters import uniform


class Encoder(Protocol):
    """What brings images (B, 3, H, W) to latents, as unclip.autoencoder.FrozenAutoencoder does."""

    def encode(self, images: Tensor) -> Tensor: ...


def upsampler_loss(
    network: Network,
    process: GaussianDiffusion,
    config: UpsamplerConfig,
    batch: Mapping[str, Any],
    generator: torch.Generator,
    last_step_share: float = 0.25,
    autoencoder: Encoder | None = None,
) -> dict[str, Tensor]:
    """Losses of a batch, each (B,), `loss` being the one to minimise (unCLIP, App. C).

    `batch["image"]` (B, 3, S, S) in [-1, 1] are crops of high-resolution images, S divisible by the factor; `pair`
    makes of them what the network sees, with the `autoencoder` of one in latents. Where `batch["has_low"]` (B,), it
    sees `batch["low"]` (B, 3, S/factor, S/factor) as it is, such as the decoder's own picture; elsewhere
    `batch["condition"]`, if `add_condition` has made it. Otherwise as `pair_loss`.
    """
    given = (batch.get(name) for name in ("low", "has_low", "condition"))
    x_start, low_res = pair(batch["image"], config, generator, autoencoder, *given)
    return pair_loss(network, process, config, x_start, low_res, generator, last_step_share)


def pair(
    images: Tensor,
    config: UpsamplerConfig,
    generator: torch.Generator,
    autoencoder: Encoder | None = None,
    low: Tensor | None = None,
    has_low: Tensor | None = None,
    condition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """High-resolution images (B, 3, S, S) in [-1, 1] -> x_0, themselves or their latents, and the condition: made from
    them by an antialiased reduction and the configured corruption (`condition`, if that was done before), or given as
    `low` (B, 3, S/factor, S/factor) where `has_low` (B,); as an image or encoded in its turn.
    """
    low_res = make_condition(images, config, generator) if condition is None else condition
    if low is not None and has_low is not None:
        low_res = torch.where(has_low[:, None, None, None], low.to(low_res), low_res)
    if autoencoder is None:
        return images, low_res
    return autoencoder.encode(images), low_res if config.condition == "image" else autoencoder.encode(low_res)


def pair_loss(
    network: Network,
    process: GaussianDiffusion,
    config: UpsamplerConfig,
    x_start: Tensor,
    low_res: Tensor,
    generator: torch.Generator,
    last_step_share: float = 0.25,
) -> dict[str, Tensor]:
    """Losses (B,) of x_0 and its condition, which is noised to a random level where the model takes noise augmentation.
    With a last-step network, `last_step_share` of the samples are at its timestep.
    """
    count, device = len(x_start), x_start.device
    conditioning = {"low_res": low_res}
    if config.noise_augmentation is not None:
        levels = sample_levels(count, config.noise_augmentation, generator).to(device)
        conditioning["low_res"], conditioning["noise_level"] = noise_augment(
            low_res, levels, _normal(low_res, generator), process
        )
    t = process.sample_timesteps(count, generator).to(device)
    if config.last_step_network:
        chosen = torch.rand(count, generator=generator, device=generator.device).to(device) < last_step_share
        # The other samples keep off the last network's timesteps: they are not the first network's to learn.
        others = t.clamp_min(config.last_timestep + 1)
        t = torch.where(chosen, config.last_timestep, others)
    noise = _normal(x_start, generator)
    x_t = process.q_sample(x_start, t, noise)
    return process.losses(network(x_t, t, **conditioning), x_start, x_t, t, noise)


def make_condition(images: Tensor, config: UpsamplerConfig, generator: torch.Generator) -> Tensor:
    """High-resolution images (B, 3, H, W) -> corrupted conditions (B, 3, H/factor, W/factor) in [-1, 1]."""
    if not isinstance(config.corruption, BSRGANConfig):
        return corrupt(downsample(images, config), config.corruption, generator)
    return make_condition_seeded(images, config, draw_seeds(len(images), generator))


def make_condition_seeded(images: Tensor, config: UpsamplerConfig, seeds: Sequence[int]) -> Tensor:
    """As `make_condition`, with one seed an image: a seed gives the same corruption in any batch."""
    corruption = config.corruption
    if isinstance(corruption, NoCorruptionConfig):
        return downsample(images, config)
    if not isinstance(corruption, BSRGANConfig):
        return corrupt_seeded(downsample(images, config), corruption, seeds)
    results = []
    for image, seed in zip(images.split(1), seeds, strict=True):
        degraded = uniform(torch.Generator().manual_seed(seed)) < corruption.probability
        results.append(
            degrade_seeded(image, config.factor, corruption, [seed + 1]) if degraded else downsample(image, config)
        )
    return torch.cat(results)


def add_condition(batch: Mapping[str, Any], seeds: Sequence[int], *, config: UpsamplerConfig) -> Any:
    """For `unclip.data.build_batches`: `condition` (B, 3, S/factor, S/factor), zeros where the batch has a `low` of the
    sample. A corruption of many steps goes image by image, and its time is better spent beside the training.
    """
    images = batch["image"]
    wanted = ~batch["has_low"] if "has_low" in batch else torch.ones(len(images), dtype=torch.bool)
    chosen = [seed for seed, one in zip(seeds, wanted.tolist(), strict=True) if one]
    condition = images.new_zeros((*images.shape[:2], *(edge // config.factor for edge in images.shape[2:])))
    if chosen:
        condition[wanted] = make_condition_seeded(images[wanted], config, chosen)
    return {"condition": condition}


def downsample(images: Tensor, config: UpsamplerConfig) -> Tensor:
    """(B, 3, H, W) → (B, 3, H/factor, W/factor), antialiased, in [-1, 1]; H and W divisible by the factor."""
    height, width = images.shape[-2:]
    size = (height // config.factor, width // config.factor)
    if config.downsample == "area":
        return F.interpolate(images, size=size, mode="area")
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)
