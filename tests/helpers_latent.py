"""Tiny autoencoders of random weights, and a decoder and an upsampler in their latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from decoder import Decoder, DecoderConfig, DecoderStage
from unclip.autoencoder import FrozenAutoencoder
from unclip.config import parse_config
from upsamplers import Upsampler, UpsamplerConfig, UpsamplerStage

UNET: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "head_channels": 8}
NetworkT = TypeVar("NetworkT", bound=nn.Module)
FIXED = {"variance": "fixed_small"}


def make_autoencoders(root: Path) -> dict[str, str]:
    """Folders of an AutoencoderKL and a VQModel of 2 pixels a latent's side, and of an AutoencoderKL of 4 ("deep")."""
    torch.manual_seed(0)

    def blocks(levels: int) -> dict[str, Any]:
        return {
            "block_out_channels": (8,) * levels,
            "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    models = {
        "kl": AutoencoderKL(latent_channels=4, scaling_factor=0.5, shift_factor=0.25, **blocks(2)),
        "vq": VQModel(latent_channels=3, num_vq_embeddings=16, scaling_factor=0.7, **blocks(2)),
        "deep": AutoencoderKL(latent_channels=4, scaling_factor=0.5, **blocks(3)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


def latent_of(name: str) -> dict[str, Any]:
    """The entry `latent` of a configuration, as training fills it in."""
    return {"name": name, **FrozenAutoencoder.facts_of(name)._asdict()}


def latent_upsampler(name: str, low: int, high: int, shake: float = 0.05, **changes: Any) -> UpsamplerStage:
    """Of random weights; with `shake` 0 as training begins."""
    body = {"latent": latent_of(name), "low_size": low, "high_size": high, "unet": UNET, "steps": 2, **changes}
    config = parse_config(UpsamplerConfig, {"diffusion": FIXED, **body})
    torch.manual_seed(2)
    network = Upsampler(config)
    return UpsamplerStage(_shaken(network, shake))


def latent_decoder(name: str, shake: float = 0.05, **changes: Any) -> DecoderStage:
    """On the tiny CLIP of conftest.py; 8 latents a side."""
    widths = {"embedding_dim": 16, "token_dim": 24, "text_length": 12, "context_dim": 16}
    unet = {**UNET, "image_size": 8, "attention_resolutions": [8]}
    body = {**widths, "latent": latent_of(name), "diffusion": FIXED, "unet": unet, "steps": 4, **changes}
    config = parse_config(DecoderConfig, body)
    torch.manual_seed(1)
    network = Decoder(config)
    return DecoderStage(_shaken(network, shake).requires_grad_(False), config)


def _shaken(network: NetworkT, size: float) -> NetworkT:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return network
