"""Analytic-DPM's statistics of a trained decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from decoder.sampling import DecoderStage
from unclip.config import EpsilonStatistics
from unclip.diffusion import Denoiser, measure_epsilon_statistics, pixel_noise_limit, timesteps_from
from unclip.training import EmbeddingMemo

_TIMESTEPS = 50


def measure_statistics(
    stage: DecoderStage,
    memo: EmbeddingMemo,
    batches: Iterable[Mapping[str, Any]],
    samples: int,
    *,
    timesteps: Any = None,
    seed: int = 0,
) -> EpsilonStatistics:
    """Γ_t of a decoder over the first `samples` images and captions of `batches`, given embedding and caption,
    unguided.

    `timesteps` is a specification of sampling steps; by default 50 and the decoder's own, between which Γ is
    interpolated. `memo` embeds as in training; images have the decoder's size. The last noise is held below two 8-bit
    levels (Bao et al. 2022, App. F.2). Raises UsageError: no samples.
    """
    process = stage.process
    specs = [min(_TIMESTEPS, process.timesteps), stage.config.steps] if timesteps is None else [timesteps]
    kept = {t for spec in specs for t in timesteps_from(spec, process.timesteps)}
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        pairs = _pairs(stage, memo, batches, samples)
        return measure_epsilon_statistics(pairs, process, sorted(kept), generator, pixel_noise_limit())


def _pairs(
    stage: DecoderStage, memo: EmbeddingMemo, batches: Iterable[Mapping[str, Any]], samples: int
) -> Iterator[tuple[Denoiser, Tensor]]:
    left = samples
    for batch in islice(batches, samples):
        if left <= 0:
            return
        part = {name: value[:left] for name, value in batch.items()}
        left -= len(part["caption"])
        yield stage.conditional(memo.image_of(part), memo.text_of(part)), part["image"].to(stage.device)
