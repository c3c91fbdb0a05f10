"""Wiring of a prior training run, diffusion or autoregressive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prior.analytic import store_statistics
from prior.autoregressive import AutoregressivePrior
from prior.config import AutoregressivePriorConfig, PriorConfig, PriorRunConfig
from prior.dashboard import Dashboard
from prior.network import Prior
from prior.objective import autoregressive_loss, prior_loss
from prior.sampling import KIND, build_network
from prior.start import begin_from, keeps_space, with_start
from prior.statistics import mean_and_deviation, measure_embeddings, settle, store_codes
from unclip.bundle import save_part
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.data import build_batches
from unclip.diffusion import GaussianDiffusion
from unclip.training import Distributed, EmbeddingMemo, fit, open_batches, open_memo
from unclip.training.finetune import Tuning
from unclip.training.start import Reader, Start, tell


def run(config: PriorRunConfig, distributed: Distributed, foreign: Reader | None = None) -> Path:
    """Train a prior on the captions and images of `config.data`, embedded by the frozen CLIP, or on stored
    embeddings, for which no CLIP is loaded (unclip.training.memo.open_memo).

    `foreign` reads checkpoints of other projects for `init_from` (unclip.interop.folders).
    """
    config, start = with_start(config, foreign)
    memo = open_memo(
        config.data,
        config.clip,
        distributed.device,
        config.clip_cache,
        unit_length=config.model.embedding_length == "unit",
        reads_tokens=config.model.text_tokens,
    )
    shape = {name: width for name, width in memo.widths.items() if name != "vocab_size"}
    config = config.model_copy(
        update={"model": parse_config(type(config.model), {**config.model.model_dump(), **shape})}
    )
    network = prepare(config, memo, start)
    if start is not None:
        tell(begin_from(network, start), distributed)
    model = network.config
    if model.null_text == "clip":
        network.store_null(memo.null_text(), model.embedding_length)
    config = config.model_copy(update={"model": model})
    tuning = Tuning(network, config.train, KIND, model)
    process = None if isinstance(model, AutoregressivePriorConfig) else GaussianDiffusion(model.diffusion)
    batches = open_batches(config.data, config.train, distributed)

    def embed(batch: dict[str, Any]) -> tuple[Tensor, TextFeatures]:
        return memo.image_of(batch), memo.text_of(batch)

    def loss_fn(engine: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        if isinstance(network, AutoregressivePrior):
            # An embedding that autocast has rounded falls into other buckets than its own.
            with torch.autocast(distributed.device.type, enabled=False):
                embedding, text = embed(batch)
            return autoregressive_loss(engine, network, network.config, embedding, text, generator)
        assert process is not None
        embedding, text = embed(batch)
        return prior_loss(engine, network, process, network.config, embedding, text, generator)

    def export(state: dict[str, Tensor], folder: Path) -> None:
        save_part(folder, KIND, model, state, {"clip": memo.identity})

    dashboard = Dashboard(model, config.data, embed, distributed.device, config.dashboard_samples)
    folder = fit(
        network, loss_fn, batches, config.train, run_config=config, export=tuning.exporting(export), diagnose=dashboard
    )
    measured = isinstance(model, PriorConfig) and model.sampler == "analytic"
    if distributed.is_main and measured and tuning.writes_model:
        fresh = build_batches(config.data, batch_size=64, seed=config.train.seed)
        store_statistics(folder, memo, fresh, 64 * config.statistics_batches)
    return folder


def prepare(config: PriorRunConfig, memo: EmbeddingMemo, start: Start | None = None) -> Prior | AutoregressivePrior:
    """A network with fresh weights that holds the statistics of the data's embeddings, unless `start` brings its own,
    and the CLIP's null text if it uses that."""
    model: PriorConfig | AutoregressivePriorConfig = config.model
    measured = None
    needed = isinstance(model, AutoregressivePriorConfig) or model.normalisation == "standardise"
    if needed and not keeps_space(model, start):
        measured = measure_embeddings(config, memo)
        model, codes = settle(model, measured[0])
    torch.manual_seed(config.train.seed)
    network = build_network(model)
    if isinstance(network, AutoregressivePrior) and measured is not None:
        assert codes is not None
        store_codes(network, codes, measured[1])
    elif isinstance(network, Prior) and measured is not None:
        mean, std = mean_and_deviation(measured[0])
        network.mean.copy_(mean)  # type: ignore[operator]
        network.std.copy_(std)  # type: ignore[operator]
    if model.null_text == "clip":
        network.store_null(memo.null_text(), model.embedding_length)
    return network
