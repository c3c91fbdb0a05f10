"""DALLE2-pytorch's `DiffusionPrior` -> our `Dalle2Prior`: tensors renamed, sizes from them, numerics by version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prior.dalle2 import Dalle2Prior, Dalle2PriorConfig
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.interop.dalle2 import Dalle2Checkpoint, Era, check_state, era_of, read_checkpoint, renamed, schedule_of

_BLOCK = r"causal_transformer\.layers\.(\d+)\."
_RULES = {
    r"learned_query": "query",
    r"null_text_encodings?|null_text_embed": "null_tokens",
    r"null_text_embeds": "null_text",
    r"null_image_embed": "null_image",
    r"to_text_embeds\.0\.(weight|bias)": r"text_in.\1",
    r"to_image_embeds\.0\.(weight|bias)": r"image_in.\1",
    r"to_time_embeds\.0\.weight": "time_in.weight",
    r"to_time_embeds\.0\.1\.net\.0\.0\.(weight|bias)": r"time_in.0.\1",
    r"to_time_embeds\.0\.1\.net\.1\.0\.(weight|bias)": r"time_in.2.\1",
    r"to_time_embeds\.0\.1\.net\.2\.(weight|bias)": r"time_in.4.\1",
    r"causal_transformer\.rel_pos_bias\.relative_attention_bias\.weight": "position_bias.weight",
    r"causal_transformer\.init_norm\.g": "norm_in.gain",
    r"causal_transformer\.norm\.g": "norm_out.gain",
    r"causal_transformer\.project_out\.weight": "out.weight",
    _BLOCK + r"0\.rotary_emb\.freqs": "frequencies",  # one module under the name of every layer
    _BLOCK + r"0\.norm\.g": r"blocks.\1.attention.norm.gain",
    _BLOCK + r"0\.null_kv": r"blocks.\1.attention.null",
    _BLOCK + r"0\.to_(q|kv)\.weight": r"blocks.\1.attention.to_\2.weight",
    _BLOCK + r"0\.to_out\.0\.weight": r"blocks.\1.attention.out.weight",
    _BLOCK + r"0\.to_out\.1\.g": r"blocks.\1.attention.out_norm.gain",
    _BLOCK + r"1\.0\.g": r"blocks.\1.feedforward.norm.gain",
    _BLOCK + r"1\.1\.weight": r"blocks.\1.feedforward.up.weight",
    _BLOCK + r"1\.3\.g": r"blocks.\1.feedforward.inner_norm.gain",
    _BLOCK + r"1\.5\.weight": r"blocks.\1.feedforward.down.weight",
}


def read_dalle2_prior(
    path: Path,
    config: Path | Mapping[str, Any] | None = None,
    version: str | None = None,
    **changes: Any,
) -> tuple[Dalle2PriorConfig, dict[str, Tensor]]:
    """A prior's checkpoint -> configuration and state dict of `Dalle2Prior`. As `read_checkpoint` and
    `prior_from_dalle2`.
    """
    checkpoint = read_checkpoint(path, config, version)
    if checkpoint.kind != "prior":
        raise UnclipError(f"{checkpoint.file} holds a {checkpoint.kind} of DALLE2-pytorch, expected a prior")
    return prior_from_dalle2(checkpoint, **changes)


def prior_from_dalle2(
    checkpoint: Dalle2Checkpoint, text_length: int = 77, **changes: Any
) -> tuple[Dalle2PriorConfig, dict[str, Tensor]]:
    """`text_length` is that of the CLIP; `changes` sets other fields of the configuration (steps, guidance, …).

    Sizes come from the tensors; the run's configuration, where there is one, adds how the process is sampled.
    Raises UnclipError: an unsupported era, a self-conditioned prior, tensors missing or unknown.
    """
    origin = str(checkpoint.file)
    told = checkpoint.config or {}
    net = {
        name.removeprefix("net."): tensor for name, tensor in checkpoint.state.items() if name.startswith("net.")
    } or {name: tensor for name, tensor in checkpoint.state.items() if not name.startswith("noise_scheduler.")}
    _check(net, told, checkpoint)
    era = era_of(checkpoint.version, origin)
    schedule, timesteps = schedule_of(checkpoint.state.get("noise_scheduler.betas"), told.get("beta_schedule"), origin)
    state = renamed(net, _RULES, origin)
    sizes = _sizes(state, era, origin)
    prediction = "v" if told.get("predict_v") else "x_start" if told.get("predict_x_start", True) else "epsilon"
    dim = sizes["embedding_dim"]
    if not sizes["discrete_time"] and era.number in ((1, 10, 7), (1, 10, 8)):
        raise UnclipError(f"{origin}: continuous time in {era.version} has not been compared; an unsupported era")
    body = {
        **sizes,
        "version": era.version,
        "text_length": text_length,
        "text_tokens": told.get("condition_on_text_encodings", True),
        "similarity": era.similarity(),
        "relaxed": era.relaxed,
        "image_scale": told.get("image_embed_scale") or dim**0.5,
        "clamp_length": bool(told.get("sampling_clamp_l2norm")) and prediction == "x_start",
        "clip_range": None if prediction == "x_start" else 1.0,
        "drop_text": told.get("text_cond_drop_prob") or told.get("cond_drop_prob") or 0.0,
        "diffusion": {"schedule": schedule, "timesteps": timesteps, "prediction": prediction},
        "steps": told.get("sample_timesteps") or 64,
        **changes,
    }
    ours = parse_config(Dalle2PriorConfig, body, origin=f"the prior of {origin}")
    for name, shape in (("null_text", (ours.text_embeds, dim)), ("null_image", (dim,))):
        state.setdefault(name, torch.zeros(shape))  # before 1.9 nothing stands for them
    for name in ("null_tokens", "null_text"):
        state[name] = state[name].reshape(-1, dim)
    state["null_image"] = state["null_image"].reshape(dim)
    with torch.device("meta"):
        own = Dalle2Prior(ours)
    check_state(own, state, origin)
    return ours, state


def _check(net: Mapping[str, Tensor], told: Mapping[str, Any], checkpoint: Dalle2Checkpoint) -> None:
    if any(name.endswith(("norm.gamma", ".norm.beta")) for name in net):
        raise UnclipError(
            f"{checkpoint.file} is of DALLE2-pytorch before 0.16 (norms with gamma and beta), an unsupported era"
        )
    network = told.get("net") if isinstance(told.get("net"), Mapping) else {}
    if network and network.get("self_cond"):
        raise UnclipError(f"{checkpoint.file} is a self-conditioned prior, which is not supported")
    if told.get("init_image_embed_l2norm"):
        raise UnclipError(f"{checkpoint.file} starts from noise of one length, which is not supported")
    if "learned_query" not in net:
        raise UnclipError(f"{checkpoint.file} is no whole prior of DALLE2-pytorch: learned_query is missing")


def _sizes(state: Mapping[str, Tensor], era: Era, origin: str) -> dict[str, Any]:
    """What the shapes of the tensors (under our names) tell of the network."""
    needed = ("attention.null", "attention.to_q.weight", "feedforward.down.weight")
    missing = [name for name in needed if f"blocks.0.{name}" not in state] + ["null_tokens"] * (
        "null_tokens" not in state
    )
    if missing:
        raise UnclipError(f"{origin} is no whole prior of DALLE2-pytorch: what stands for {missing[0]} is missing")
    dim, head_dim = state["query"].shape[0], state["blocks.0.attention.null"].shape[1]
    table = state.get("time_in.weight")
    out = table if table is not None else state["time_in.4.weight"].T
    dropped = "null_text" in state
    return {
        "embedding_dim": dim,
        "token_dim": dim,
        "width": dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "heads": state["blocks.0.attention.to_q.weight"].shape[0] // head_dim,
        "head_dim": head_dim,
        "ff_mult": state["blocks.0.feedforward.down.weight"].shape[1] / dim,
        "max_text_len": state["null_tokens"].shape[-2],
        "time_embeds": out.shape[1] // dim,
        "text_embeds": state["text_in.weight"].shape[0] // dim if "text_in.weight" in state else 1,
        "image_embeds": state["image_in.weight"].shape[0] // dim if "image_in.weight" in state else 1,
        "discrete_time": table is not None,
        "whole_time": era.whole_time and table is None,
        "nulls": "nothing" if not dropped else "tokens_and_image" if era.number < (1, 10, 3) else "everything",
        "norm_in": "norm_in.gain" in state,
        "norm_out": "norm_out.gain" in state,
        "final_proj": "out.weight" in state,
        "normformer": "blocks.0.feedforward.inner_norm.gain" in state,
        "rotary": "frequencies" in state,
    }
