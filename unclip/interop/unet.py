"""diffusers' `UNet2DConditionModel` and `UNet2DModel` of Karlo's kind <-> our ADM U-Net: the same tensors, other names.

Of Karlo's kind means: residual blocks that resample, attention whose keys and values take the context in front of their
own (`SimpleCrossAttn…`), or no attention at all. Our query, key and value projections are one tensor, theirs are
three; nothing is computed, so that going there and back changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.nn import UNetConfig

# Ours -> theirs, inside one block.
_RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embedding": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "context_kv": ("add_k_proj", "add_v_proj"),
    "out": ("to_out.0",),
}
_PLAIN_DOWN, _PLAIN_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
_CROSS_DOWN, _CROSS_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
_CROSS_MIDDLE = "UNetMidBlock2DSimpleCrossAttn"
# Options of both classes that change the network; ours is the one of these values, which are also diffusers' defaults.
_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "class_embeddings_concat": False,
    "num_attention_heads": None,
}


def unet_from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """State dict and config.json of a `UNet2DConditionModel` or `UNet2DModel` -> our configuration and state dict.

    Raises UnclipError: blocks or options that our U-Net does not have, tensors missing or unknown.
    """
    ours = unet_config_from_diffusers(config)
    wanted = dict(_names(ours, state))
    needed = {name for theirs in wanted.values() for name in theirs}
    missing, unknown = sorted(needed - set(state)), sorted(set(state) - needed)
    if missing or unknown:
        problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UnclipError(f"the weights do not fit the U-Net of their config.json: {'; '.join(problems[:3])}{more}")
    return ours, {name: _joined([state[part] for part in theirs]) for name, theirs in wanted.items()}


def unet_to_diffusers(
    config: UNetConfig, state: Mapping[str, Tensor], *, in_channels: int, out_channels: int, context_dim: int | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our U-Net -> config.json and state dict of a `UNet2DConditionModel`, or, without `context_dim`, a `UNet2DModel`.

    Raises UnclipError: a U-Net that they cannot express, or weights that are incomplete.
    """
    body = unet_config_to_diffusers(config, in_channels, out_channels, context_dim)
    converted: dict[str, Tensor] = {}
    names = dict(_names(config, state, ours=True))
    unknown = sorted(set(state) - set(names))
    missing = sorted(set(names) - set(state))
    if unknown or missing:
        raise UnclipError(f"the weights are not this U-Net's: {(['missing ' + n for n in missing] + unknown)[0]}")
    for name, theirs in names.items():
        for part, tensor in zip(theirs, state[name].chunk(len(theirs)), strict=True):
            converted[part] = tensor.contiguous()
    return body, converted


