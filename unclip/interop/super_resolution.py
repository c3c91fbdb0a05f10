"""diffusers' `UNet2DModel` pair of Karlo's super-resolution <-> our upsampler with a last-step network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.interop.unet import unet_from_diffusers, unet_to_diffusers
from unclip.nn import UNetConfig
from upsamplers import UpsamplerConfig

Model = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""A state dict and its config.json."""


def upsampler_from_diffusers(first: Model, last: Model | None = None, **changes: Any) -> tuple[
    UpsamplerConfig, dict[str, Tensor]
]:
    """Karlo's `super_res_first` and, for the last step, `super_res_last` -> our configuration and the state dict of
    `Upsampler`.

    Without `last` one network takes all steps. `changes` sets other fields of the configuration; by default the sample
    is Karlo's: 64 -> 256 px, ε on the cosine schedule, 7 steps from 999 to 0.
    Raises UnclipError: blocks or options that our network does not have, tensors missing or unknown, two networks of
    different shape.
    """
    shape, tensors = unet_from_diffusers(*first)
    state = {f"unet.{name}": tensor for name, tensor in tensors.items()}
    if last is not None:
        other, tensors = unet_from_diffusers(*last)
        if other != shape:
            raise UnclipError("the networks of the first and the last step have different shapes; expected the same")
        state |= {f"last_unet.{name}": tensor for name, tensor in tensors.items()}
    channels = first[1].get("in_channels", 3), first[1].get("out_channels", 3)
    if channels != (6, 3):
        raise UnclipError(
            f"this U-Net has {channels[0]} input and {channels[1]} output channels; a super-resolution network has 6, "
            "x_t and the enlarged condition, and 3"
        )
    config = parse_config(
        UpsamplerConfig,
        {
            "unet": shape.model_dump(),
            "low_size": shape.image_size // 4,
            "high_size": shape.image_size,
            "clamp_condition": False,
            "corruption": {"kind": "none"},
            "last_step_network": last is not None,
            "steps": 7,
            "sampler": "ddpm",
            "eta": 1.0,
            **changes,
        },
        origin="the converted upsampler",
    )
    return config, state


def upsampler_to_diffusers(
    config: UpsamplerConfig, state: Mapping[str, Tensor]
) -> tuple[tuple[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]] | None]:
    """Our upsampler -> (state dict, config.json) of the `UNet2DModel` for the first steps and, where it has one, for
    the last step.

    Raises UnclipError: an upsampler that they cannot express, or weights that are incomplete.
    """
    problems = [
        name
        for name, found in (
            ("an Efficient U-Net", not isinstance(config.unet, UNetConfig)),
            ("latents", config.latent is not None),
            ("residual", config.residual),
            ("noise_augmentation", config.noise_augmentation is not None),
            ("clamp_condition", config.clamp_condition),
            ("a learned variance", config.diffusion.variance == "learned_range"),
        )
        if found
    ]
    if problems or not isinstance(config.unet, UNetConfig):
        raise UnclipError(
            f"diffusers' unCLIP has no such super-resolution: {', '.join(problems)}; configs/upsampler/karlo.yaml has "
            "its shape"
        )

    def part(prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        assert isinstance(config.unet, UNetConfig)
        body, tensors = unet_to_diffusers(config.unet, own, in_channels=6, out_channels=3, context_dim=None)
        return tensors, body

    return part("unet."), part("last_unet.") if config.last_step_network else None
