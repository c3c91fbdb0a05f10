"""DALLE2-pytorch's `Decoder` -> our `Dalle2Decoder`: its base U-Net. Those behind it, which enlarge, are read by
`unclip.interop.dalle2_upsamplers`, by the same names of tensors and options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoder.dalle2 import Dalle2Decoder, Dalle2DecoderConfig
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.interop.dalle2 import Dalle2Checkpoint, Era, check_state, era_of, read_checkpoint, schedule_of

# Options of its Unet that change what it computes, and that this network does not have.
_REFUSED = {
    "self_cond": "self-conditioning",
    "combine_upsample_fmaps": "combined feature maps",
}
_HALF = {
    r"project\.(weight|bias)": r"conv.\1",
    r"norm\.(weight|bias)": r"norm.\1",
}
_ATTENTION = {
    r"norm\.g": "norm.gain",
    r"null_kv": "null",
    r"to_(q|kv)\.weight": r"to_\1.weight",
    r"to_out\.0\.weight": "out.weight",
    r"to_out\.1\.g": "out_norm.gain",
}
_LINEAR = {
    r"norm\.g": "norm.gain",
    r"to_qkv\.weight": "to_qkv.weight",
    r"to_out\.0\.weight": "out.weight",
    r"to_out\.1\.g": "out_norm.gain",
}
_RESNET = {
    r"time_mlp\.1\.(weight|bias)": r"time.\1",
    r"res_conv\.(weight|bias)": r"skip.\1",
    **{rf"block1\.{theirs}": f"first.{ours}" for theirs, ours in _HALF.items()},
    **{rf"block2\.{theirs}": f"second.{ours}" for theirs, ours in _HALF.items()},
    **{rf"cross_attn\.(?:fn\.)?{theirs}": f"cross.{ours}" for theirs, ours in _ATTENTION.items()},  # fn: before 1.14
}
_OUTER = {
    r"init_conv\.(weight|bias)": r"unet.init.convs.0.\1",
    r"init_conv\.convs\.(\d+)\.(weight|bias)": r"unet.init.convs.\1.\2",
    r"to_time_hiddens\.1\.(weight|bias)": r"unet.time_in.\1",
    r"to_time_tokens\.0\.(weight|bias)": r"unet.time_tokens.\1",
    r"to_time_cond\.0\.(weight|bias)": r"unet.time_out.\1",
    r"to_lowres_noise_cond\.1\.(weight|bias)": r"unet.level_in.\1",
    r"to_lowres_noise_cond\.3\.(weight|bias)": r"unet.level_out.\1",
    r"norm_cond\.(weight|bias)": r"unet.norm_context.\1",
    r"norm_mid_cond\.(weight|bias)": r"unet.norm_middle.\1",
    r"image_to_tokens\.0\.(weight|bias)": r"image_to_tokens.\1",
    r"to_image_hiddens\.0\.(weight|bias)": r"image_to_time.\1",
    r"text_to_cond\.(weight|bias)": r"text_to_tokens.\1",
    r"null_image_embed": "null_image_tokens",
    r"null_image_hiddens": "null_image_time",
    r"null_text_embed": "null_tokens",
    r"to_out\.(weight|bias)": r"unet.out.\1",
}
# Where blocks stand: theirs -> ours, with the block's own rules behind.
_PLACES = (
    (r"init_resnet_block", "unet.init_block", _RESNET),
    (r"final_resnet_block", "unet.final", _RESNET),
    (r"mid_block1", "unet.middle_first", _RESNET),
    (r"mid_block2", "unet.middle_second", _RESNET),
    (r"mid_attn\.fn\.fn", "unet.middle_attention.attention", _ATTENTION),
    (r"downs\.(\d+)\.1", r"unet.downs.{1}.first", _RESNET),
    (r"downs\.(\d+)\.2\.(\d+)", r"unet.downs.{1}.blocks.{2}", _RESNET),
    (r"downs\.(\d+)\.3\.fn\.fn", r"unet.downs.{1}.attention.attention", _ATTENTION),
    (r"downs\.(\d+)\.3\.fn", r"unet.downs.{1}.attention", _LINEAR),
    (r"ups\.(\d+)\.0", r"unet.ups.{1}.blocks.0", _RESNET),
    (r"ups\.(\d+)\.1\.(\d+)", r"unet.ups.{1}.blocks.{2+1}", _RESNET),
    (r"ups\.(\d+)\.2\.fn\.fn", r"unet.ups.{1}.attention.attention", _ATTENTION),
    (r"ups\.(\d+)\.2\.fn", r"unet.ups.{1}.attention", _LINEAR),
)
_RESAMPLERS = (
    (r"downs\.(\d+)\.(0|4)\.convs\.(\d+)\.(weight|bias)", r"unet.downs.{1}.{side}.convs.{3}.{4}"),
    (r"downs\.(\d+)\.(0|4)\.(weight|bias)", r"unet.downs.{1}.{side}.{3}"),
    (r"downs\.(\d+)\.(0|4)\.1\.(weight|bias)", r"unet.downs.{1}.{side}.1.{3}"),
    (r"ups\.(\d+)\.3\.net\.0\.(weight|bias)", r"unet.ups.{1}.after.0.{2}"),
    (r"ups\.(\d+)\.3\.1\.(weight|bias)", r"unet.ups.{1}.after.1.{2}"),
)


def read_dalle2_decoder(
    path: Path,
    config: Path | Mapping[str, Any] | None = None,
    version: str | None = None,
    **changes: Any,
) -> tuple[Dalle2DecoderConfig, dict[str, Tensor]]:
    """A decoder's checkpoint -> configuration and state dict of `Dalle2Decoder`. As `read_checkpoint` and
    `decoder_from_dalle2`.
    """
    checkpoint = read_checkpoint(path, config, version)
    if checkpoint.kind != "decoder":
        raise UnclipError(f"{checkpoint.file} holds a {checkpoint.kind} of DALLE2-pytorch, expected a decoder")
    return decoder_from_dalle2(checkpoint, **changes)


def decoder_from_dalle2(
    checkpoint: Dalle2Checkpoint, text_length: int = 77, **changes: Any
) -> tuple[Dalle2DecoderConfig, dict[str, Tensor]]:
    """`text_length` is that of the CLIP; `changes` sets other fields of the configuration (steps, guidance, …).

    Raises UnclipError: an unsupported era, no configuration of the run (a U-Net's tensors do not tell its norms' groups
    or its similarities), options that this network does not have, tensors missing or unknown.
    """
    origin = str(checkpoint.file)
    told = checkpoint.config
    if told is None or not told.get("unets"):
        raise UnclipError(
            f"{origin} comes without the configuration of its run, which its tensors do not tell; put "
            "decoder_config.json beside it, or pass config"
        )
    era = era_of(checkpoint.version, origin)
    unet: dict[str, Any] = dict(told["unets"][0])
    if unet.get("lowres_cond"):
        raise UnclipError(f"{origin} begins with an upsampler (lowres_cond), which is not supported")
    check_options(unet, origin)
    state = unet_state(checkpoint.state, 0, origin)
    for name in ("null_image_tokens", "null_tokens", "null_image_time"):
        if name not in state:
            raise UnclipError(f"{origin} is no whole decoder of DALLE2-pytorch: what stands for {name} is missing")
    if "image_to_tokens.weight" not in state:
        raise UnclipError(f"{origin} does not read image embeddings through a projection of their own; not supported")
    if unet.get("text_embed_dim") is None or not unet.get("cond_on_text_encodings"):
        unet["cond_on_text_encodings"] = False
    ours = parse_config(
        Dalle2DecoderConfig,
        _body(checkpoint, told, unet, state, era, text_length) | changes,
        f"the decoder of {origin}",
    )
    with torch.device("meta"):
        own = Dalle2Decoder(ours)
    check_state(own, state, origin)
    return ours, state


def check_options(unet: Mapping[str, Any], origin: str) -> None:
    """UnclipError: options of a U-Net that change what it computes, and that the network here does not have."""
    for name, what in _REFUSED.items():
        if unet.get(name):
            raise UnclipError(f"{origin} uses {what} ({name}), which is not supported")


def unet_state(state: Mapping[str, Tensor], number: int, origin: str) -> dict[str, Tensor]:
    """The tensors of `unets.number` under our names, float32. UnclipError: it is not there, or has unknown ones."""
    own = {n.removeprefix(f"unets.{number}."): v for n, v in state.items() if n.startswith(f"unets.{number}.")}
    if not own:
        raise UnclipError(
            f"{origin} holds no U-Net of the first stage (unets.0); it cannot be a decoder by itself"
            if number == 0
            else f"{origin} holds no U-Net unets.{number}"
        )
    found = {_ours(name, origin): tensor.float() for name, tensor in own.items()}
    found = {name: v.flatten() if name.endswith("norm.gain") else v for name, v in found.items()}
    return {name: v.reshape(v.shape[1:]) if name.startswith("null_") else v for name, v in found.items()}


def diffusion_of(checkpoint: Dalle2Checkpoint, told: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The process of `unets.number`, as a section of our configuration. UnclipError: one that is not supported."""
    origin = str(checkpoint.file)
    learned = at(told.get("learned_variance", True), number, beyond=False)
    if learned and told.get("learned_variance_constrain_frac"):
        raise UnclipError(f"{origin} squeezes its learned variance by a sigmoid, which is not supported")
    asked = at(told.get("beta_schedule"), number)
    if asked is None and number and number == len(told["unets"]) - 1:
        asked = "linear"  # of the last of several; cosine before it
    table = checkpoint.state.get(f"noise_schedulers.{number}.betas")
    schedule, timesteps = schedule_of(table, asked if table is None or told.get("beta_schedule") else None, origin)
    if table is None:
        timesteps = told.get("timesteps") or timesteps
    prediction = "epsilon"
    if at(told.get("predict_x_start"), number):
        prediction = "x_start"
    if at(told.get("predict_v"), number):
        prediction = "v"
    clip = None
    if told.get("use_dynamic_thres"):
        clip = {"kind": "dynamic", "percentile": told.get("dynamic_thres_percentile", 0.95)}
    return {
        "schedule": schedule,
        "timesteps": timesteps,
        "prediction": prediction,
        "variance": "learned_range" if learned else "fixed_small",
        "x_start_clip": clip,
    }


