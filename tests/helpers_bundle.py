"""A whole unCLIP system of tiny random networks, so that everything runs to 1024 px within a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decoder import Decoder, DecoderConfig
from prior import Prior, PriorConfig
from unclip.bundle import save_part
from unclip.config import parse_config
from upsamplers import Upsampler, UpsamplerConfig

WIDTHS: dict[str, Any] = {
    "embedding_dim": 16,
    "token_dim": 24,
    "text_length": 12,
}  # of the tiny CLIP in conftest.py
PROMPTS = ["pizza", "red apple", "rainbow"]


def make_parts(root: Path, clip: Path, **widths: int) -> dict[str, Path]:
    """Write all parts below `root`; `widths` replaces entries of WIDTHS in prior and decoder. Returns their
    folders.
    """
    torch.manual_seed(0)
    shared = {**WIDTHS, **widths}
    unet = {"channel_mult": [1, 2], "num_res_blocks": 1, "model_channels": 8, "head_channels": 8}
    prior = parse_config(PriorConfig, {**shared, "width": 16, "depth": 1, "heads": 2, "steps": 3})
    decoder = parse_config(
        DecoderConfig,
        {
            **shared,
            "context_dim": 16,
            "unet": {**unet, "image_size": 64, "patch_size": 4, "attention_resolutions": [8]},
            "steps": 3,
        },
    )
    parts = {"clip": clip}
    for name, network, config in (("prior", Prior(prior), prior), ("decoder", Decoder(decoder), decoder)):
        save_part(root / name, name, config, _shaken(network).state_dict())
        parts[name] = root / name
    for low, high, patch in ((64, 256, 16), (256, 1024, 64)):
        body = {
            "low_size": low,
            "high_size": high,
            "unet": {**unet, "image_size": high, "patch_size": patch, "channel_mult": [1]},
            "diffusion": {"prediction": "x_start"},
            "residual": True,
            "steps": 1,
        }
        config = parse_config(UpsamplerConfig, body)
        name = f"upsampler_{high}"
        save_part(root / name, "upsampler", config, _shaken(Upsampler(config)).state_dict())
        parts[name] = root / name
    return parts


def make_bundle(root: Path, parts: dict[str, Path]) -> Path:
    """Copy parts into a bundle as it lies on disk, without the code under test."""
    root.mkdir(parents=True)
    for name, folder in parts.items():
        shutil.copytree(folder, root / name)
    manifest = {
        "format": 1,
        "name": "tiny",
        "version": "1",
        "license": "Apache-2.0",
        "parts": {name: name for name in parts},
        "example_prompts": PROMPTS,
    }
    (root / "unclip.json").write_text(json.dumps(manifest), encoding="utf-8")
    return root


def _shaken(network: nn.Module) -> nn.Module:
    """Zero-initialised layers would hide every condition."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network
