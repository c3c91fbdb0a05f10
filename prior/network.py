"""The diffusion prior's network: a causal Transformer over text, timestep and noised embedding (unCLIP §2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prior.conditioning import TextConditioned, causal_transformer
from prior.config import PriorConfig
from unclip.nn import timestep_embedding
from unclip.nn.embeddings import random_parameter

TAIL = 4  # text embedding, timestep, noised image embedding, query

GROUPS = 2
"""Parts of a batch in training, by the length of their captions; dropped ones are one more."""


def group_sizes(lengths: Sequence[int], count: int) -> list[int]:
    """Ascending lengths of captions -> the sizes of `count` runs of them, such that the fewest places are computed when
    all rows of a run are as long as its last; runs may be empty.
    """
    ends = [end for end in range(1, len(lengths) + 1) if end == len(lengths) or lengths[end] > lengths[end - 1]]
    # best[end]: the fewest places of the rows before `end` in the runs so far, and the ends of these runs.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(count):
        best = {
            end: min(
                (places + (end - start) * (lengths[end - 1] + TAIL if end else 0), [*runs, end])
                for start, (places, runs) in best.items()
                if start <= end
            )
            for end in (0, *ends)
        }
    runs = best[len(lengths)][1]
    return [end - start for start, end in zip([0, *runs], runs, strict=False)]


class CaptionPrefix(NamedTuple):
    """What a caption leaves behind for the rest of the sequence: keys and values of its tokens and its embedding."""

    cache: Any
    mask: Tensor  # (B, K + 1), True = may be attended to

    def expand(self, count: int) -> CaptionPrefix:
        """Of one caption -> of `count` such, without a copy."""
        layers = [
            dataclasses.replace(layer, cached_kv=tuple(part.expand(count, -1, -1, -1) for part in layer.cached_kv))
            for layer in self.cache.attn_intermediates
        ]
        return CaptionPrefix(
            dataclasses.replace(self.cache, attn_intermediates=layers), self.mask.expand(count, -1)
        )


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
        self.query = random_parameter(width, std=0.02)
        self.positions = random_parameter(config.text_length + 4, width, std=0.02)
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
        given = (x_t, t, text_embedding, text_tokens, text_mask, drop_text)
        filled = self._filled(text_mask, drop_text) if self.training and self.reads_tokens else None
        if filled is None:
            return self._whole(*given)
        # Captions of like length together, so that a long one lengthens few others, and dropped ones apart. Always as
        # many parts, were some empty: under ZeRO 3 all processes must call the Transformer equally often, or they wait
        # for each other's weights for ever. The shortest caption stands in for none.
        apart = drop_text if self.learned_null else torch.zeros_like(drop_text)
        lengths, order = filled[~apart].sort(stable=True)
        parts = list((~apart).nonzero()[:, 0][order].split(group_sizes(lengths.tolist(), GROUPS)))
        some = [rows if len(rows) else filled.argmin()[None] for rows in parts]
        outputs = [self._whole(*(part[rows] for part in given)) for rows in some]
        if self.learned_null:
            parts.append(apart.nonzero()[:, 0])
            rows = parts[-1] if len(parts[-1]) else filled.argmin()[None]
            outputs.append(self._dropped(x_t[rows], t[rows], text_embedding[:1], text_tokens[:1]))
        output = torch.cat([output[: len(rows)] for output, rows in zip(outputs, parts, strict=True)])
        return output[torch.cat(parts).argsort()]

    def _dropped(self, x_t: Tensor, t: Tensor, text_embedding: Tensor, text_tokens: Tensor) -> Tensor:
        """`forward` of rows that are all dropped: their null is read once. Of the text a single row is given, whose
        values say nothing."""
        mask = torch.zeros(text_tokens.shape[:2], dtype=torch.bool, device=t.device)
        given = {"text_embedding": text_embedding, "text_tokens": text_tokens, "text_mask": mask}
        return self.continued(x_t, t, self.read(**given, drop_text=torch.ones_like(mask[:, 0])).expand(len(x_t)))

    def _whole(
        self, x_t: Tensor, t: Tensor, text_embedding: Tensor, text_tokens: Tensor, text_mask: Tensor, drop_text: Tensor
    ) -> Tensor:
        """`forward`, all rows at the length of the longest."""
        tokens, text, mask = self.encode_text(text_embedding, text_tokens, text_mask, drop_text)
        time = self.time_in(timestep_embedding(t, self.width).to(self.query.dtype))
        query = self.query.expand(len(x_t), -1)
        tail = torch.stack([part.to(tokens.dtype) for part in (text, time, self.image_in(x_t), query)], dim=1)
        positions = torch.cat([self.positions[: tokens.shape[1]], self.positions[self.length :]])
        sequence = torch.cat([tokens, tail], dim=1) + positions  # (B, K + 4, W)
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
        positions = torch.cat([self.positions[: tokens.shape[1]], self.positions[self.length, None]])
        prefix = torch.cat([tokens, text.to(tokens.dtype)[:, None]], dim=1) + positions
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