def at(value: Any, number: int, beyond: Any = None) -> Any:
    """An option of `unets.number`: DALLE2-pytorch takes one for all, or a list of one each. `beyond`: that of those
    which an option given once or a shorter list is not for; None: one for all.
    """
    if isinstance(value, (list, tuple)):
        return value[number] if number < len(value) else beyond
    return value if number == 0 or beyond is None else beyond


def _body(
    checkpoint: Dalle2Checkpoint,
    told: Mapping[str, Any],
    unet: Mapping[str, Any],
    state: Mapping[str, Tensor],
    era: Era,
    text_length: int,
) -> dict[str, Any]:
    dim = state["image_to_tokens.weight"].shape[1]
    shape = shape_of(unet, state, era)
    diffusion = diffusion_of(checkpoint, told, 0)
    shape["image_size"] = at(told.get("image_sizes"), 0) or told.get("image_size") or 64
    return {
        "version": era.version,
        "embedding_dim": dim,
        "token_dim": shape["text_dim"] or dim,
        "text_length": text_length,
        "context_dim": shape["cond_dim"],
        "image_tokens": shape["num_image_tokens"],
        "drop_embedding": told.get("image_cond_drop_prob", 0.1),
        "drop_text": told.get("text_cond_drop_prob", 0.5),
        "unet": shape,
        "diffusion": diffusion,
        "steps": at(told.get("sample_timesteps"), 0) or min(100, diffusion["timesteps"]),
        "guidance": 2.0,
    }


