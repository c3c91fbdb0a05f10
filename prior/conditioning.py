"""What the two priors share: the Transformer, and the caption as its prefix with a null to put in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prior.config import SharedConfig, TextEncoderConfig
from unclip.clip import TextFeatures
from unclip.errors import UnclipError
from unclip.nn.embeddings import random_parameter
from unclip.nn.transformers import Attention
from unclip.nn.transformers import Decoder as CausalTransformer
from unclip.nn.transformers import Encoder as BidirectionalTransformer
from unclip.nn.transformers import LayerNorm as BiaslessLayerNorm

_LENGTH_STEP = 8


def _shape(config: SharedConfig | TextEncoderConfig) -> dict[str, Any]:
    """x-transformers' arguments for a Transformer of this size."""
    return {
        "dim": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "attn_dim_head": config.width // config.heads,
        "attn_dropout": config.dropout,
        "ff_dropout": config.dropout,
        "attn_flash": True,
    }


def causal_transformer(config: SharedConfig) -> nn.Module:
    """x-transformers' causal pre-norm Transformer with exact GELU, (B, N, W) -> (B, N, W)."""
    transformer = CausalTransformer(**_shape(config))
    if config.attention_bias:
        _add_attention_biases(transformer)
    if config.norm_bias:
        _add_norm_biases(transformer)
    return transformer


class TextEncoder(nn.Module):
    """A bidirectional Transformer over the CLIP's token features: tokens (B, L, D), mask (B, L) -> (B, L, width)."""

    def __init__(self, config: TextEncoderConfig, token_dim: int, length: int) -> None:
        super().__init__()
        self.token_in = nn.Linear(token_dim, config.width)
        self.positions = random_parameter(length, config.width, std=0.02)
        self.transformer = BidirectionalTransformer(**_shape(config))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        sequence = self.token_in(tokens) + self.positions[: tokens.shape[1]]
        return self.transformer(sequence, self_attn_kv_mask=mask)  # type: ignore[no-any-return]


