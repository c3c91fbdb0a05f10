"""The diffusion prior of DALLE2-pytorch, for its checkpoints (LAION's among them): network, configuration and sampling.

It differs from `prior.network` throughout: padding and dropped captions are learned vectors, keys and values have one
head, positions are T5's biases and rotations, attention is by cosine similarity or with CogView's relaxation, and the
noised embedding is dropped with the caption. Its releases changed these numerics under nearly the same names, so that a
configuration says which of them it means. It is run here, and not trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from prior.config import SharedConfig
from unclip.config import DiffusionConfig, SamplerName, StepSpec
from unclip.nn.embeddings import random_parameter
from unclip.nn.multiquery import (
    GainNorm,
    KeyValue,
    MultiQueryAttention,
    Similarity,
    relative_buckets,
    rotation_angles,
    sinusoids,
)

RELAXATION = 128.0  # CogView's α as DALLE2-pytorch applies it: to the position bias too


class Dalle2PriorConfig(SharedConfig):
    """A prior of DALLE2-pytorch. `width` is `embedding_dim` and `token_dim`: it has no projections between them."""

    kind: Literal["dalle2"] = "dalle2"
    version: str = Field(description="the release of DALLE2-pytorch that the weights come from")
    similarity: Similarity = "cosine"
    relaxed: bool = Field(False, description="CogView's relaxation: logits and position biases times 128 (until 1.4.2)")
    nulls: Literal["everything", "tokens_and_image", "nothing"] = Field(
        "everything",
        description="what dropping a caption replaces: tokens, text embedding and noised image embedding; without the "
        "text embedding (1.9 to 1.10.2); nothing, so that guidance does nothing (before 1.9)",
    )
    whole_time: bool = Field(False, description="sinusoids cut to whole numbers (continuous time before 1.10.7)")
    head_dim: int = Field(64, ge=2)
    max_text_len: int = Field(256, ge=1, description="positions of the caption; what it leaves is learned padding")
    time_embeds: int = Field(1, ge=1)
    image_embeds: int = Field(1, ge=1)
    text_embeds: int = Field(1, ge=1)
    discrete_time: bool = Field(False, description="a table of timesteps; false: sinusoids and an MLP")
    ff_mult: float = Field(4, gt=0)
    norm_in: bool = False
    norm_out: bool = True
    final_proj: bool = True
    normformer: bool = Field(False, description="a norm inside the feed-forward")
    rotary: bool = True
    image_scale: float = Field(gt=0, description="what unit embeddings are multiplied by before noise is added")
    clamp_length: bool = Field(False, description="x̂_0 is brought to that length at each step")
    diffusion: DiffusionConfig = DiffusionConfig(prediction="x_start")
    clip_range: float | None = None
    candidates: int = Field(2, ge=1)
    steps: StepSpec = Field(64, description="default sampling steps: a number, 'ddim64', or a list of timesteps")
    sampler: SamplerName = "ddpm"

    @model_validator(mode="after")
    def _heads_divide(self) -> Dalle2PriorConfig:
        return self  # heads have a width of their own here


class Dalle2Prefix(NamedTuple):
    """What a caption leaves behind: each layer's keys and values, and whose noised embedding is dropped."""

    layers: tuple[KeyValue, ...]
    drop: Tensor  # (B,)


