"""A tiny system whose upsampler reads captions, as some enlarging U-Nets of DALLE2-pytorch do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_bundle import WIDTHS, make_bundle

from unclip.bundle import save_part
from unclip.config import parse_config
from upsamplers import Dalle2Upsampler, Dalle2UpsamplerConfig

HIGH = 128


def captioned_config(text_dim: int | None = WIDTHS["token_dim"], low: int = 64) -> Dalle2UpsamplerConfig:
    return parse_config(
        Dalle2UpsamplerConfig,
        {
            "version": "1.15.6",
            "low_size": low,
            "high_size": 2 * low,
            "corruption": {"kind": "none"},
            "diffusion": {"prediction": "x_start"},
            "steps": 2,
            "unet": {
                "image_size": 2 * low,
                "dim": 4,
                "dim_mults": [1, 2],
                "cond_dim": 8,
                "text_dim": text_dim,
                "max_text_len": 16,
                "self_attn": [False, False],
                "resnet_groups": [2, 2],
                "num_resnet_blocks": [1, 1],
                "memory_efficient": True,
                "low_res": True,
            },
        },
    )


def save_captioned(folder: Path, config: Dalle2UpsamplerConfig) -> Path:
    torch.manual_seed(0)
    network = Dalle2Upsampler(config)
    if config.text_dim is not None:  # a fresh network hardly hears its caption
        network.text_to_tokens.weight.data *= 20
    save_part(folder, "upsampler", config, network.state_dict())
    return folder


def make_captioned(root: Path, parts: dict[str, Path], **changes: Any) -> Path:
    """A bundle of `tiny_parts` in which such an upsampler stands in the place of the two others."""
    own = save_captioned(root / "part", captioned_config(**changes))
    kept = {name: parts[name] for name in ("clip", "prior", "decoder")}
    return make_bundle(root / "bundle", {**kept, "upsampler_256": own})
