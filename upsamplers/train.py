"""Wiring of an upsampler's training: data, network, loss, export and preview go to the shared loop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.autoencoder import open_autoencoder, with_facts
from unclip.bundle import save_part
from unclip.config import parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.diffusion.guidance import Network
from unclip.training import Distributed, fit, open_batches
from unclip.training.finetune import Tuning
from unclip.training.previews import captioned_grid, fixed_batch
from unclip.training.start import Reader, tell
from upsamplers.config import UpsamplerConfig, UpsamplerRunConfig
from upsamplers.corruption_config import BlurConfig, NoCorruptionConfig
from upsamplers.network import Upsampler
from upsamplers.objective import add_condition, downsample, upsampler_loss
from upsamplers.sampling import KIND, UpsamplerStage
from upsamplers.start import begin_from, start_from, with_start

if TYPE_CHECKING:
    from PIL import Image

    from unclip.data import Complete

__all__ = ["run", "start_from"]

_PREVIEWS = 4


def run(config: UpsamplerRunConfig, distributed: Distributed, foreign: Reader | None = None) -> Path:
    """Train as configured; returns the folder of the exported EMA model.

    `foreign` reads checkpoints of other projects for `init_from` (unclip.interop.folders).
    """
    config, start = with_start(config, foreign)
    config, train = _with_facts(config), config.train
    torch.manual_seed(train.seed)  # the network's initial weights
    network = Upsampler(config.model)
    if start is not None:
        tell(begin_from(network, start), distributed)
    _freeze(network, config)
    tuning = Tuning(network, train, KIND, config.model)
    process = GaussianDiffusion(config.model.diffusion)
    batches = open_batches(config.data, train, distributed, _ahead(config.model))
    latent = config.model.latent
    autoencoder = None if latent is None else open_autoencoder(latent, distributed.device)

    def loss_fn(network: Network, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return upsampler_loss(network, process, config.model, batch, generator, config.last_step_share, autoencoder)

    def export(state: dict[str, Tensor], folder: Path) -> None:
        save_part(folder, KIND, config.model, state)

    sample = _preview(config) if train.sample_every and distributed.rank == 0 else None
    return fit(network, loss_fn, batches, train, run_config=config, export=tuning.exporting(export), sample=sample)


def _ahead(model: UpsamplerConfig) -> Complete | None:
    """What is done to batches in the background: corruptions that go image by image through many steps."""
    if isinstance(model.corruption, (NoCorruptionConfig, BlurConfig)):
        return None
    return partial(add_condition, config=model)


def _with_facts(config: UpsamplerRunConfig) -> UpsamplerRunConfig:
    """With what the autoencoder of an upsampler in latents decides. UsageError: sizes that are no whole latents."""
    if config.model.latent is None:
        return config
    body = config.model_dump()
    body["model"]["latent"] = with_facts(config.model.latent).model_dump()
    return parse_config(UpsamplerRunConfig, body, origin="the configuration, with its autoencoder")


def _freeze(network: Upsampler, config: UpsamplerRunConfig) -> None:
    """A network that no sample trains keeps its weights, whatever the optimizer's weight decay."""
    if config.model.last_step_network and config.last_step_share == 1:
        for name, parameter in network.named_parameters():
            if not name.startswith("last_unet."):
                parameter.requires_grad_(False)
    if config.model.last_step_network and config.last_step_share == 0:
        network.last_unet.requires_grad_(False)


def _preview(config: UpsamplerRunConfig) -> Any:
    """A function that draws condition, result and original of a few whole images, one column an image."""
    batch = fixed_batch(config.data, _PREVIEWS, seed=config.train.seed + 1)
    truth = batch["image"]
    low_res = downsample(truth, config.model)
    if "low" in batch:
        low_res = torch.where(batch["has_low"][:, None, None, None], batch["low"], low_res)

    def sample(network: nn.Module) -> Image.Image:
        assert isinstance(network, Upsampler)
        result = UpsamplerStage.from_network(network).sample(low_res, range(len(low_res))).cpu()
        blocks = F.interpolate(low_res, size=truth.shape[-2:], mode="nearest")
        return captioned_grid([blocks, result, truth], batch["caption"])

    return sample