class FeedForward(nn.Module):
    """SwiGLU between norms; the gate is the second half."""

    def __init__(self, config: Dalle2PriorConfig) -> None:
        super().__init__()
        inner = int(config.ff_mult * config.width)
        self.norm = GainNorm(config.width)
        self.up = nn.Linear(config.width, 2 * inner, bias=False)
        self.inner_norm = GainNorm(inner) if config.normformer else nn.Identity()
        self.down = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(self.inner_norm(value * F.silu(gate)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each with its residual."""

    def __init__(self, config: Dalle2PriorConfig) -> None:
        super().__init__()
        self.attention = MultiQueryAttention(config.width, config.heads, config.head_dim, config.similarity)
        self.feedforward = FeedForward(config)


class Dalle2Prior(nn.Module):
    """Sequence: caption tokens or learned padding · text embedding(s) · timestep(s) · noised embedding(s) · learned
    query, through a causal Transformer; its last output is the prediction.
    """

    frequencies: Tensor
    has_null = True

    def __init__(self, config: Dalle2PriorConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        dim = config.width
        self.text_in = _several(dim, config.text_embeds)
        self.image_in = _several(dim, config.image_embeds)
        out = dim * config.time_embeds
        if config.discrete_time:
            self.time_in: nn.Module = nn.Embedding(config.diffusion.timesteps, out)
        else:
            inner = 2 * out
            self.time_in = nn.Sequential(
                nn.Linear(dim, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, out)
            )
        self.query = random_parameter(dim)
        self.null_tokens = random_parameter(config.max_text_len, dim)
        self.null_text = random_parameter(config.text_embeds, dim)
        self.null_image = random_parameter(dim)
        self.position_bias = nn.Embedding(32, config.heads)
        self.norm_in = GainNorm(dim) if config.norm_in else nn.Identity()
        self.blocks: Any = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm_out = GainNorm(dim, stable=True) if config.norm_out else nn.Identity()
        self.out = nn.Linear(dim, dim, bias=False) if config.final_proj else nn.Identity()
        if config.rotary:
            turned = min(32, config.head_dim)
            self.register_buffer("frequencies", 10000.0 ** -(torch.arange(0, turned, 2).float() / turned))

    def normalise(self, embedding: Tensor) -> Tensor:
        """CLIP's unit vectors -> the space in which noise is added, (B, E)."""
        return embedding * self.config.image_scale

    def denormalise(self, x: Tensor) -> Tensor:
        """Back to CLIP's space."""
        return x / self.config.image_scale

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
        """As `Prior.forward`: x_t (B, E), t (B,), text_embedding (B, E), text_tokens (B, L, E), text_mask (B, L) bool,
        drop_text (B,) bool -> output (B, E), float32.
        """
        prefix = self.read(
            text_embedding=text_embedding, text_tokens=text_tokens, text_mask=text_mask, drop_text=drop_text
        )
        return self.continued(x_t, t, prefix)

    def read(
        self, *, text_embedding: Tensor, text_tokens: Tensor, text_mask: Tensor, drop_text: Tensor
    ) -> Dalle2Prefix:
        """The caption's part of `forward`, for `continued`: causal attention lets neither x_t nor t into it."""
        config = self.config
        kept = ~drop_text
        tokens, mask = text_tokens[:, : config.max_text_len], text_mask[:, : config.max_text_len]
        if not config.text_tokens:
            mask = torch.zeros_like(mask)
        missing = config.max_text_len - tokens.shape[1]
        tokens, mask = F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing), value=False)
        if config.nulls != "nothing":
            mask = mask & kept[:, None]
        tokens = torch.where(mask[..., None], tokens, self.null_tokens.to(tokens.dtype))
        text = self.text_in(text_embedding).unflatten(1, (config.text_embeds, -1))
        if config.nulls == "everything":
            text = torch.where(kept[:, None, None], text, self.null_text.to(text.dtype))
        drop = drop_text if config.nulls != "nothing" else torch.zeros_like(drop_text)
        _, layers = self._transformed(torch.cat([tokens, text], dim=1), None)
        return Dalle2Prefix(layers, drop)

    def continued(self, x_t: Tensor, t: Tensor, prefix: Dalle2Prefix) -> Tensor:
        """What `forward` gives for x_t (B, E) and t (B,) behind a caption that was read."""
        config = self.config
        image = self.image_in(x_t).unflatten(1, (config.image_embeds, -1))
        image = torch.where(prefix.drop[:, None, None], self.null_image.to(image.dtype), image)
        if config.discrete_time:
            time = self.time_in(t)
        else:
            wave = sinusoids(t, self.width)
            time = self.time_in((wave.trunc() if config.whole_time else wave).to(self.query.dtype))
        time = time.unflatten(1, (config.time_embeds, -1)).to(image.dtype)
        query = self.query.to(image.dtype).expand(len(x_t), 1, -1)
        hidden, _ = self._transformed(torch.cat([time, image, query], dim=1), prefix.layers)
        return self.out(self.norm_out(hidden[:, -1])).float()  # type: ignore[no-any-return]

    def _transformed(self, x: Tensor, before: tuple[KeyValue, ...] | None) -> tuple[Tensor, tuple[KeyValue, ...]]:
        start, count = 0 if before is None else before[0].key.shape[1], x.shape[1]
        bias = self._bias(start, count, x.device)
        rotation = rotation_angles(self.frequencies, start, count) if self.config.rotary else None
        x = self.norm_in(x)
        layers = []
        for number, block in enumerate(self.blocks):
            change, seen = block.attention(x, bias, rotation, None if before is None else before[number])
            x = x + change
            x = x + block.feedforward(x)
            layers.append(seen)
        return x, tuple(layers)

    def _bias(self, start: int, count: int, device: torch.device) -> Tensor:
        """(heads, count, 1 + start + count): T5's biases, and −inf for what comes later."""
        columns = 1 + start + count
        buckets = relative_buckets(count, columns, start).to(device)
        bias = self.position_bias(buckets).permute(2, 0, 1).float()
        if self.config.relaxed:
            bias = bias * RELAXATION
        later = (
            torch.arange(columns, device=device)[None] > torch.arange(start, start + count, device=device)[:, None] + 1
        )
        return bias.masked_fill(later, float("-inf"))


def length_clip(length: float) -> Callable[[Tensor], Tensor]:
    """x̂_0 (B, E) brought to a length (`sampling_clamp_l2norm`)."""
    return lambda x_start: F.normalize(x_start, dim=1) * length


def _several(dim: int, count: int) -> nn.Module:
    return nn.Linear(dim, dim * count) if count > 1 else nn.Identity()
