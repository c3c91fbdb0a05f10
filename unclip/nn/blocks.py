"""Residual, resampling and attention blocks of the ADM U-Net."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.nn.sparing import (
    add_doubled,
    conv_and_shift,
    conv_and_shortcut,
    doubled_conv,
    may_overwrite,
    scaled_and_shifted,
)


@dataclass(frozen=True)
class BlockOptions:
    """What all residual and attention blocks of one network share."""

    scale_shift_norm: bool = True
    norm_groups: int = 32
    norm_eps: float = 1e-5


_DEFAULT = BlockOptions()


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics are float32 whatever the layer's precision; the output has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def group_norm(channels: int, groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm with `groups` groups, or the most that divide both it and a narrow layer."""
    return GroupNorm(math.gcd(groups, channels), channels, eps)


def zeroed(module: nn.Module) -> nn.Module:
    """Zero a module's parameters, so that a residual branch starts as the identity (ADM)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """ADM's residual block; `resample` 'down' or 'up' halves or doubles the edge.

    With `scale_shift_norm` the embedding scales and shifts the second norm's output (ADM, §4.3: adaptive group
    normalisation); without, it is added before that norm (DDPM; Karlo's super-resolution).
    The middle of an up or down block is resampled together with its skip path ("residual up/down-sampling").
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_dim: int,
        dropout: float = 0.0,
        resample: str | None = None,
        options: BlockOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or _DEFAULT
        self.resample, self.scale_shift_norm = resample, options.scale_shift_norm
        self.norm_in = group_norm(channels, options.norm_groups, options.norm_eps)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, (2 if self.scale_shift_norm else 1) * out_channels)
        self.norm_out = group_norm(out_channels, options.norm_groups, options.norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, E); `skip` is concatenated to x in channels first."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        fresh = may_overwrite(x)
        h = F.silu(self.norm_in(x), inplace=fresh)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        emb = self.embedding(F.silu(emb))[:, :, None, None]
        if self.scale_shift_norm:
            h = doubled_conv(h, self.conv_in) if self.resample == "up" else self.conv_in(h)
            h = scaled_and_shifted(self.norm_out(h), *emb.chunk(2, dim=1))
        else:
            h = self.norm_out(conv_and_shift(h, self.conv_in, emb, double=self.resample == "up"))
        h = self.dropout(F.silu(h, inplace=fresh))
        if self.resample == "up":
            return add_doubled(self.conv_out(h), self.shortcut(x))
        return conv_and_shortcut(h, self.conv_out, x, self.shortcut)


class ConvResample(nn.Module):
    """Plain resampling: a convolution of stride 2, or nearest-neighbour doubling and a convolution (DDPM, App. B)."""

    def __init__(self, channels: int, resample: str) -> None:
        super().__init__()
        self.resample = resample
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if resample == "down" else 1, padding=1)

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); the embedding plays no part. Takes a residual block's arguments to stand in its place."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return doubled_conv(x, self.conv) if self.resample == "up" else self.conv(x)  # type: ignore[no-any-return]


class ContextMemory:
    """Context tokens (B, N, D) as the attention layers of a network read them: keys and values, made once.

    Context does not change over the steps of a sampling. A layer's are 2·channels numbers a token and sample.
    """

    def __init__(self, network: nn.Module, context: Tensor) -> None:
        layers = [module for module in network.modules() if isinstance(module, AttentionBlock)]
        self._read = {layer: layer.context_kv(context) for layer in layers if layer.context_kv is not None}

    def of(self, layer: AttentionBlock) -> Tensor:
        """(B, N, 2·channels): the keys, then the values."""
        return self._read[layer]


class AttentionBlock(nn.Module):
    """Self-attention over the feature map, with context tokens concatenated to keys and values (GLIDE, §2.1)."""

    watcher: Callable[[Tensor, int, tuple[int, int]], Tensor] | None = None
    """Takes the attention maps and gives those to use (unclip.nn.attention)."""

    def __init__(
        self, channels: int, head_channels: int, context_dim: int | None, options: BlockOptions | None = None
    ) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(
                f"head_channels {head_channels} does not divide the {channels} channels of an attention layer"
            )
        options = options or _DEFAULT
        self.heads = channels // head_channels
        self.norm = group_norm(channels, options.norm_groups, options.norm_eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_dim, 2 * channels) if context_dim else None
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(
        self, x: Tensor, context: Tensor | ContextMemory | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W); context (B, N, D), or what was read of it; mask (B, N) bool, True = may be seen."""
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        seen = None
        if context is not None and self.context_kv is not None:
            read = context.of(self) if isinstance(context, ContextMemory) else self.context_kv(context)
            context_k, context_v = read.chunk(2, dim=-1)
            k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)
            if mask is not None:
                own = mask.new_ones(batch, height * width)
                seen = torch.cat([mask, own], dim=1)[:, None, None, :]  # (B, 1, 1, N + HW)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v)
        )  # (B, heads, L, head dim)
        if self.watcher is None:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
            maps = torch.softmax(scores if seen is None else scores.masked_fill(~seen, -torch.inf), dim=-1)
            columns = k.shape[2] - height * width
            attended = self.watcher(maps, columns, (height, width)).to(v.dtype) @ v
        attended = self.out(attended.transpose(1, 2).flatten(2))  # (B, HW, C)
        attended = attended.transpose(1, 2).reshape(batch, channels, height, width)
        return attended.add_(x) if may_overwrite(x) else x + attended  # type: ignore[no-any-return]
