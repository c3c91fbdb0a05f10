"""What is measured on the data's embeddings before a prior trains."""

from __future__ import annotations

import torch
from torch import Tensor

from prior.autoregressive import AutoregressivePrior
from prior.codes import CodeStatistics, measure_codes
from prior.conditioning import text_embedding
from prior.config import AutoregressivePriorConfig, PriorConfig, PriorRunConfig
from unclip.data import build_batches
from unclip.training import EmbeddingMemo

_BATCH = 64


def measure_embeddings(config: PriorRunConfig, memo: EmbeddingMemo) -> tuple[Tensor, Tensor]:
    """Image embeddings (N, E) of the data's first N = 64 · statistics_batches samples, and for an autoregressive prior
    their dot products with their captions' embeddings (N,), else (0,); on the CPU.

    Every process reads the same ones, so that all arrive at the same statistics, also when a run is continued.
    """
    batches = build_batches(config.data, batch_size=_BATCH, seed=config.train.seed)
    images, dots = [], [torch.zeros(0)]
    for _ in range(config.statistics_batches):
        batch = next(batches)
        image = memo.image_of(batch)
        images.append(image.cpu())
        if isinstance(config.model, AutoregressivePriorConfig):
            text = text_embedding(memo.text_of(batch), config.model.embedding_length)
            dots.append((image * text).sum(1).cpu())
    return torch.cat(images), torch.cat(dots)


def mean_and_deviation(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation a dimension, (E,) each."""
    data = embeddings.double()
    mean, variance = data.mean(0), data.var(0, correction=0).clamp_min(1e-12)
    # A dimension that hardly moves must not be blown up to unit variance: its noise would be amplified with it.
    std = variance.sqrt().clamp_min(0.1 * variance.mean().sqrt())
    return mean.float(), std.float()


def settle(
    model: PriorConfig | AutoregressivePriorConfig, embeddings: Tensor
) -> tuple[PriorConfig | AutoregressivePriorConfig, CodeStatistics | None]:
    """The configuration with what the data decides, the number of components, and what was found on the way."""
    if not isinstance(model, AutoregressivePriorConfig):
        return model, None
    found = measure_codes(embeddings, model.components, model.largest_error)
    return model.model_copy(update={"components": len(found.components)}), found


def store_codes(network: AutoregressivePrior, found: CodeStatistics, dots: Tensor) -> None:
    """Give a network the statistics of its codes and of the dot product."""
    network.codes.store(found)
    network.dots.measure(dots)
