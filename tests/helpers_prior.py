"""A small diffusion prior and what it is asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prior import Prior, PriorConfig
from unclip.clip import TextFeatures
from unclip.config import parse_config

DIM, TOKEN, LENGTH = 12, 10, 6
SMALL: dict[str, Any] = {
    "embedding_dim": DIM,
    "token_dim": TOKEN,
    "text_length": LENGTH,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "steps": 4,
}


def config(**changes: Any) -> PriorConfig:
    return parse_config(PriorConfig, {**SMALL, **changes})


def network(**changes: Any) -> Prior:
    torch.manual_seed(0)
    return Prior(config(**changes)).eval()


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(count: int, seed: int = 0) -> TextFeatures:
    """Features as FrozenCLIP gives them: tokens beyond the end are masked."""
    ends = torch.arange(count) % (LENGTH - 1) + 1
    mask = torch.arange(LENGTH) <= ends[:, None]
    tokens = rand(count, LENGTH, TOKEN, seed=seed) * mask[..., None]
    return TextFeatures(tokens, mask, F.normalize(rand(count, DIM, seed=seed + 1), dim=1))


def inputs(count: int = 2) -> dict[str, Tensor]:
    features = text(count)
    return {
        "x_t": rand(count, DIM, seed=3),
        "t": torch.arange(count) * 300 + 50,
        "text_embedding": features.embedding,
        "text_tokens": features.tokens,
        "text_mask": features.mask,
        "drop_text": torch.zeros(count, dtype=torch.bool),
    }


def sequence_of(prior: Prior, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What goes into the Transformer, and the mask."""
    caught: list[Any] = []
    handle = prior.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: caught.append((args[0], kwargs["self_attn_kv_mask"])), with_kwargs=True
    )
    prior(**given)
    handle.remove()
    return caught[0]