class TextConditioned(nn.Module):
    """The part of a prior that reads the caption. `drop_text` puts the null in its place for some samples."""

    clip_null_tokens: Tensor
    clip_null_mask: Tensor
    clip_null_embedding: Tensor

    def __init__(self, config: SharedConfig) -> None:
        super().__init__()
        self.width, self.length = config.width, config.text_length
        self.reads_tokens, self.token_dim = config.text_tokens, config.token_dim
        self.computes_padding = False  # as if every caption filled the context: a plan's supposition
        self.text_scale = config.text_scale or (config.embedding_dim**0.5 if config.embedding_length == "unit" else 1.0)
        own = config.text_encoder
        self.text_encoder = None if own is None else TextEncoder(own, config.token_dim, config.text_length)
        self.token_in = nn.Linear(config.token_dim if own is None else own.width, config.width)
        self.text_in = nn.Linear(config.embedding_dim, config.width)
        self.learned_null = config.null_text == "learned"
        if self.learned_null:
            self.null_tokens = random_parameter(config.text_length, config.width, std=0.02)
            self.null_text = random_parameter(config.width, std=0.02)
        else:
            self.register_buffer("clip_null_tokens", torch.zeros(config.text_length, config.token_dim))
            self.register_buffer("clip_null_mask", torch.zeros(config.text_length, dtype=torch.bool))
            self.register_buffer("clip_null_embedding", torch.zeros(config.embedding_dim))

    def store_null(self, features: TextFeatures, length: str) -> None:
        """Keep the CLIP's features of the empty text, a batch of one, as the null of `null_text: clip`."""
        for name, value in clip_null(features, length).items():
            getattr(self, name).copy_(value)

    @property
    def has_null(self) -> bool:
        """False where the CLIP's features of the empty text ought to be stored and are not."""
        return self.learned_null or bool(self.clip_null_mask.any())

    def encode_text(
        self, text_embedding: Tensor, text_tokens: Tensor, text_mask: Tensor, drop_text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """text_embedding (B, E), text_tokens (B, L, D), text_mask (B, L) bool, drop_text (B,) bool
        -> tokens (B, K, W), embedding (B, W), mask (B, K) True = may be attended to.

        K <= L holds all that is attended to: the padding behind the longest caption of the batch says nothing to
        anybody, and most captions fill a fifth of the context.
        """
        if not self.reads_tokens:
            text_tokens = text_embedding.new_zeros(len(text_embedding), self.length, self.token_dim)
            text_mask = torch.zeros(text_tokens.shape[:2], dtype=torch.bool, device=text_tokens.device)
        if not self.learned_null:
            dtype = text_tokens.dtype
            text_tokens = torch.where(drop_text[:, None, None], self.clip_null_tokens.to(dtype), text_tokens)
            text_mask = torch.where(drop_text[:, None], self.clip_null_mask, text_mask)
            text_embedding = torch.where(drop_text[:, None], self.clip_null_embedding.to(dtype), text_embedding)
        filled = self._filled(text_mask, drop_text)
        kept = self.length if filled is None else int(filled.max())
        text_tokens, text_mask = text_tokens[:, :kept], text_mask[:, :kept]
        if self.text_encoder is not None:
            text_tokens = self.text_encoder(text_tokens, text_mask)
        tokens = self.token_in(text_tokens)
        text = self.text_in(text_embedding * self.text_scale)
        if self.learned_null:
            tokens = torch.where(drop_text[:, None, None], self.null_tokens[:kept].to(tokens.dtype), tokens)
            text = torch.where(drop_text[:, None], self.null_text.to(text.dtype), text)
            text_mask = text_mask | drop_text[:, None]
        if not self.reads_tokens:
            text_mask = torch.zeros_like(text_mask)
        return tokens, text, text_mask

    def _filled(self, text_mask: Tensor, drop_text: Tensor) -> Tensor | None:
        """Places (B,) int64 up to the last that is attended to, in steps of eight, so that few shapes occur; or None
        where all shall be computed, or values cannot be looked at: on the meta device and in a graph being compiled.
        """
        if self.computes_padding or text_mask.is_meta or torch.compiler.is_compiling():
            return None
        places = torch.arange(1, self.length + 1, device=text_mask.device)
        if not self.reads_tokens:
            return torch.zeros_like(drop_text, dtype=torch.int64)
        last = (text_mask * places).amax(1)
        if self.learned_null:
            last = torch.where(drop_text, self.length, last)
        return ((last + _LENGTH_STEP - 1) // _LENGTH_STEP * _LENGTH_STEP).clamp_max(self.length)


def text_embedding(text: TextFeatures, length: str) -> Tensor:
    """The text embeddings (B, E) of unit length, or of the CLIP's own ('raw')."""
    if length == "unit":
        return text.embedding
    if text.norm is None:
        raise UnclipError(
            "this prior takes text embeddings of raw length, and these features tell none; make them with "
            "FrozenCLIP.encode_text, or give TextFeatures their `norm`"
        )
    return text.embedding * text.norm[:, None]


def clip_null(features: TextFeatures, length: str) -> dict[str, Tensor]:
    """The buffers of `null_text: clip` for the CLIP's features of the empty text, a batch of one."""
    return {
        "clip_null_tokens": features.tokens[0],
        "clip_null_mask": features.mask[0],
        "clip_null_embedding": text_embedding(features, length)[0],
    }


def _add_attention_biases(transformer: nn.Module) -> None:
    """x-transformers' attention projects without biases; the places of the projections are its own names."""
    for attention in [module for module in transformer.modules() if isinstance(module, Attention)]:
        for name in ("to_q", "to_k", "to_v", "to_out"):
            plain = getattr(attention, name)
            setattr(attention, name, nn.Linear(plain.in_features, plain.out_features))


def _add_norm_biases(transformer: nn.Module) -> None:
    """x-transformers' LayerNorm has no bias; torch's has."""
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BiaslessLayerNorm):
                setattr(module, name, nn.LayerNorm(child.ln.normalized_shape))
