"""The diffusion prior's network: a causal Transformer over text, timestep and noised embedding (unCLIP §2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from x_transformers import Decoder as CausalTransformer

from prior.config import PriorConfig
from unclip.nn import timestep_embedding


class Prior(nn.Module):
    """Sequence: encoded text tokens · CLIP text embedding · timestep · noised image embedding · learned query, whose
    output
    is the prediction of the unnoised image embedding. The Transformer is x-transformers', causal and pre-norm.

    Works in the normalised space of `normalise`; its statistics are buffers and travel with the weights.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.width, config.embedding_dim
        self.token_in = nn.Linear(config.token_dim, width)
        self.text_in = nn.Linear(dim, width)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.image_in = nn.Linear(dim, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(config.text_length + 4, width) * 0.02)
        self.null_tokens = nn.Parameter(torch.randn(config.text_length, width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(width) * 0.02)
        self.transformer = CausalTransformer(
            dim=width,
            depth=config.depth,
            heads=config.heads,
            attn_dim_head=width // config.heads,
            attn_dropout=config.dropout,
            ff_dropout=config.dropout,
            attn_flash=True,
        )
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
        """x_t (B, E) normalised, t (B,), text_embedding (B, E) of unit length, text_tokens (B, L, D), text_mask (B,
        L) bool,
        drop_text (B,) bool: True puts learned nulls in the place of tokens and embedding. -> x̂_0 (B, E), float32.
        """
        tokens = self.token_in(text_tokens)
        tokens = torch.where(drop_text[:, None, None], self.null_tokens.to(tokens.dtype), tokens)
        text = self.text_in(text_embedding * self.config.embedding_dim**0.5)
        text = torch.where(drop_text[:, None], self.null_text.to(text.dtype), text)
        time = self.time_in(timestep_embedding(t, self.config.width).to(self.query.dtype))
        query = self.query.expand(len(x_t), -1)
        tail = torch.stack([part.to(tokens.dtype) for part in (text, time, self.image_in(x_t), query)], dim=1)
        sequence = torch.cat([tokens, tail], dim=1) + self.positions  # (B, L + 4, W)
        mask = torch.cat([text_mask | drop_text[:, None], text_mask.new_ones(len(x_t), 4)], dim=1)
        hidden = self.transformer(sequence, self_attn_kv_mask=mask)
        return self.out(hidden[:, -1]).float()  # type: ignore[no-any-return]
