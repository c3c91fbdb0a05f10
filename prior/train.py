"""Wiring of a prior training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prior.config import PriorConfig, PriorRunConfig
from prior.network import Prior
from prior.objective import prior_loss
from prior.sampling import KIND
from unclip.bundle import save_part
from unclip.clip import FrozenCLIP
from unclip.config import parse_config
from unclip.data import build_batches
from unclip.diffusion import GaussianDiffusion
from unclip.training import Distributed, EmbeddingMemo, fit, open_batches


def run(config: PriorRunConfig, distributed: Distributed) -> Path:
    """Train a prior on the captions and images of `config.data`, embedded by the frozen CLIP."""
    clip = FrozenCLIP.load(config.clip, device=distributed.device)
    memo = EmbeddingMemo(clip, config.clip_cache)
    shape = {"embedding_dim": clip.embedding_dim, "token_dim": clip.token_dim, "text_length": clip.context_length}
    model = parse_config(PriorConfig, {**config.model.model_dump(), **shape})
    config = config.model_copy(update={"model": model})
    torch.manual_seed(config.train.seed)
    network = Prior(model)
    if model.normalisation == "standardise":
        mean, std = measure_statistics(config, memo)
        network.mean.copy_(mean)  # type: ignore[operator]
        network.std.copy_(std)  # type: ignore[operator]
    process = GaussianDiffusion(model.diffusion)
    batches = open_batches(config.data, config.train, distributed)

    def loss_fn(engine: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        embedding, text = memo.encode_image(batch["image"]), memo.encode_text(batch["caption"])
        return prior_loss(engine, network, process, model, embedding, text, generator)

    def export(state: dict[str, Tensor], folder: Path) -> None:
        save_part(folder, KIND, model, state)

    return fit(network, loss_fn, batches, config.train, run_config=config, export=export)


def measure_statistics(config: PriorRunConfig, memo: EmbeddingMemo) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation a dimension of the data's image embeddings, (E,) each.

    Every process reads the same first batches, so that all arrive at the same numbers, also when a run is continued.
    """
    batches = build_batches(config.data, batch_size=64, seed=config.train.seed)
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for _ in range(config.statistics_batches):
        embedding = memo.encode_image(next(batches)["image"].to(memo.clip.device)).double()
        count += len(embedding)
        total, squares = total + embedding.sum(0), squares + (embedding**2).sum(0)
    mean = total / count
    variance = (squares / count - mean**2).clamp_min(1e-12)
    # A dimension that hardly moves must not be blown up to unit variance: its noise would be amplified with it.
    std = variance.sqrt().clamp_min(0.1 * variance.mean().sqrt())
    return mean.float(), std.float()
