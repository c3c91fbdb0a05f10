"""diffusers' `PriorTransformer` (Karlo, Kandinsky 2.1) <-> our diffusion prior: the same network under other names.

Its embeddings are raw, its text embedding is not scaled, its null caption is the CLIP's features of "", and Karlo's
process has 1000 steps of the cosine schedule, predicting x_0. Tensors are renamed and at most reshaped, so that going
there and back changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prior import Prior, PriorConfig
from prior.conditioning import clip_null
from unclip.clip import TextFeatures
from unclip.config import DiffusionConfig, parse_config
from unclip.errors import UnclipError

_OUTER = {
    "positional_embedding": "positions",
    "prd_embedding": "query",
    "clip_mean": "mean",
    "clip_std": "std",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in {
            "time_embedding.linear_1": "time_in.0",
            "time_embedding.linear_2": "time_in.2",
            "proj_in": "image_in",
            "embedding_proj": "text_in",
            "encoder_hidden_states_proj": "token_in",
            "norm_out": "transformer.final_norm",
            "proj_to_clip_embeddings": "out",
        }.items()
        for kind in ("weight", "bias")
    },
}
# x-transformers keeps attention and feed-forward as layers of their own, each [norms, block, residual].
_BLOCK = {
    "norm1": "{attention}.0.0",
    "attn1.to_q": "{attention}.1.to_q",
    "attn1.to_k": "{attention}.1.to_k",
    "attn1.to_v": "{attention}.1.to_v",
    "attn1.to_out.0": "{attention}.1.to_out",
    "norm3": "{feedforward}.0.0",
    "ff.net.0.proj": "{feedforward}.1.ff.0.0",
    "ff.net.2": "{feedforward}.1.ff.2",
}
# Options of PriorTransformer that change the network; ours is the one of these values.
_FIXED: dict[str, Any] = {
    "additional_embeddings": 4,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
}
_SIZES = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
}


def prior_from_diffusers(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    null: TextFeatures | None = None,
    **sampling: Any,
) -> tuple[PriorConfig, dict[str, Tensor]]:
    """A PriorTransformer's state dict and config.json -> our configuration and the state dict of `Prior`.

    `null` are the CLIP's features of the empty text, a batch of one with `norm`, which guidance needs; without them
    the prior samples at guidance 1 only. `sampling` sets other fields of the configuration: steps, guidance,
    clip_range, candidates, …, by default Karlo's (25 steps, guidance 4, x̂_0 clamped to ±10, one sample).
    Raises UnclipError: options of PriorTransformer that this network does not have, tensors missing or unknown.
    """
    ours = _config_from_diffusers(config, sampling)
    names = _names(ours)
    missing, unknown = sorted(set(names) - set(state)), sorted(set(state) - set(names))
    if missing or unknown:
        problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UnclipError(f"this is no PriorTransformer of {ours.depth} blocks: {'; '.join(problems[:3])}{more}")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Prior(ours).state_dict().items()}
    converted = {}
    for theirs, name in names.items():
        tensor = state[theirs]
        if tensor.numel() != shapes[name].numel():
            raise UnclipError(f"{theirs} is {tuple(tensor.shape)}, expected {tuple(shapes[name])} by its config.json")
        converted[name] = tensor.reshape(shapes[name])
    if null is not None:
        return ours, {**converted, **clip_null(null, "raw")}
    empty = {"clip_null_mask": torch.bool, "clip_null_tokens": torch.float32, "clip_null_embedding": torch.float32}
    return ours, {**converted, **{name: torch.zeros(shapes[name], dtype=dtype) for name, dtype in empty.items()}}


def prior_to_diffusers(config: PriorConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our diffusion prior of Karlo's shape -> the config.json and state dict of a PriorTransformer.

    The stored features of the empty text are left out: diffusers' pipeline encodes "" itself.
    Raises UnclipError: a prior that a PriorTransformer cannot express.
    """
    _check_expressible(config)
    theirs = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": config.embedding_dim,
        "num_embeddings": config.text_length,
        "dropout": config.dropout,
        **_FIXED,
    }
    converted = {}
    for name, ours in _names(config).items():
        if ours not in state:
            raise UnclipError(f"the weights are incomplete: {ours} is missing")
        tensor = state[ours]
        if name == "prd_embedding":
            tensor = tensor[None, None]
        elif name in ("positional_embedding", "clip_mean", "clip_std"):
            tensor = tensor[None]
        converted[name] = tensor
    return {"_class_name": "PriorTransformer", **theirs}, converted


def _config_from_diffusers(config: Mapping[str, Any], sampling: Mapping[str, Any]) -> PriorConfig:
    size = {name: config.get(name, default) for name, default in _SIZES.items()}
    width = size["num_attention_heads"] * size["attention_head_dim"]
    wanted = {**_FIXED, "time_embed_dim": width}
    wanted |= {"embedding_proj_dim": size["embedding_dim"], "clip_embed_dim": size["embedding_dim"]}
    for name, value in wanted.items():
        given = config.get(name, value)
        if given != value and not (given is None and name.endswith("_dim")):
            raise UnclipError(f"this PriorTransformer has {name} {given!r}; only {value!r} can be converted")
    return parse_config(
        PriorConfig,
        {
            "embedding_dim": size["embedding_dim"],
            "token_dim": size["embedding_dim"],
            "text_length": size["num_embeddings"],
            "width": width,
            "depth": size["num_layers"],
            "heads": size["num_attention_heads"],
            "dropout": config.get("dropout", 0.0),
            "attention_bias": True,
            "norm_bias": True,
            "embedding_length": "raw",
            "null_text": "clip",
            "diffusion": DiffusionConfig(prediction="x_start").model_dump(),
            "steps": 25,
            "guidance": 4.0,
            "candidates": 1,
            **sampling,
        },
        origin="the converted prior",
    )


def _check_expressible(config: PriorConfig) -> None:
    wanted = {
        "attention_bias": True,
        "norm_bias": True,
        "embedding_length": "raw",
        "null_text": "clip",
        "text_encoder": None,
        "normalisation": "standardise",
    }
    found = {name: getattr(config, name) for name in wanted}
    problems = [f"{name} is {found[name]!r}" for name, value in wanted.items() if found[name] != value]
    if config.text_scale not in (None, 1.0):
        problems.append(f"text_scale is {config.text_scale}")
    if config.token_dim != config.embedding_dim:
        problems.append(f"token_dim {config.token_dim} is not embedding_dim {config.embedding_dim}")
    if problems:
        raise UnclipError(
            f"diffusers' PriorTransformer has no such prior: {'; '.join(problems)}; "
            "configs/prior/karlo.yaml has its shape"
        )


def _names(config: PriorConfig) -> dict[str, str]:
    """diffusers' name of every tensor -> ours."""
    names = dict(_OUTER)
    for block in range(config.depth):
        layers = {
            "attention": f"transformer.layers.{2 * block}",
            "feedforward": f"transformer.layers.{2 * block + 1}",
        }
        for theirs, ours in _BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"transformer_blocks.{block}.{theirs}.{kind}"] = f"{ours.format(**layers)}.{kind}"
    return names
