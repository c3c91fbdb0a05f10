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
        network = Decoder(config)
    for name, tensor in network.state_dict().items():
        if name not in _NULL_TEXT and (name not in converted or converted[name].shape != tensor.shape):
            found = tuple(converted[name].shape) if name in converted else "missing"
            raise UnclipError(
                f"the U-Net and the UnCLIPTextProjModel do not fit each other: {name} is {found}, expected "
                f"{tuple(tensor.shape)}"
            )
        if name in _NULL_TEXT:
            converted[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if null is not None:
        network = network.to_empty(device="cpu") if False else network
    return config, _with_null_text(config, converted, null)


def _with_null_text(config: DecoderConfig, state: dict[str, Tensor], null: TextFeatures | None) -> dict[str, Tensor]:
    return state
