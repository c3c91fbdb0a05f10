"""Weights and inputs that both sides of DALLE2-pytorch's golden files make for themselves, from names and NumPy's
frozen `RandomState`: the files hold shapes, configurations and outputs. Needs neither package.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH, TOKENS = 3, 6
CLIP_DIM = 16

_NET = {"dim": CLIP_DIM, "depth": 2, "num_timesteps": 100, "max_text_len": 8, "dim_head": 10, "heads": 3, "ff_mult": 2}
_PRIOR = {"image_embed_dim": CLIP_DIM, "image_size": 32, "timesteps": 100, "cond_drop_prob": 0.1}
PRIORS: dict[str, dict[str, Any]] = {
    "plain": {"net": _NET, **_PRIOR},
    "laion": {"net": {**_NET, "normformer": True, "norm_in": False}, **_PRIOR},
    "several": {
        "net": {
            **_NET,
            "num_timesteps": None,
            "num_time_embeds": 2,
            "num_image_embeds": 3,
            "num_text_embeds": 2,
            "norm_in": True,
            "norm_out": False,
            "final_proj": False,
            "rotary_emb": False,
        },
        **_PRIOR,
        "beta_schedule": "linear",
    },
}
"""Sections `prior` of a run's configuration."""

_UNET = {
    "dim": 8,
    "image_embed_dim": CLIP_DIM,
    "text_embed_dim": CLIP_DIM,
    "cond_dim": 8,
    "channels": 3,
    "dim_mults": [1, 2],
    "num_resnet_blocks": 1,
    "attn_heads": 2,
    "attn_dim_head": 8,
    "cond_on_text_encodings": True,
    "max_text_len": 8,
    "resnet_groups": 4,
    "self_attn": [False, True],
}
_DECODER = {"image_sizes": [8], "timesteps": 100, "learned_variance": True}
DECODERS: dict[str, dict[str, Any]] = {
    "plain": {"unets": [_UNET], **_DECODER},
    "laion": {"unets": [{**_UNET, "memory_efficient": True, "sparse_attn": True}], **_DECODER},
    "several": {
        "unets": [
            {
                **_UNET,
                "cond_on_text_encodings": False,
                "num_image_tokens": 3,
                "num_time_tokens": 1,
                "init_cross_embed": False,
                "cross_embed_downsample": True,
                "scale_skip_connection": True,
                "pixel_shuffle_upsample": False,
                "final_conv_kernel_size": 3,
                "add_image_embeds_to_time": False,
            }
        ],
        **_DECODER,
        "learned_variance": False,
        "beta_schedule": ["linear"],
    },
}
"""Sections `decoder`."""
COSINE: dict[str, Any] = {
    "cosine_sim_cross_attn": True,
    "cosine_sim_self_attn": True,
    "resnet_weight_standardization": True,
}
"""What releases since 1.9 can be asked for beside."""

_ENLARGING = {**_UNET, "cond_on_text_encodings": False}
CASCADES: dict[str, dict[str, Any]] = {
    "noised": {
        "unets": [_UNET, {**_ENLARGING, "memory_efficient": True}],
        "image_sizes": [8, 16],
        "timesteps": 40,
        "learned_variance": [True, True],
        "use_noise_for_lowres_cond": True,
        "use_blur_for_lowres_cond": False,
        "lowres_noise_sample_level": 0.3,
    },
    "captioned": {
        "unets": [_UNET, {**_ENLARGING, "scale_skip_connection": True}, {**_UNET, "self_attn": [False, False]}],
        "image_sizes": [8, 16, 32],
        "timesteps": 40,
        "learned_variance": True,
        "predict_x_start": [False, True, False],
    },
}
"""Sections `decoder` with enlarging U-Nets: one after another is told of noise; one without a caption, one with it."""


def drawn(name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that hang on a name alone."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))).float()


def weights(shapes: Mapping[str, Sequence[int]], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict: `tables` (schedules, frequencies) as they are, all else drawn; what multiplies lies around 1."""
    state = {}
    for name, shape in shapes.items():
        if name in tables:
            state[name] = tables[name]
            continue
        noise = drawn(name, shape)
        gain = name.endswith((".g", ".gamma", "norm.weight")) or (name.endswith("weight") and len(shape) == 1)
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        state[name] = 1 + 0.2 * noise if gain else noise * (0.2 if len(shape) == 1 else 1.4 / fan**0.5)
        if "null" in name or name.endswith("relative_attention_bias.weight"):
            state[name] = 0.3 * noise
    return state


def caption() -> tuple[Tensor, Tensor, Tensor]:
    """Token features (B, L, E) with zeros on padding, their mask, and unit text embeddings (B, E)."""
    mask = torch.arange(TOKENS) < torch.tensor([2, 4, TOKENS])[:, None]
    embedding = drawn("text embedding", (BATCH, CLIP_DIM))
    return (
        drawn("tokens", (BATCH, TOKENS, CLIP_DIM)) * mask[..., None],
        mask,
        embedding / embedding.norm(dim=1, keepdim=True),
    )


def image_embedding() -> Tensor:
    embedding = drawn("image embedding", (BATCH, CLIP_DIM))
    return embedding / embedding.norm(dim=1, keepdim=True)


TIMES = torch.tensor([0, 37, 99])
ENLARGED_TIMES = torch.tensor([0, 13, 39])
LEVELS = torch.tensor([0, 300, 999])


def low_res(size: int) -> Tensor:
    """What the stage before made, (B, 3, size, size) in [-1, 1]."""
    return drawn(f"low {size}", (BATCH, 3, size, size)).tanh()


def cascade_weights(shapes: Mapping[str, Sequence[int]], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `weights`, with outputs so small that a whole chain of steps stays among the numbers."""
    state = weights(shapes, tables)
    small = {name for name, value in state.items() if ".to_out.weight" in name and value.ndim == 4}
    return {name: value * 0.1 if name in small else value for name, value in state.items()}
