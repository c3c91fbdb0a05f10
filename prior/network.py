"""The diffusion prior's network: a causal Transformer over text, timestep and noised embedding (unCLIP §2.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prior.conditioning import TextConditioned, causal_transformer
from prior.config import PriorConfig
from unclip.nn import timestep_embedding


class CaptionPrefix(NamedTuple):
    """What a caption leaves behind for the rest of the sequence: keys and values of its tokens and its embedding."""

    cache: Any
    mask: Tensor  # (B, L + 1), True = may be attended to


class Prior(TextConditioned):
    """Sequence: encoded text tokens · CLIP text embedding · timestep · noised image embedding · learned query, whose
    output is the prediction of the unnoised image embedding (or of ε or v). The Transformer is x-transformers'.

    Works in the normalised space of `normalise`; its statistics are buffers and travel with the weights.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        self.config = config
        width, dim = config.width, config.embedding_dim
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.image_in = nn.Linear(dim, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(config.text_length + 4, width) * 0.02)
        self.transformer = causal_transformer(config)
        self.out = nn.Linear(width, dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        if config.normalisation == "scale":
            self.std.fill_(1 / (config.scale or dim**0.5))  # type: ignore[operator]

    def normalise(self, embedding: Tensor) -> Tensor:
        """CLIP's space -> the space in which noise is added, (B, E); elements of unit variance when standardised."""
        return (embedding - self.mean) / self.std  # type: ignore[operator, no-any-return]

    def denormalise(self, x: Tensor) -> Tensor:
        """Back to CLIP's space."""
        return x * self.std + self.mean  # type: ignore[operator, no-any-return]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        text_embedding: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        drop_text: Tensor,
    ) -> Tensor:
        """x_t (B, E) normalised, t (B,), text_embedding (B, E), text_tokens (B, L, D), text_mask (B, L) bool,
        drop_text (B,) bool: True puts the null in the place of tokens and embedding. -> output (B, E), float32.
        """
        tokens, text, mask = self.encode_text(text_embedding, text_tokens, text_mask, drop_text)
        time = self.time_in(timestep_embedding(t, self.width).to(self.query.dtype))
        query = self.query.expand(len(x_t), -1)
        tail = torch.stack([part.to(tokens.dtype) for part in (text, time, self.image_in(x_t), query)], dim=1)
        sequence = torch.cat([tokens, tail], dim=1) + self.positions  # (B, L + 4, W)
        mask = torch.cat([mask, mask.new_ones(len(x_t), 4)], dim=1)
        hidden = self.transformer(sequence, self_attn_kv_mask=mask)
        return self.out(hidden[:, -1]).float()  # type: ignore[no-any-return]

    def read(
        self, *, text_embedding: Tensor, text_tokens: Tensor, text_mask: Tensor, drop_text: Tensor
    ) -> CaptionPrefix:
        """The caption's part of `forward`, for `continued`. The Transformer is causal and the caption stands first, so
        that neither x_t nor t has a say in it.
        """
        tokens, text, mask = self.encode_text(text_embedding, text_tokens, text_mask, drop_text)
        prefix = torch.cat([tokens, text.to(tokens.dtype)[:, None]], dim=1) + self.positions[: self.length + 1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        _, cache = self.transformer(prefix, self_attn_kv_mask=mask, return_hiddens=True)
        return CaptionPrefix(cache, mask)

    def continued(self, x_t: Tensor, t: Tensor, prefix: CaptionPrefix) -> Tensor:
        """What `forward` gives for x_t (B, E) and t (B,) behind a caption that was read: three tokens instead of L + 4.
        """
        time = self.time_in(timestep_embedding(t, self.width).to(self.query.dtype))
        parts = [time, self.image_in(x_t), self.query.expand(len(x_t), -1)]
        tail = torch.stack([part.to(self.query.dtype) for part in parts], dim=1) + self.positions[self.length + 1 :]
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(len(x_t), 3)], dim=1)
        hidden = self.transformer(tail, self_attn_kv_mask=mask, cache=prefix.cache, cache_age=3)
        return self.out(hidden[:, -1]).float()  # type: ignore[no-any-return]
