"""Residual and attention blocks of the ADM U-Net."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or the most that divide a narrow layer."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zeroed(module: nn.Module) -> nn.Module:
    """Zero a module's parameters, so that a residual branch starts as the identity (ADM)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """ADM's residual block: scale-shift norm from the embedding; `resample` 'down' or 'up' halves or doubles the edge.

    The middle of an up or down block is resampled together with its skip path ("residual up/down-sampling").
    """

    def __init__(
        self, channels: int, out_channels: int, embedding_dim: int, dropout: float = 0.0, resample: str | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = group_norm(channels)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, E); `skip` is concatenated to x in channels first."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = F.silu(self.norm_in(x))
        if self.resample is not None:
            h, x = self._resample(h), self._resample(x)
        h = self.conv_in(h)
        scale, shift = self.embedding(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.shortcut(x) + h  # type: ignore[no-any-return]

    def _resample(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")


class AttentionBlock(nn.Module):
    """Self-attention over the feature map, with context tokens concatenated to keys and values (GLIDE, §2.1)."""

    def __init__(self, channels: int, head_channels: int, context_dim: int | None) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels {head_channels} does not divide the {channels} channels of an attention layer"
            )
        self.heads = channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_dim, 2 * channels) if context_dim else None
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); context (B, N, D); mask (B, N) bool, True = may be seen."""
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        seen = None
        if context is not None and self.context_kv is not None:
            context_k, context_v = self.context_kv(context).chunk(2, dim=-1)
            k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)
            if mask is not None:
                own = mask.new_ones(batch, height * width)
                seen = torch.cat([mask, own], dim=1)[:, None, None, :]  # (B, 1, 1, N + HW)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v)
        )  # (B, heads, L, head dim)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        attended = self.out(attended.transpose(1, 2).flatten(2))  # (B, HW, C)
        return x + attended.transpose(1, 2).reshape(batch, channels, height, width)
