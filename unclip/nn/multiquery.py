"""Attention and norms as DALLE2-pytorch has them, for its checkpoints: one key and value head for all query heads, and
a learned pair of them that every query may look at.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.nn.embeddings import random_parameter

Similarity = Literal["cosine", "scaled", "twice_scaled"]
"""How queries meet keys: 16 · cos(q, k); q·k/√d; or q·k/d, which is what its releases since 1.4.3 compute where cosine
similarity is off, as they scale the queries twice.
"""
COSINE_SCALE = 16.0


class GainNorm(nn.Module):
    """LayerNorm over the last axis with a gain and no bias. `stable` divides by the largest element first, which leaves
    a positive multiple what it is and turns the sign where the largest is negative; in float16 ε is 1e-3.
    """

    def __init__(self, dim: int, stable: bool = False) -> None:
        super().__init__()
        self.stable = stable
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True)
        return F.layer_norm(x, x.shape[-1:], self.gain, None, 1e-5 if x.dtype == torch.float32 else 1e-3)


class KeyValue(NamedTuple):
    """Keys and values of the tokens so far, (B, N, D) each, without the learned pair."""

    key: Tensor
    value: Tensor


class MultiQueryAttention(nn.Module):
    """(B, N, W) -> (B, N, W), the norms on either side included and the residual not."""

    def __init__(self, dim: int, heads: int, head_dim: int, similarity: Similarity) -> None:
        super().__init__()
        self.heads, self.similarity = heads, similarity
        self.norm = GainNorm(dim)
        self.null = random_parameter(2, head_dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.out_norm = GainNorm(dim)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, rotation: Tensor | None = None, before: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """`bias` (heads, N, 1 + tokens so far) is added to the logits, −inf where a query may not look; `rotation`
        (N, R) turns queries and keys by their positions; `before` stands before these tokens.
        """
        x = self.norm(x)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        if before is not None:
            k, v = torch.cat([before.key, k], dim=1), torch.cat([before.value, v], dim=1)
        seen = KeyValue(k, v)
        null = self.null.to(k.dtype).expand(len(x), 1, 2, -1)
        k, v = torch.cat([null[:, :, 0], k], dim=1), torch.cat([null[:, :, 1], v], dim=1)
        answer = attend(q, k[:, None].expand(-1, self.heads, -1, -1), v[:, None].expand(-1, self.heads, -1, -1),
                        self.similarity, bias)  # fmt: skip
        return self.out_norm(self.out(answer.transpose(1, 2).flatten(2))), seen


def attend(q: Tensor, k: Tensor, v: Tensor, similarity: Similarity, bias: Tensor | None = None) -> Tensor:
    """Softmax attention (B, H, N, D) under one of the three similarities."""
    scale = COSINE_SCALE
    if similarity == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    else:
        scale = q.shape[-1] ** (-0.5 if similarity == "scaled" else -1.0)
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def rotation_angles(frequencies: Tensor, start: int, count: int) -> Tensor:
    """Angles (count, 2 · frequencies) of the positions from `start` on, neighbours sharing one (RoFormer, eq. 34)."""
    positions = torch.arange(start, start + count, device=frequencies.device, dtype=torch.float32)
    return torch.outer(positions, frequencies.float()).repeat_interleave(2, dim=1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x (…, N, D) with its first R dimensions turned by pairs, for angles (N, R)."""
    turned, rest = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    pairs = turned.unflatten(-1, (-1, 2))
    crossed = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.cat([(turned * angles.cos() + crossed * angles.sin()).to(x.dtype), rest], dim=-1)


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """t (B,) -> (B, dim): sines, then cosines, with the last frequency exactly 1/10000."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def relative_buckets(queries: int, keys: int, start: int, buckets: int = 32, furthest: int = 128) -> Tensor:
    """T5's one-sided buckets (queries, keys) int64 of query `start` + i and column j. Column 0 is the learned pair, so
    that a token's column is one beyond its position, and its distance one short; the reference has it so.
    """
    query = torch.arange(start, start + queries)[:, None]
    distance = (query - torch.arange(keys)[None]).clamp_min(0)
    exact = buckets // 2
    far = exact + (torch.log(distance.float() / exact) / math.log(furthest / exact) * (buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp_max(buckets - 1))
