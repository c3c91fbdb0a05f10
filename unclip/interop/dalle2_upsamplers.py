"""The enlarging U-Nets of a DALLE2-pytorch `Decoder`, unets.1 and those behind it -> our `Dalle2Upsampler`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.interop.dalle2 import Dalle2Checkpoint, check_state, era_of
from unclip.interop.dalle2_decoder import at, check_options, diffusion_of, shape_of, unet_state
from upsamplers.dalle2 import NOISE_TIMESTEPS, Dalle2Upsampler, Dalle2UpsamplerConfig

_UNUSED = ("null_image_tokens", "null_image_time")  # every Unet has them; of these networks none sees the embedding


def enlarging_unets(checkpoint: Dalle2Checkpoint) -> list[int]:
    """The numbers of the U-Nets behind the first, whether tensors or configuration tell of them."""
    told = checkpoint.config or {}
    named = {int(found[1]) for name in checkpoint.state if (found := re.match(r"unets\.(\d+)\.", name))}
    return sorted((named | set(range(len(told.get("unets") or [])))) - {0})


def named_unet(checkpoint: Dalle2Checkpoint, number: int) -> str:
    """An enlarging U-Net in words."""
    sizes = _sizes(checkpoint.config or {})
    return f"the enlarging U-Net unets.{number}{f', to {sizes[number]} px' if number < len(sizes) else ''}"


def _sizes(told: Mapping[str, Any]) -> list[int]:
    """Edges of the pictures that each U-Net makes; DALLE2-pytorch orders them so."""
    return sorted(set(told.get("image_sizes") or []))


def upsampler_from_dalle2(
    checkpoint: Dalle2Checkpoint, number: int, **changes: Any
) -> tuple[Dalle2UpsamplerConfig, dict[str, Tensor]]:
    """unets.`number` -> configuration and state dict. `changes` sets other fields of the configuration (steps, …).

    It sees what DALLE2-pytorch's `Decoder.sample` shows it: the picture of the stage before, noised to
    `lowres_noise_sample_level` where it was trained so (blurring is for training alone), and the caption where it reads
    one; never the image embedding, which its Decoder gives to the first U-Net alone.
    Raises UnclipError: as `decoder_from_dalle2`, or sizes that are no whole multiples.
    """
    origin = f"unets.{number} of {checkpoint.file}"
    told = checkpoint.config
    if told is None or number >= len(told.get("unets") or []):
        raise UnclipError(f"{origin} is not in the configuration of its run")
    sizes = _sizes(told)
    if number >= len(sizes):
        raise UnclipError(f"{origin} has no size in its configuration's image_sizes ({sizes or 'none'})")
    era = era_of(checkpoint.version, origin)
    unet: dict[str, Any] = dict(told["unets"][number])
    check_options(unet, origin)
    state = unet_state(checkpoint.state, number, str(checkpoint.file))
    if "null_tokens" not in state or "null_image_tokens" not in state:
        raise UnclipError(f"{origin} is no whole U-Net of DALLE2-pytorch: its learned nulls are missing")
    if "image_to_tokens.weight" in state:
        raise UnclipError(f"{origin} reads the image embedding, which the first U-Net alone is given")
    shape = shape_of(unet, state, era)
    noised = "unet.level_in.weight" in state
    shape |= {"image_size": sizes[number], "low_res": True, "low_res_noise": noised}
    state = {name: tensor for name, tensor in state.items() if name not in _UNUSED}
    if shape["text_dim"] is None:
        state.pop("null_tokens")
    body: dict[str, Any] = {
        "version": era.version,
        "low_size": sizes[number - 1],
        "high_size": sizes[number],
        "unet": shape,
        "diffusion": diffusion_of(checkpoint, told, number),
        "corruption": {"kind": "none"},
        "eta": told.get("ddim_sampling_eta", 0.0),
    }
    if noised:
        # A level here is one above DALLE2-pytorch's, as 0 is no noise at all.
        level = int(told.get("lowres_noise_sample_level", 0.2) * NOISE_TIMESTEPS) + 1
        body |= {"noise_augmentation": NOISE_TIMESTEPS, "noise_level": level}
    steps = at(told.get("sample_timesteps"), number)
    body["steps"] = steps or min(27, body["diffusion"]["timesteps"])
    ours = parse_config(Dalle2UpsamplerConfig, body | changes, origin)
    with torch.device("meta"):
        own = Dalle2Upsampler(ours)
    check_state(own, state, origin)
    return ours, state