def shape_of(unet: Mapping[str, Any], state: Mapping[str, Tensor], era: Era) -> dict[str, Any]:
    """Its Unet's options -> ours; sizes that the tensors tell come from them."""
    levels = len(unet.get("dim_mults", (1, 2, 4, 8)))

    def each(name: str, default: Any) -> list[Any]:
        value = unet.get(name, default)
        return list(value) if isinstance(value, (list, tuple)) else [value] * levels

    crossed = unet.get("init_cross_embed", True)
    single = state["unet.init.convs.0.weight"].shape[-1]
    text = state.get("text_to_tokens.weight")
    return {
        "dim": unet["dim"],
        "dim_mults": list(unet.get("dim_mults", (1, 2, 4, 8))),
        "init_dim": unet.get("init_dim"),
        "cond_dim": state["null_tokens"].shape[1],
        "num_image_tokens": state["null_image_tokens"].shape[0],
        "num_time_tokens": state["unet.time_tokens.weight"].shape[0] // state["null_tokens"].shape[1],
        "text_dim": None if text is None else text.shape[1],
        "max_text_len": state["null_tokens"].shape[0],
        "add_image_to_time": "image_to_time.weight" in state,
        "self_attn": each("self_attn", False),
        "linear_attn": bool(unet.get("sparse_attn")),
        "linear": era.linear_attention,
        "attn_heads": unet.get("attn_heads", 16),
        "attn_head_dim": unet.get("attn_dim_head", 32),
        "similarity": era.similarity(bool(unet.get("cosine_sim_self_attn"))),
        "cross_similarity": "cosine" if unet.get("cosine_sim_cross_attn") else "scaled",
        "resnet_groups": each("resnet_groups", 8),
        "num_resnet_blocks": each("num_resnet_blocks", 2),
        "standardised": bool(unet.get("resnet_weight_standardization")),
        "init_kernels": list(unet.get("init_cross_embed_kernel_sizes", (3, 7, 15))) if crossed else [single],
        "down_kernels": list(unet.get("cross_embed_downsample_kernel_sizes", (2, 4)))
        if unet.get("cross_embed_downsample")
        else [],
        "down": "unshuffle" if era.number >= (1, 10, 0) else "convolution",
        "memory_efficient": bool(unet.get("memory_efficient")),
        "skip_scale": 2**-0.5 if unet.get("scale_skip_connection") else 1.0,
        "shuffle_up": unet.get("pixel_shuffle_upsample", True),
        "final_kernel": state["unet.out.weight"].shape[-1],
    }


def _ours(name: str, origin: str) -> str:
    """One tensor's name."""
    for pattern, ours in _OUTER.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    for place, place_ours, rules in _PLACES:
        for rule, behind in rules.items():
            if inner := re.fullmatch(rf"(?P<place>{place})\.(?P<rest>{rule})", name):
                where = re.fullmatch(place, inner["place"])
                rest = re.fullmatch(rule, inner["rest"])
                assert where is not None and rest is not None
                return f"{_placed(place_ours, where)}.{rest.expand(behind)}"
    for pattern, ours in _RESAMPLERS:
        if found := re.fullmatch(pattern, name):
            side = "before" if found.groups()[1] == "0" else "after"
            return _placed(ours.replace("{side}", side), found)
    raise UnclipError(f"{origin} holds {name}, which no supported decoder of DALLE2-pytorch has")


def _placed(template: str, found: re.Match[str]) -> str:
    filled = template.replace("{2+1}", str(int(found[2]) + 1)) if "{2+1}" in template else template
    for number, value in enumerate(found.groups(), 1):
        filled = filled.replace(f"{{{number}}}", value)
    return filled
