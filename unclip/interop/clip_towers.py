"""transformers' CLIP towers (`text_encoder`, `image_encoder` of a pipeline) <-> one open_clip CLIP: the same tensors.

Query, key and value are one tensor there and three here, projections are transposed; nothing is computed, so that going
there and back changes no bit. The token features are the same: both are the final LayerNorm's output, and the embedding
is read at the end token, which has the vocabulary's largest number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unclip.errors import UnclipError
from unclip.interop.tensors import check_shapes

# Ours -> theirs, inside one block.
_BLOCK = {
    "ln_1": ("layer_norm1",),
    "attn.in_proj_": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_IMAGE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    **{
        f"visual.{ours}.{kind}": f"vision_model.{theirs}.{kind}"
        for ours, theirs in {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}.items()
        for kind in ("weight", "bias")
    },
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_QUICK = {"quick_gelu": True, "gelu": False}
# OpenAI's CLIPs were trained to the largest temperature that is allowed; the towers do not hold it.
LOGIT_SCALE = math.log(100)
# What stands where a checkpoint has no image encoder: open_clip builds none without.
_NO_IMAGE = {"image_size": 8, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8}

Tower = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""A state dict and its config.json."""


def clip_from_transformers(text: Tower, image: Tower | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A CLIPTextModelWithProjection and a CLIPVisionModelWithProjection -> open_clip's `model_cfg` and state dict.

    Without `image` a tower of zeros stands in its place, which nothing may ask. Raises UnclipError: options that
    open_clip's CLIP does not have, tensors missing, unknown or misshapen, towers that do not fit each other.
    """
    body, state = _text_config(text[1]), _converted(text[0], "text_encoder")
    quick, width = body.pop("quick_gelu"), body.pop("embed_dim")
    if image is None:
        vision: dict[str, Any] = dict(_NO_IMAGE)
    else:
        vision = _image_config(image[1])
        other = vision.pop("quick_gelu"), vision.pop("embed_dim")
        if other != (quick, width):
            raise UnclipError(
                f"the image encoder has {other[1]} dimensions and quick_gelu {other[0]}, the text encoder {width} and "
                f"{quick}; they are of two CLIPs"
            )
        state |= _converted(image[0], "image_encoder")
    config = {"embed_dim": width, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": body}
    own = _shapes(config)
    state["logit_scale"] = torch.tensor(LOGIT_SCALE)
    if image is None:
        blank = {name: torch.zeros(tensor.shape) for name, tensor in own.items() if name.startswith("visual.")}
        state |= blank
    check_shapes(own, state, "the CLIP of this folder")
    return config, state


def clip_to_transformers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[Tower, Tower]:
    """open_clip's `model_cfg` and state dict -> state dict and config.json of the text and of the image encoder.

    Raises UnclipError: a CLIP that transformers' classes cannot express, or weights that are incomplete.
    """
    text, vision = config["text_cfg"], config["vision_cfg"]
    allowed = {
        "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "tokenizer_kwargs"},
        "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"},
    }
    for section, known in allowed.items():
        other = sorted(set(config[section]) - known)
        if other:
            found = f"{section}.{other[0]} is {config[section][other[0]]!r}"
            raise UnclipError(f"clip: {found}; transformers' CLIP has none")
    if config.get("custom_text"):
        raise UnclipError("clip: custom_text is true; transformers' CLIP has open_clip's own text tower alone")
    shared = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": config["embed_dim"],
        "attention_dropout": 0.0,
    }
    vocabulary = text.get("vocab_size", 49408)
    text_body = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **_sizes(text, text["heads"]),
        "max_position_embeddings": text.get("context_length", 77),
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
        **shared,
    }
    image_body = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **_sizes(vision, vision["width"] // vision.get("head_width", 64)),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_channels": 3,
        **shared,
    }
    own = _shapes(config)
    check_shapes(own, state, "the CLIP")
    parts: list[dict[str, Tensor]] = []
    for prefix in ("text", "visual"):
        names = [name for name in own if name != "logit_scale" and name.startswith("visual.") == (prefix == "visual")]
        parts.append(_there(names, state))
    return (parts[0], text_body), (parts[1], image_body)


def _text_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    quick = _shared(theirs, "text_encoder")
    vocabulary, end = theirs.get("vocab_size", 49408), theirs.get("eos_token_id", 49407)
    if end not in (2, vocabulary - 1):  # 2: transformers' files from before it was said right; read at the largest
        raise UnclipError(f"the text encoder's eos_token_id is {end}; expected the last of {vocabulary} tokens")
    return {
        "embed_dim": theirs.get("projection_dim", 512),
        "quick_gelu": quick,
        "context_length": theirs.get("max_position_embeddings", 77),
        "vocab_size": vocabulary,
        "width": theirs.get("hidden_size", 512),
        "heads": theirs.get("num_attention_heads", 8),
        "layers": theirs.get("num_hidden_layers", 12),
        **_ratio(theirs.get("intermediate_size", 2048), theirs.get("hidden_size", 512)),
    }


def _image_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    quick = _shared(theirs, "image_encoder")
    width, heads = theirs.get("hidden_size", 768), theirs.get("num_attention_heads", 12)
    return {
        "embed_dim": theirs.get("projection_dim", 512),
        "quick_gelu": quick,
        "image_size": theirs.get("image_size", 224),
        "layers": theirs.get("num_hidden_layers", 12),
        "width": width,
        "head_width": width // heads,
        "patch_size": theirs.get("patch_size", 32),
        **_ratio(theirs.get("intermediate_size", 3072), width),
    }


def _shared(theirs: Mapping[str, Any], what: str) -> bool:
    kind, eps = theirs.get("hidden_act", "quick_gelu"), theirs.get("layer_norm_eps", 1e-5)
    if kind not in _QUICK:
        raise UnclipError(f"{what} has hidden_act {kind!r}; expected quick_gelu or gelu")
    if eps != 1e-5:
        raise UnclipError(f"{what} has layer_norm_eps {eps}; open_clip's CLIP has 1e-05")
    return _QUICK[kind]


def _ratio(inner: int, width: int) -> dict[str, float]:
    return {} if inner == 4 * width else {"mlp_ratio": inner / width}


def _sizes(section: Mapping[str, Any], heads: int) -> dict[str, int]:
    return {
        "hidden_size": section["width"],
        "intermediate_size": int(section["width"] * section.get("mlp_ratio", 4.0)),
        "num_hidden_layers": section["layers"],
        "num_attention_heads": heads,
    }


def _shapes(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of such a CLIP, on meta."""
    from unclip.clip import build_architecture

    with torch.device("meta"):
        state = build_architecture(dict(config)).state_dict()
    return {name: tensor.reshape(()) if name == "logit_scale" else tensor for name, tensor in state.items()}


def _blocks(names: Iterator[str] | list[str]) -> dict[str, list[str]]:
    """Ours of every tensor in a block -> theirs, for open_clip's names."""
    found: dict[str, list[str]] = {}
    for name in names:
        if ".resblocks." not in name and not name.startswith("transformer.resblocks."):
            continue
        before, rest = name.split("transformer.resblocks.")
        number, inner = rest.split(".", 1)
        stem = "vision_model" if before else "text_model"
        for ours, theirs in _BLOCK.items():
            if inner.startswith(ours):
                kind = inner.removeprefix(ours).removeprefix(".")
                found[name] = [f"{stem}.encoder.layers.{number}.{part}.{kind}" for part in theirs]
    return found


def _there(names: list[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    single, blocks = {**_TEXT, **_IMAGE}, _blocks(names)
    converted: dict[str, Tensor] = {}
    for name in names:
        if name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = state[name].t().contiguous()
        elif name in single:
            converted[single[name]] = state[name]
        else:
            for part, tensor in zip(blocks[name], state[name].chunk(len(blocks[name])), strict=True):
                converted[part] = tensor.contiguous()
    return converted


def _converted(theirs: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """One tower under our names. Position numbers, which old files hold, are no weights."""
    given = {name: tensor for name, tensor in theirs.items() if not name.endswith("position_ids")}
    prefix, stem = ("visual.", "vision_model") if what == "image_encoder" else ("", "text_model")
    numbers = {name.split(".")[3] for name in given if name.startswith(f"{stem}.encoder.layers.")}
    ours: dict[str, list[str]] = {}
    for number in sorted(numbers, key=lambda text: (len(text), text)):
        for block, parts in _BLOCK.items():
            for kind in ("weight", "bias"):
                joint = f"{block}{kind}" if block.endswith("_") else f"{block}.{kind}"
                ours[f"{prefix}transformer.resblocks.{number}.{joint}"] = [
                    f"{stem}.encoder.layers.{number}.{part}.{kind}" for part in parts
                ]
    single = _IMAGE if prefix else _TEXT
    ours |= {name: [there] for name, there in single.items()}
    transposed = "visual.proj" if prefix else "text_projection"
    ours[transposed] = [_TRANSPOSED[transposed]]
    needed = {part for parts in ours.values() for part in parts}
    problems = [f"missing {name}" for name in sorted(needed - set(given))]
    problems += [f"unknown {name}" for name in sorted(set(given) - needed)]
    if problems:
        raise UnclipError(f"{what} is no CLIP tower with a projection: {'; '.join(problems[:3])}")
    return {
        name: given[parts[0]].t().contiguous()
        if name == transposed
        else (given[parts[0]] if len(parts) == 1 else torch.cat([given[part] for part in parts]))
        for name, parts in ours.items()
    }
