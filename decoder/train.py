"""Wiring of a decoder training run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from decoder.config import DecoderRunConfig
from decoder.network import Decoder
from decoder.objective import decoder_loss
from decoder.sampling import KIND, DecoderStage
from decoder.start import begin_from, start_from, with_start
from decoder.text import CaptionEncoder, with_text_widths
from unclip.autoencoder import open_autoencoder, with_facts
from unclip.bundle import save_part
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UsageError
from unclip.training import Distributed, fit, open_batches, open_memo
from unclip.training.finetune import Tuning
from unclip.training.previews import captioned_grid, fixed_batch
from unclip.training.start import Reader, tell

__all__ = ["run", "start_from"]

_PREVIEWS = 16


def run(config: DecoderRunConfig, distributed: Distributed, foreign: Reader | None = None) -> Path:
    """Train a decoder on the images and captions of `config.data`, embedded by the frozen CLIP, or on stored
    embeddings with their pictures (unclip.training.memo.open_memo).

    `foreign` reads checkpoints of other projects for `init_from` (unclip.interop.folders).
    """
    config, start = with_start(config, foreign)
    if start is not None:  # its size is known now
        config = parse_config(DecoderRunConfig, config.model_dump(), f"the configuration, with {start.folder}")
    memo = open_memo(
        config.data,
        config.clip,
        distributed.device,
        config.clip_cache,
        unit_length=config.model.embedding_length == "unit",
        reads_images=True,
    )
    widths = with_text_widths(config.model, memo.widths)
    if config.model.latent is not None:
        widths |= {"latent": with_facts(config.model.latent).model_dump()}
    body = {**config.model_dump(), "model": {**config.model.model_dump(), **widths}}
    config = parse_config(DecoderRunConfig, body)  # the factor of latents is known now
    model = config.model
    if memo.stored is None or model.text.kind != "clip":  # captions in another form than the CLIP's features
        memo.encode_with(lambda clip: CaptionEncoder(model, clip), config.clip)
    torch.manual_seed(config.train.seed)
    network = Decoder(model)
    if start is not None:
        tell(begin_from(network, start), distributed)
    if model.null_text == "clip":
        network.set_null_text(memo.null_text())
    if config.train.lora is not None and start is not None and model.inpainting and not start.config.inpainting:
        raise UsageError(
            "train.lora trains adapters alone, and this decoder's new input channels would stay at zero; teach it to "
            "inpaint without train.lora first"
        )
    tuning = Tuning(network, config.train, KIND, model)
    process = GaussianDiffusion(model.diffusion)
    batches = open_batches(config.data, config.train, distributed)

    autoencoder = None if model.latent is None else open_autoencoder(model.latent, distributed.device)

    def embed(batch: dict[str, Any]) -> tuple[Tensor, Tensor, TextFeatures]:
        """What to draw, and the features to draw it from: with data.plain those of another style of it."""
        image = batch.get("plain", batch["image"]).to(distributed.device).contiguous(memory_format=torch.channels_last)
        return image, memo.image_of(batch), memo.text_of(batch)

    def loss_fn(engine: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        image, embedding, text = embed(batch)
        image = image if autoencoder is None else autoencoder.encode(image)
        return decoder_loss(engine, process, model, image, embedding, text, generator)

    fixed = cache(lambda: fixed_batch(config.data, min(_PREVIEWS, config.train.batch_size)))

    def sample(ema_network: nn.Module) -> Image.Image:
        """A few images above what the decoder makes of their embeddings, and their captions below."""
        batch = fixed()
        real, embedding, text = embed({**batch, "image": batch["image"].to(distributed.device)})
        stage = DecoderStage(ema_network, model, distributed.device)
        # The statistics of Analytic-DPM are measured by `unclip statistics`, of a trained model.
        sampler = "ddpm" if model.sampler == "analytic" else None
        drawn = stage.sample(embedding, range(len(embedding)), text=text, sampler=sampler)
        return captioned_grid([real.cpu(), drawn.cpu()], batch["caption"])

    def export(state: dict[str, Tensor], folder: Path) -> None:
        save_part(folder, KIND, model, state, {"clip": memo.identity})

    write = tuning.exporting(export)
    return fit(network, loss_fn, batches, config.train, run_config=config, export=write, sample=sample)
