"""Imagen's Efficient U-Net: little work at high resolutions, many residual blocks at low ones.

Saharia et al. 2022 ("Imagen"), App. B.1 and Figs. A.27 to A.30: every level down-samples before its convolutions and
up-samples after them, the number of residual blocks grows with depth, and skip connections are scaled by 1/√2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unclip.nn.blocks import AttentionBlock, group_norm, zeroed
from unclip.nn.config import EfficientUNetConfig
from unclip.nn.embeddings import timestep_embedding
from unclip.nn.sparing import conv_and_shortcut, doubled_conv, may_overwrite, scaled_and_shifted

_SKIP_SCALE = 1 / math.sqrt(2)  # Imagen, App. B.1


class EfficientUNet(nn.Module):
    """(B, in_channels, H, W), t (B,) -> (B, out_channels, H, W) float32; H and W divisible by `self.multiple`.

    Every level halves the edge, the first one too, so that no residual block runs at full resolution. The paper
    leaves open how a level joins the embedding (here: scale and shift of its first feature map) and how a skip
    joins the way up (here: concatenated).
    """

    def __init__(self, config: EfficientUNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.config = config
        widths = [config.model_channels * mult for mult in config.channel_mult]
        self.multiple = config.patch_size * 2 ** len(widths)
        self.embedding_dim = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, self.embedding_dim),
            nn.SiLU(),
            nn.Linear(self.embedding_dim, self.embedding_dim),
        )
        self.conv_in = nn.Conv2d(in_channels * config.patch_size**2, config.model_channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        above = [config.model_channels, *widths[:-1]]
        for level, width in enumerate(widths):
            lowest = level == len(widths) - 1
            attention = config.bottom_attention and lowest
            shape = (width, config.num_res_blocks[level], self.embedding_dim, config, attention)
            self.down.append(_DownLevel(above[level], *shape))
            # The way up starts where the way down ends: there is nothing to skip at the lowest level.
            self.up.insert(0, _UpLevel(width if lowest else 2 * width, above[level], *shape))
        self.norm_out = group_norm(config.model_channels)
        self.conv_out = zeroed(nn.Conv2d(config.model_channels, out_channels * config.patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None) -> Tensor:
        """`embedding` (B, 4·model_channels) is added to the timestep's."""
        dtype = self.conv_in.weight.dtype  # half precision only where the parameters are
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))
        if embedding is not None:
            emb = emb + embedding
        emb = F.silu(emb)
        h = self.conv_in(F.pixel_unshuffle(x.to(dtype), self.config.patch_size))
        skips: list[Tensor] = []
        for level in self.down:
            h = self._run(level, h, emb)
            skips.append(h)
        skips.pop()
        for index, level in enumerate(self.up):
            if index:
                h = torch.cat([h, skips.pop() * _SKIP_SCALE], dim=1)
            h = self._run(level, h, emb)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h.float(), self.config.patch_size)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if self.config.checkpoint_activations and self.training:
            result: Tensor = checkpoint(module, *inputs, use_reentrant=False)
            return result
        return module(*inputs)  # type: ignore[no-any-return]


class _DownLevel(nn.Module):
    """Imagen's DBlock (Fig. A.28): a convolution of stride 2, the embedding, residual blocks, attention."""

    def __init__(
        self, channels: int, width: int, blocks: int, embedding_dim: int, config: EfficientUNetConfig, attention: bool
    ) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.combine = _Combine(width, embedding_dim)
        self.blocks = nn.ModuleList(_Block(width, width, config.dropout) for _ in range(blocks))
        self.attention = AttentionBlock(width, config.head_channels, None) if attention else None

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.combine(self.downsample(h), emb)
        for block in self.blocks:
            h = block(h)
        return h if self.attention is None else self.attention(h)


class _UpLevel(nn.Module):
    """Imagen's UBlock (Fig. A.29): the embedding, residual blocks, attention, then twice the edge and a convolution."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        width: int,
        blocks: int,
        embedding_dim: int,
        config: EfficientUNetConfig,
        attention: bool,
    ) -> None:
        super().__init__()
        self.combine = _Combine(channels, embedding_dim)
        self.blocks = nn.ModuleList(
            _Block(channels if index == 0 else width, width, config.dropout) for index in range(blocks)
        )
        self.attention = AttentionBlock(width, config.head_channels, None) if attention else None
        self.upsample = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.combine(h, emb)
        for block in self.blocks:
            h = block(h)
        if self.attention is not None:
            h = self.attention(h)
        return doubled_conv(h, self.upsample)


class _Combine(nn.Module):
    """Imagen's CombineEmbs: the embedding (B, E) scales and shifts a feature map (B, C, H, W)."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(embedding_dim, 2 * channels)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.project(emb)[:, :, None, None].chunk(2, dim=1)
        return scaled_and_shifted(h, scale, shift)


class _Block(nn.Module):
    """Imagen's ResNetBlock (Fig. A.27): twice norm, SiLU, convolution, beside a shortcut."""

    def __init__(self, channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = group_norm(channels)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        fresh = may_overwrite(x)
        h = self.conv_in(F.silu(self.norm_in(x), inplace=fresh))
        h = self.dropout(F.silu(self.norm_out(h), inplace=fresh))
        return conv_and_shortcut(h, self.conv_out, x, self.shortcut)
