"""Wiring of an upsampler's training: data, network, loss, export and preview go to the shared loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.bundle import load_part, load_strict, save_part
from unclip.diffusion import GaussianDiffusion
from unclip.diffusion.guidance import Network
from unclip.training import Distributed, fit, open_batches
from unclip.training.previews import captioned_grid, fixed_batch
from upsamplers.config import UpsamplerConfig, UpsamplerRunConfig
from upsamplers.network import Upsampler
from upsamplers.objective import downsample, upsampler_loss
from upsamplers.sampling import KIND, UpsamplerStage

if TYPE_CHECKING:
    from PIL import Image

_PREVIEWS = 4


def run(config: UpsamplerRunConfig, distributed: Distributed) -> Path:
    """Train as configured; returns the folder of the exported EMA model."""
    train = config.train
    torch.manual_seed(train.seed)  # the network's initial weights
    network = Upsampler(config.model)
    if config.init_from is not None:
        start_from(network, Path(config.init_from))
    _freeze(network, config)
    process = GaussianDiffusion(config.model.diffusion)
    batches = open_batches(config.data, train, distributed)

    def loss_fn(network: Network, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return upsampler_loss(network, process, config.model, batch, generator, config.last_step_share)

    def export(state: dict[str, Tensor], folder: Path) -> None:
        save_part(folder, KIND, config.model, state)

    sample = _preview(config) if train.sample_every and distributed.rank == 0 else None
    return fit(network, loss_fn, batches, train, run_config=config, export=export, sample=sample)


def start_from(network: Upsampler, folder: Path) -> None:
    """Load a trained upsampler's weights of the same shape.

    What it lacks and `network` has starts anew, except a last-step network: that one starts as a copy of the trained
    network, to be fine-tuned for its step (Karlo). Where it predicts another quantity (ε, x_0, v), the output layers
    keep their fresh zeros, as it would put out the wrong thing. UnclipError: weights that do not fit.
    """
    before, state = load_part(folder, KIND, UpsamplerConfig)
    fresh = network.state_dict()
    if network.config.last_step_network and not before.last_step_network:
        state |= {name.replace("unet.", "last_unet.", 1): value for name, value in state.items() if _of_unet(name)}
    if before.diffusion.prediction != network.config.diffusion.prediction or before.residual != network.config.residual:
        state |= {name: value for name, value in fresh.items() if "unet.conv_out." in name}
    if before.noise_augmentation is None:
        state |= {name: value for name, value in fresh.items() if name.startswith("level_embed.")}
    load_strict(network, state, folder)


def _of_unet(name: str) -> bool:
    return name.startswith("unet.")


def _freeze(network: Upsampler, config: UpsamplerRunConfig) -> None:
    """A network that no sample trains keeps its weights, whatever the optimizer's weight decay."""
    if config.model.last_step_network and config.last_step_share == 1:
        network.requires_grad_(False)
        network.last_unet.requires_grad_(True)
    if config.model.last_step_network and config.last_step_share == 0:
        network.last_unet.requires_grad_(False)


def _preview(config: UpsamplerRunConfig) -> Any:
    """A function that draws condition, result and original of a few whole images, one column an image."""
    batch = fixed_batch(config.data, _PREVIEWS, seed=config.train.seed + 1)
    truth = batch["image"]
    low_res = downsample(truth, config.model)

    def sample(network: nn.Module) -> Image.Image:
        assert isinstance(network, Upsampler)
        result = UpsamplerStage.from_network(network).sample(low_res, range(len(low_res))).cpu()
        blocks = F.interpolate(low_res, size=truth.shape[-2:], mode="nearest")
        return captioned_grid([blocks, result, truth], batch["caption"])

    return sample
