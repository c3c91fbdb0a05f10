"""diffusers' `UNet2DConditionModel` + `UnCLIPTextProjModel` (Karlo's decoder) <-> our decoder.

Its embeddings have raw length and are not scaled, the text embedding is added to the timestep embedding as well, the
image's tokens stand first with the token's index varying fastest, and a dropped caption is the CLIP's features of "".
Tensors are renamed and joined, never computed with, so that going there and back changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from decoder import Decoder, DecoderConfig
from decoder.text import null_text_state
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.interop.unet import unet_from_diffusers, unet_to_diffusers

# Ours -> UnCLIPTextProjModel's.
_PROJECTIONS = {
    "null_embedding": "learned_classifier_free_guidance_embeddings",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in {
            "text_embedding_to_time": "embedding_proj",
            "embedding_to_time": "clip_image_embeddings_project_to_time_embeddings",
            "embedding_to_tokens": "clip_extra_context_tokens_proj",
            "text_to_tokens": "encoder_hidden_states_proj",
            "text_norm": "text_encoder_hidden_states_norm",
        }.items()
        for kind in ("weight", "bias")
    },
}
_NULL_TEXT = ("null_text", "null_mask", "null_text_embedding")
_KARLO: dict[str, Any] = {
    "embedding_length": "raw",
    "image_tokens_first": True,
    "image_tokens_interleaved": True,
    "text_embedding_to_time": True,
    "null_text": "clip",
}


def decoder_from_diffusers(
    unet: tuple[Mapping[str, Tensor], Mapping[str, Any]],
    text_projection: tuple[Mapping[str, Tensor], Mapping[str, Any]],
    null: TextFeatures | None = None,
    *,
    text_length: int = 77,
    **changes: Any,
) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """(State dict, config.json) of the two models -> our configuration and the state dict of `Decoder`.

    `null` are the CLIP's features of the empty text, a batch of one with `norm`; without them the decoder cannot sample
    until `Decoder.set_null_text`. `changes` sets other fields of the configuration: steps, guidance, sampler, …, by
    default Karlo's (25 steps, guidance 8, ε and a learned variance on the cosine schedule).
    Raises UnclipError: blocks or options that our network does not have, tensors missing or unknown, models that do
    not fit each other.
    """
    shape, tensors = unet_from_diffusers(*unet)
    state, projection = text_projection
    missing, unknown = sorted(set(_PROJECTIONS.values()) - set(state)), sorted(set(state) - set(_PROJECTIONS.values()))
    if missing or unknown:
        problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
        raise UnclipError(f"this is no UnCLIPTextProjModel: {'; '.join(problems[:3])}")
    channels = unet[1].get("in_channels", 4), unet[1].get("out_channels", 4)
    if channels not in ((3, 3), (3, 6)):
        raise UnclipError(
            f"this U-Net has {channels[0]} input and {channels[1]} output channels; an unCLIP decoder has 3 and 6, or "
            "3 without a learned variance"
        )
    width = projection.get("clip_embeddings_dim", 768)
    config = parse_config(
        DecoderConfig,
        {
            "embedding_dim": width,
            "token_dim": state["encoder_hidden_states_proj.weight"].shape[1],
            "text_length": text_length,
            "context_dim": projection["cross_attention_dim"],
            "image_tokens": projection.get("clip_extra_context_tokens", 4),
            **_KARLO,
            "unet": shape.model_dump(),
            "diffusion": {"variance": "learned_range" if channels[1] == 6 else "fixed_small"},
            "steps": 25,
            "guidance": 8.0,
            **changes,
        },
        origin="the converted decoder",
    )
    converted = {f"unet.{name}": tensor for name, tensor in tensors.items()}
    converted |= {ours: state[theirs] for ours, theirs in _PROJECTIONS.items()}
    with torch.device("meta"):
        own = Decoder(config).state_dict()
    empty = {name: torch.zeros(own[name].shape, dtype=own[name].dtype) for name in _NULL_TEXT}
    converted |= empty if null is None else null_text_state(null, config)
    for name, tensor in own.items():
        if converted[name].shape != tensor.shape:
            raise UnclipError(
                f"the parts of this decoder do not fit each other: {name} is {tuple(converted[name].shape)}, expected "
                f"{tuple(tensor.shape)}"
            )
    return config, converted


def decoder_to_diffusers(
    config: DecoderConfig, state: Mapping[str, Tensor]
) -> tuple[tuple[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]:
    """Our decoder of Karlo's kind -> (state dict, config.json) of a `UNet2DConditionModel` and of its
    `UnCLIPTextProjModel`.

    The stored features of the empty text are left out: diffusers' pipeline encodes "" itself.
    Raises UnclipError: a decoder that they cannot express, or weights that are incomplete.
    """
    none = dict.fromkeys(("spatial_seed", "text_seed", "inpainting"), False)
    wanted = {**_KARLO, **none, "embedding_hidden": 0, "embedding_noise_levels": 0, "latent": None}
    found = {name: getattr(config, name) for name in wanted}
    problems = [f"{name} is {found[name]!r}" for name, value in wanted.items() if found[name] != value]
    if config.scale != 1:
        problems.append(f"embedding_scale is {config.scale}")
    if config.token_dim != config.embedding_dim:
        problems.append(f"token_dim {config.token_dim} is not embedding_dim {config.embedding_dim}")
    if problems:
        raise UnclipError(
            f"diffusers' unCLIP has no such decoder: {'; '.join(problems)}; configs/decoder/karlo.yaml has its shape"
        )
    missing = sorted(name for name in _PROJECTIONS if name not in state)
    if missing:
        raise UnclipError(f"the weights are incomplete: {missing[0]} is missing")
    own = {name.removeprefix("unet."): tensor for name, tensor in state.items() if name.startswith("unet.")}
    learned = config.diffusion.variance == "learned_range"
    body, tensors = unet_to_diffusers(
        config.unet, own, in_channels=3, out_channels=6 if learned else 3, context_dim=config.context_dim
    )
    projection = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": config.image_tokens,
        "clip_embeddings_dim": config.embedding_dim,
        "time_embed_dim": 4 * config.unet.model_channels,
        "cross_attention_dim": config.context_dim,
    }
    return (tensors, body), ({theirs: state[ours] for ours, theirs in _PROJECTIONS.items()}, projection)
