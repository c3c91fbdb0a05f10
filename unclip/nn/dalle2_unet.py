"""The U-Net of DALLE2-pytorch, for its checkpoints: ResNet blocks whose first half is followed by cross-attention to
condition tokens, self-attention or linear attention a level, skips from every block. It knows nothing of schedules.

Its decoder's base network and its enlarging networks are this one; the latter see a low-resolution picture beside x_t.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.config import Config
from unclip.nn.embeddings import random_parameter
from unclip.nn.multiquery import GainNorm, MultiQueryAttention, Similarity, attend, sinusoids

CROSS_HEADS, CROSS_HEAD_DIM = 8, 64  # fixed in DALLE2-pytorch


class Dalle2UNetConfig(Config):
    """Shape and numerics of a U-Net of DALLE2-pytorch; the names are its own where they are the same thing."""

    image_size: int = Field(64, ge=4)
    dim: int = Field(ge=4)
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    init_dim: int | None = None
    cond_dim: int = Field(ge=1, description="width of condition tokens")
    num_image_tokens: int = Field(4, ge=1)
    num_time_tokens: int = Field(2, ge=1)
    text_dim: int | None = Field(None, description="width of the caption's token features; null: captions are not read")
    max_text_len: int = Field(256, ge=1)
    add_image_to_time: bool = True
    self_attn: tuple[bool, ...] = Field(description="levels with self-attention")
    linear_attn: bool = Field(False, description="linear attention where a level has no self-attention")
    linear: Literal["plain", "mean", "normed"] = Field("normed", description="what linear attention does to values")
    attn_heads: int = Field(16, ge=1)
    attn_head_dim: int = Field(32, ge=1)
    similarity: Similarity = Field("twice_scaled", description="of self-attention")
    cross_similarity: Similarity = "scaled"
    resnet_groups: tuple[int, ...] = Field(description="groups of the norms of each level")
    num_resnet_blocks: tuple[int, ...] = Field(description="of each level, after the first")
    standardised: bool = Field(False, description="convolutions with standardised weights")
    init_kernels: tuple[int, ...] = Field(
        (3, 7, 15), description="of the first convolution; several share it"
    )
    down_kernels: tuple[int, ...] = Field((), description="kernels of down-sampling; empty: `down`")
    down: Literal["convolution", "unshuffle"] = Field(
        "unshuffle", description="4×4, stride 2 (until 1.9), or folding"
    )
    memory_efficient: bool = Field(False, description="levels begin with down-sampling")
    skip_scale: float = 1.0
    shuffle_up: bool = Field(True, description="pixel shuffle; false: nearest neighbours and a convolution")
    final_kernel: int = Field(1, ge=1)
    low_res: bool = Field(False, description="an enlarging network: a low-resolution picture beside x_t")
    low_res_noise: bool = Field(False, description="told how much noise that picture carries (Imagen, §2.4)")

    @model_validator(mode="after")
    def _levels_fit(self) -> Dalle2UNetConfig:
        levels = len(self.dim_mults)
        for name in ("self_attn", "resnet_groups", "num_resnet_blocks"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} names {len(getattr(self, name))} levels, dim_mults {levels}")
        if any(kernel % 2 == 0 for kernel in self.init_kernels) or any(kernel % 2 for kernel in self.down_kernels):
            raise ValueError("init_kernels are odd and down_kernels even")
        return self

    @property
    def time_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.dim

    @property
    def multiple(self) -> int:
        """What the edges of a picture must be divisible by."""
        return 2 ** (len(self.dim_mults) - (0 if self.memory_efficient else 1))


def read_caption(project: nn.Linear, null: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """A caption's features (B, L, D) -> condition tokens (B, N, C), `null` (N, C) in the place of what the mask (B, L)
    leaves out and of what is missing to N.
    """
    mask, length = mask[:, : len(null)], len(null)
    text = project(tokens)[:, :length]
    missing = length - text.shape[1]
    text, mask = F.pad(text, (0, 0, 0, missing)), F.pad(mask, (0, missing), value=False)
    return torch.where(mask[..., None], text, null.to(text.dtype))


class StandardisedConv(nn.Conv2d):
    """A convolution by weights of mean 0 and variance 1 an output channel (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        var, mean = torch.var_mean(flat, dim=1, unbiased=False, keepdim=True)
        flat = (flat - mean) * (var + (1e-5 if x.dtype == torch.float32 else 1e-3)).rsqrt()
        return F.conv2d(x, flat.view_as(self.weight), self.bias, self.stride, self.padding)


class ParallelConvs(nn.Module):
    """Convolutions of several kernels, whose outputs lie side by side; the smallest has half of the channels."""

    def __init__(self, dim: int, out: int, kernels: tuple[int, ...], stride: int) -> None:
        super().__init__()
        kernels = tuple(sorted(kernels))
        widths = [int(out / 2**n) for n in range(1, len(kernels))]
        widths.append(out - sum(widths))
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, width, kernel, stride, (kernel - stride) // 2)
            for kernel, width in zip(kernels, widths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class Half(nn.Module):
    """Convolution, norm, scale and shift, SiLU."""

    def __init__(self, dim: int, out: int, groups: int, standardised: bool) -> None:
        super().__init__()
        self.conv = (StandardisedConv if standardised else nn.Conv2d)(dim, out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, out)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(x))
        return F.silu(x if scale is None or shift is None else x * (scale + 1) + shift)


class CrossAttention(nn.Module):
    """Queries from a feature map, keys and values from tokens and one learned pair."""

    def __init__(self, dim: int, context_dim: int, similarity: Similarity) -> None:
        super().__init__()
        inner = CROSS_HEADS * CROSS_HEAD_DIM
        self.similarity = similarity
        self.norm = GainNorm(dim)
        self.null = random_parameter(2, CROSS_HEAD_DIM)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.out_norm = GainNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, W), context (B, M, C) -> (B, N, W)."""
        q = self.to_q(self.norm(x)).unflatten(-1, (CROSS_HEADS, -1)).transpose(1, 2)
        k, v = (part.unflatten(-1, (CROSS_HEADS, -1)).transpose(1, 2) for part in self.to_kv(context).chunk(2, dim=-1))
        null = self.null.to(k.dtype)[:, None, None].expand(2, len(x), CROSS_HEADS, -1)[:, :, :, None]
        answer = attend(q, torch.cat([null[0], k], dim=2), torch.cat([null[1], v], dim=2), self.similarity)
        return self.out_norm(self.out(answer.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class ResBlock(nn.Module):
    """The timestep scales and shifts the first half; cross-attention, if any, stands between the halves."""

    def __init__(self, config: Dalle2UNetConfig, dim: int, out: int, groups: int, crossed: bool = False) -> None:
        super().__init__()
        self.time = nn.Linear(config.time_dim, 2 * out)
        self.cross = CrossAttention(out, config.cond_dim, config.cross_similarity) if crossed else None
        self.first = Half(dim, out, groups, config.standardised)
        self.second = Half(out, out, groups, config.standardised)
        self.skip = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(time))[..., None, None].chunk(2, dim=1)
        h = self.first(x, scale, shift)
        if self.cross is not None:
            tokens = h.flatten(2).transpose(1, 2)
            h = (self.cross(tokens, context) + tokens).transpose(1, 2).unflatten(2, h.shape[2:])
        return self.second(h) + self.skip(x)  # type: ignore[no-any-return]


class MapAttention(nn.Module):
    """Self-attention over a feature map, with its residual."""

    def __init__(self, dim: int, config: Dalle2UNetConfig) -> None:
        super().__init__()
        self.attention = MultiQueryAttention(dim, config.attn_heads, config.attn_head_dim, config.similarity)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return (self.attention(tokens)[0] + tokens).transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a feature map, with a gain and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        return F.layer_norm(x.movedim(1, -1), self.gain.shape, self.gain, None, eps).movedim(-1, 1)


class LinearAttention(nn.Module):
    """Attention of linear cost (Shen et al. 2018), with its residual."""

    def __init__(self, dim: int, config: Dalle2UNetConfig) -> None:
        super().__init__()
        self.heads, self.kind = config.attn_heads, config.linear
        inner = config.attn_heads * config.attn_head_dim
        self.norm = ChannelNorm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * inner, 1, bias=False)
        self.out = nn.Conv2d(inner, dim, 1, bias=False)
        self.out_norm = ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (part.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for part in parts)  # (B, H, N, D)
        count = q.shape[2]
        q, k = q.softmax(dim=-1) * q.shape[-1] ** -0.5, k.softmax(dim=-2)
        if self.kind == "normed":
            v, k = F.normalize(v, dim=-1) / count**0.5, k / count**0.5
        elif self.kind == "mean":
            v = v / count
        answer = F.gelu(q @ (k.transpose(2, 3) @ v))
        answer = answer.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        return self.out_norm(self.out(answer)) + x  # type: ignore[no-any-return]


class Dalle2UNet(nn.Module):
    """x (B, 3, H, W), t (B,), tokens that the levels see, tokens that the middle sees in addition -> (B, out, H, W).
    An enlarging network also takes a picture (B, 3, H, W), already enlarged, and how much noise it carries.
    """

    def __init__(self, config: Dalle2UNetConfig, out_channels: int) -> None:
        super().__init__()
        self.config = config
        dim, groups = config.dim, config.resnet_groups
        first = config.init_dim or dim
        widths = [first, *(dim * mult for mult in config.dim_mults)]
        beside = 3 if config.low_res else 0
        self.init = ParallelConvs(3 + beside, first, config.init_kernels, 1)
        self.time_in = nn.Linear(dim, config.time_dim)
        self.time_tokens = nn.Linear(config.time_dim, config.num_time_tokens * config.cond_dim)
        self.time_out = nn.Linear(config.time_dim, config.time_dim)
        if config.low_res_noise:
            self.level_in = nn.Linear(dim, config.time_dim)
            self.level_out = nn.Linear(config.time_dim, config.time_dim)
        self.norm_context = nn.LayerNorm(config.cond_dim)
        self.norm_middle = nn.LayerNorm(config.cond_dim)
        self.init_block = ResBlock(config, first, first, groups[0]) if config.memory_efficient else None
        self.downs: Any = nn.ModuleList()
        self.ups: Any = nn.ModuleList()
        skips = []
        pairs = list(pairwise(widths))
        for level, (dim_in, dim_out) in enumerate(pairs):
            width = dim_out if config.memory_efficient else dim_in
            skips.append(width)
            self.downs.append(self._down(level, dim_in, width, dim_out, level == len(pairs) - 1))
        middle = widths[-1]
        self.middle_first = ResBlock(config, middle, middle, groups[-1], crossed=True)
        self.middle_attention = MapAttention(middle, config)
        self.middle_second = ResBlock(config, middle, middle, groups[-1], crossed=True)
        for level, (dim_in, dim_out) in reversed(list(enumerate(pairs))):
            self.ups.append(self._up(level, dim_in, dim_out, skips[level]))
        self.final = ResBlock(config, dim + first, dim, groups[0])
        self.out = nn.Conv2d(dim + beside, out_channels, config.final_kernel, padding=config.final_kernel // 2)

    def _attention(self, dim: int, level: int) -> nn.Module:
        if self.config.self_attn[level]:
            return MapAttention(dim, self.config)
        return LinearAttention(dim, self.config) if self.config.linear_attn else nn.Identity()

    def _shrink(self, dim: int, out: int) -> nn.Module:
        config = self.config
        if config.down_kernels:
            return ParallelConvs(dim, out, config.down_kernels, 2)
        if config.down == "convolution":
            return nn.Conv2d(dim, out, 4, 2, 1)
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * dim, out, 1))

    def _down(self, level: int, dim_in: int, width: int, dim_out: int, last: bool) -> nn.Module:
        config, groups = self.config, self.config.resnet_groups[level]
        early = config.memory_efficient
        return nn.ModuleDict(
            {
                "before": self._shrink(dim_in, dim_out) if early else nn.Identity(),
                "first": ResBlock(config, width, width, groups),
                "blocks": nn.ModuleList(
                    ResBlock(config, width, width, groups, crossed=level > 0)
                    for _ in range(config.num_resnet_blocks[level])
                ),
                "attention": self._attention(width, level),
                "after": nn.Conv2d(width, dim_out, 1) if last or early else self._shrink(width, dim_out),
            }
        )

    def _up(self, level: int, dim_in: int, dim_out: int, skip: int) -> nn.Module:
        config, groups = self.config, self.config.resnet_groups[level]
        if level == 0 and not config.memory_efficient:
            grow: nn.Module = nn.Identity()
        elif config.shuffle_up:
            grow = nn.Sequential(nn.Conv2d(dim_out, 4 * dim_in, 1), nn.SiLU(), nn.PixelShuffle(2))
        else:
            grow = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim_out, dim_in, 3, padding=1))
        blocks = [
            ResBlock(config, dim_out + skip, dim_out, groups, crossed=level > 0)
            for _ in range(1 + config.num_resnet_blocks[level])
        ]
        return nn.ModuleDict(
            {"blocks": nn.ModuleList(blocks), "attention": self._attention(dim_out, level), "after": grow}
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        time: Tensor | None,
        image_tokens: Tensor | None,
        text_tokens: Tensor | None,
        low_res: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """`time` (B, 4·dim) is added to the timestep embedding; tokens (B, N, C) and (B, L, C); low_res (B, 3, H, W)
        and level (B,), as the configuration asks for them.
        """
        config = self.config
        if low_res is not None:
            x = torch.cat([x, low_res], dim=1)
        x = first = self.init(x)
        wave = F.gelu(self.time_in(sinusoids(t, config.dim).to(x.dtype)))
        embedding = self.time_out(wave)
        embedding = embedding if time is None else embedding + time
        if level is not None:
            told = F.gelu(self.level_in(sinusoids(level, config.dim).to(x.dtype)))
            embedding = embedding + self.level_out(told)
        tokens = self.time_tokens(wave).unflatten(1, (config.num_time_tokens, -1))
        tokens = tokens if image_tokens is None else torch.cat([tokens, image_tokens], dim=1)
        context = self.norm_context(tokens)
        middle = self.norm_middle(tokens if text_tokens is None else torch.cat([tokens, text_tokens], dim=1))
        if self.init_block is not None:
            x = self.init_block(x, embedding, context)
        skips: list[Tensor] = []
        for down in self.downs:
            x = down["first"](down["before"](x), embedding, context)
            for block in down["blocks"]:
                x = block(x, embedding, context)
                skips.append(x)
            x = down["attention"](x)
            skips.append(x)
            x = down["after"](x)
        x = self.middle_attention(self.middle_first(x, embedding, middle))
        x = self.middle_second(x, embedding, middle)
        for up in self.ups:
            for block in up["blocks"]:
                x = block(torch.cat([x, skips.pop() * config.skip_scale], dim=1), embedding, context)
            x = up["after"](up["attention"](x))
        x = self.final(torch.cat([x, first], dim=1), embedding, context)
        return self.out(x if low_res is None else torch.cat([x, low_res], dim=1)).float()  # type: ignore[no-any-return]
