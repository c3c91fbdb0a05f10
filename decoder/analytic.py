"""Analytic-DPM's statistics of a trained decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from decoder.sampling import DecoderStage
from unclip.config import EpsilonStatistics
from unclip.diffusion import measure_epsilon_statistics, pixel_noise_limit, timesteps_from
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
    levels (Bao et al. 2022, App. F.2), but for a decoder in latents, which have no such levels. Raises UsageError: no
    samples.
    """
    process = stage.process
    specs = [min(_TIMESTEPS, process.timesteps), stage.config.steps] if timesteps is None else [timesteps]
    kept = sorted({t for spec in specs for t in timesteps_from(spec, process.timesteps)})
    limit = pixel_noise_limit() if stage.config.latent is None else None
    with torch.inference_mode():
        pairs = (
            (stage.conditional(embedding, text), stage.to_x_start(part["image"].to(stage.device)))
            for part, embedding, text in memo.first(batches, samples)
        )
        generator = torch.Generator().manual_seed(seed)
        return measure_epsilon_statistics(pairs, process, kept, generator, limit)
