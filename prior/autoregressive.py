"""The autoregressive prior's network: a causal Transformer over caption, dot product and codes (unCLIP §2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prior.codes import DotProducts, EmbeddingCodes
from prior.conditioning import TextConditioned, causal_transformer
from prior.config import AutoregressivePriorConfig
from unclip.errors import UsageError
from unclip.nn.embeddings import random_parameter


@dataclass
class Generation:
    """A sequence under way: keys and values of all layers, which places may be attended to, codes seen so far."""

    cache: Any
    mask: Tensor
    count: int


class AutoregressivePrior(TextConditioned):
    """Sequence: encoded text tokens · CLIP text embedding · dot product z_i·z_t · codes by falling eigenvalue. The
    output at the dot product predicts the first code, the output at a code the next one.

    Codes and their statistics are in `codes`, those of the dot product in `dots`; both are buffers and travel with the
    weights.
    """

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        if config.components is None:
            raise UsageError(
                "components is not settled; a training run settles it by measuring the data, elsewhere name a number"
            )
        super().__init__(config)
        self.config = config
        width = config.width
        self.codes = EmbeddingCodes(config.embedding_dim, config.components, config.buckets)
        self.dots = DotProducts(config.dot_buckets)
        self.dot_in = nn.Embedding(config.dot_buckets, width)
        self.null_dot = random_parameter(width, std=0.02)
        self.code_in = nn.Embedding(config.buckets, width)
        self.positions = random_parameter(config.text_length + 1 + config.components, width, std=0.02)
        self.transformer = causal_transformer(config)
        self.out = nn.Linear(width, config.buckets)
        for embedding in (self.dot_in, self.code_in):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self,
        codes: Tensor,
        *,
        dot: Tensor,
        text_embedding: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        drop_text: Tensor,
    ) -> Tensor:
        """codes (B, K) and dot (B,) int64, text_embedding (B, E), text_tokens (B, L, D), text_mask (B, L) bool,
        drop_text (B,) bool -> logits (B, K, buckets), float32; those of code k depend on the codes before it alone.
        """
        prefix, mask = self._prefix(dot, text_embedding, text_tokens, text_mask, drop_text)
        codes_in = self.code_in(codes[:, :-1]).to(prefix.dtype) + self.positions[self.length + 2 :]
        sequence = torch.cat([prefix, codes_in], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(codes), codes.shape[1] - 1)], dim=1)
        hidden = self.transformer(sequence, self_attn_kv_mask=mask)
        return self.out(hidden[:, prefix.shape[1] - 1 :]).float()  # type: ignore[no-any-return]

    def start(
        self, *, dot: Tensor, text_embedding: Tensor, text_tokens: Tensor, text_mask: Tensor, drop_text: Tensor
    ) -> tuple[Tensor, Generation]:
        """Read the prefix -> logits of the first code (B, buckets), float32, and the state for `advance`."""
        prefix, mask = self._prefix(dot, text_embedding, text_tokens, text_mask, drop_text)
        hidden, cache = self.transformer(prefix, self_attn_kv_mask=mask, return_hiddens=True)
        return self.out(hidden[:, -1]).float(), Generation(cache, mask, 0)

    def advance(self, generation: Generation, codes: Tensor) -> Tensor:
        """The next codes (B,) -> logits of those after them (B, buckets), float32. Keys and values are kept."""
        place = self.length + 2 + generation.count
        token = self.code_in(codes)[:, None] + self.positions[place]
        generation.mask = torch.cat([generation.mask, generation.mask.new_ones(len(codes), 1)], dim=1)
        hidden, generation.cache = self.transformer(
            token, self_attn_kv_mask=generation.mask, cache=generation.cache, return_hiddens=True
        )
        generation.count += 1
        return self.out(hidden[:, -1]).float()  # type: ignore[no-any-return]

    def _prefix(
        self, dot: Tensor, text_embedding: Tensor, text_tokens: Tensor, text_mask: Tensor, drop_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> (B, K + 2, W) with positions, mask (B, K + 2), K as in `encode_text`. Without a caption its dot product
        means nothing, so a null takes its place too."""
        tokens, text, mask = self.encode_text(text_embedding, text_tokens, text_mask, drop_text)
        product = torch.where(drop_text[:, None], self.null_dot.to(tokens.dtype), self.dot_in(dot).to(tokens.dtype))
        prefix = torch.cat([tokens, torch.stack([text.to(tokens.dtype), product], dim=1)], dim=1)
        positions = torch.cat([self.positions[: tokens.shape[1]], self.positions[self.length : self.length + 2]])
        return prefix + positions, torch.cat([mask, mask.new_ones(len(mask), 2)], dim=1)
