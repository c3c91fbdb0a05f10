"""Analytic-DPM's statistics of a trained diffusion prior (unCLIP, App. C: analytic variance, 64 strided steps)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from prior.sampling import DiffusionPriorStage, PriorStage
from unclip.bundle import save_statistics
from unclip.config import EpsilonStatistics
from unclip.diffusion import measure_epsilon_statistics, timesteps_from
from unclip.errors import UsageError
from unclip.training import EmbeddingMemo

_TIMESTEPS = 100


def measure_statistics(
    stage: PriorStage,
    memo: EmbeddingMemo,
    batches: Iterable[Mapping[str, Any]],
    samples: int,
    *,
    timesteps: Any = None,
    seed: int = 0,
) -> EpsilonStatistics:
    """Γ_t of a prior over the first `samples` images and captions of `batches`, given the caption, unguided.

    `timesteps` is a specification of sampling steps; by default 100 and the prior's own, between which Γ is
    interpolated. `memo` embeds as in training. Raises UsageError: an autoregressive prior, which has no ε̂; no samples.
    """
    if not isinstance(stage, DiffusionPriorStage):
        raise UsageError("this prior is autoregressive, so there is no noise prediction to measure; it has no steps")
    process = stage.process
    specs = [min(_TIMESTEPS, process.timesteps), stage.config.steps] if timesteps is None else [timesteps]
    kept = sorted({t for spec in specs for t in timesteps_from(spec, process.timesteps)})
    with torch.inference_mode():
        pairs = (
            (stage.conditional(text), stage.network.normalise(embedding.to(stage.device)))
            for _, embedding, text in memo.first(batches, samples)
        )
        generator = torch.Generator().manual_seed(seed)
        return measure_epsilon_statistics(pairs, process, kept, generator)


def store_statistics(
    folder: Path, memo: EmbeddingMemo, batches: Iterable[Mapping[str, Any]], samples: int
) -> None:
    """Measure an exported prior and keep the result in its folder."""
    stage = PriorStage.load(folder, memo.device)
    save_statistics(folder, measure_statistics(stage, memo, batches, samples))