def unet_config_from_diffusers(config: Mapping[str, Any]) -> UNetConfig:
    """Our configuration for a config.json of either class. Raises UnclipError: what our U-Net does not have."""
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    attends = [kind == _CROSS_DOWN for kind in down]
    mirrored = [_CROSS_UP if cross else _PLAIN_UP for cross in reversed(attends)]
    if set(down) - {_PLAIN_DOWN, _CROSS_DOWN} or up != mirrored:
        raise UnclipError(
            f"this U-Net has the blocks {down} and {up}; {_PLAIN_DOWN} and {_CROSS_DOWN} with their mirror images can "
            "be converted"
        )
    for name, value in _FIXED.items():
        given = config.get(name, value)
        if given != value:
            raise UnclipError(f"this U-Net has {name} {given!r}; only {value!r} can be converted")
    if config.get("class_embed_type") not in (None, "identity"):
        raise UnclipError(f"this U-Net has class_embed_type {config['class_embed_type']!r}; expected 'identity'")
    head, middle = config.get("attention_head_dim", 8), _middle_attends(config)
    if (any(attends) or middle) and not isinstance(head, int):
        raise UnclipError(f"this U-Net has attention_head_dim {head!r}; one number for all levels can be converted")
    size, widths = config["sample_size"], list(config["block_out_channels"])
    return parse_config(
        UNetConfig,
        {
            "image_size": size,
            "model_channels": widths[0],
            "channel_mult": [_whole(width / widths[0]) for width in widths],
            "num_res_blocks": config.get("layers_per_block", 2),
            "attention_resolutions": [size // 2**level for level, cross in enumerate(attends) if cross],
            "middle_attention": None if middle == attends[-1] else middle,
            **({"head_channels": head} if any(attends) or middle else {}),
            "scale_shift_norm": config.get("resnet_time_scale_shift", "default") == "scale_shift",
            "norm_groups": config.get("norm_num_groups", 32),
            "norm_eps": config.get("norm_eps", 1e-5),
            "dropout": config.get("dropout", 0.0),
        },
        origin="the converted U-Net",
    )


def unet_config_to_diffusers(
    config: UNetConfig, in_channels: int, out_channels: int, context_dim: int | None
) -> dict[str, Any]:
    """The config.json of the diffusers class that is the same network. Raises UnclipError: there is none."""
    widths = list(config.widths)
    attends = [_edge(config, level) in config.attention_resolutions for level in range(len(widths))]
    middle = attends[-1] if config.middle_attention is None else config.middle_attention
    problems = [
        text
        for text, found in (
            ("patch_size is not 1", config.patch_size != 1),
            ("refine_channels is not 0", config.refine_channels != 0),
            ("resblock_updown is false", not config.resblock_updown),
            ("attention without context", context_dim is None and (any(attends) or middle)),
            ("the middle blocks have no attention", context_dim is not None and not middle),
            (f"a width is not a multiple of {config.norm_groups}", any(w % config.norm_groups for w in widths)),
        )
        if found
    ]
    if problems:
        raise UnclipError(f"diffusers has no such U-Net: {'; '.join(problems)}")
    body: dict[str, Any] = {
        "sample_size": config.image_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "down_block_types": [_CROSS_DOWN if cross else _PLAIN_DOWN for cross in attends],
        "up_block_types": [_CROSS_UP if cross else _PLAIN_UP for cross in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks
        if isinstance(config.num_res_blocks, int)
        else list(config.num_res_blocks),
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "dropout": config.dropout,
    }
    if context_dim is None:
        return {"_class_name": "UNet2DModel", **body, "add_attention": False}
    cross = {"cross_attention_dim": context_dim, "attention_head_dim": config.head_channels}
    return {
        "_class_name": "UNet2DConditionModel",
        **body,
        **cross,
        "mid_block_type": _CROSS_MIDDLE,
        "class_embed_type": "identity",
    }


def _middle_attends(config: Mapping[str, Any]) -> bool:
    kind = config.get("mid_block_type", "UNetMidBlock2D")
    if kind == _CROSS_MIDDLE:
        return True
    if kind != "UNetMidBlock2D" or config.get("add_attention", True):
        raise UnclipError(
            f"this U-Net has the middle block {kind} with attention of another kind; {_CROSS_MIDDLE}, or none at all "
            "(add_attention false), can be converted"
        )
    return False


def _edge(config: UNetConfig, level: int) -> int:
    return config.image_size // config.patch_size // 2**level


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _names(config: UNetConfig, state: Mapping[str, Tensor], ours: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Our name of every tensor -> theirs, several where we keep them joined. A shortcut exists where `state`, which is
    theirs unless `ours`, has one: where the widths differ.
    """
    for own, their, kind in modules_of(config):
        for tensor in ("weight", "bias"):
            if kind == "plain":
                yield f"{own}.{tensor}", [f"{their}.{tensor}"]
            elif kind == "residual":
                for name, name_there in _RESIDUAL.items():
                    pair = f"{own}.{name}.{tensor}", f"{their}.{name_there}.{tensor}"
                    if name != "shortcut" or pair[0 if ours else 1] in state:
                        yield pair[0], [pair[1]]
            else:
                for name, names_there in _ATTENTION.items():
                    yield f"{own}.{name}.{tensor}", [f"{their}.{part}.{tensor}" for part in names_there]


def modules_of(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """Our module, diffusers' module and their kind, in the order in which our U-Net is built."""
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    counts = (blocks,) * levels if isinstance(blocks, int) else blocks
    attends = [_edge(config, level) in config.attention_resolutions for level in range(levels)]
    yield "time_embed.0", "time_embedding.linear_1", "plain"
    yield "time_embed.2", "time_embedding.linear_2", "plain"
    yield "conv_in", "conv_in", "plain"
    number = 0
    for level in range(levels):
        for block in range(counts[level]):
            yield f"down.{number}.res", f"down_blocks.{level}.resnets.{block}", "residual"
            if attends[level]:
                yield f"down.{number}.attention", f"down_blocks.{level}.attentions.{block}", "attention"
            number += 1
        if level < levels - 1:
            yield f"down.{number}.res", f"down_blocks.{level}.downsamplers.0", "residual"
            number += 1
    yield "middle.first", "mid_block.resnets.0", "residual"
    if attends[-1] if config.middle_attention is None else config.middle_attention:
        yield "middle.attention", "mid_block.attentions.0", "attention"
    yield "middle.last", "mid_block.resnets.1", "residual"
    number = 0
    for place, level in enumerate(reversed(range(levels))):
        for block in range(counts[level] + 1):
            yield f"up.{number}.res", f"up_blocks.{place}.resnets.{block}", "residual"
            if attends[level]:
                yield f"up.{number}.attention", f"up_blocks.{place}.attentions.{block}", "attention"
            if level > 0 and block == counts[level]:
                yield f"up.{number}.resample", f"up_blocks.{place}.upsamplers.0", "residual"
            number += 1
    yield "norm_out", "conv_norm_out", "plain"
    yield "conv_out", "conv_out", "plain"
