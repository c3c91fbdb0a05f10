"""Wiring of a decoder training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from decoder.config import DecoderConfig, DecoderRunConfig
from decoder.network import Decoder
from decoder.objective import decoder_loss
from decoder.sampling import KIND, DecoderStage
from decoder.text import CaptionEncoder, with_text_widths
from unclip.bundle import load_part, load_strict, save_part
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.config import parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError
from unclip.training import Distributed, EmbeddingMemo, fit, open_batches
from unclip.training.previews import captioned_grid, fixed_batch

_PREVIEWS = 16
_MAY_START_FRESH = ("noise_level_to_time.",)  # ends in zeros: it changes nothing until it has learned


def run(config: DecoderRunConfig, distributed: Distributed) -> Path:
    """Train a decoder on the images and captions of `config.data`, embedded by the frozen CLIP."""
    clip = FrozenCLIP.load(config.clip, device=distributed.device)
    widths = with_text_widths(config.model, clip)
    model = parse_config(type(config.model), {**config.model.model_dump(), **widths})
    config = config.model_copy(update={"model": model})
    memo = EmbeddingMemo(
        clip,
        config.clip_cache,
        unit_length=model.embedding_length == "unit",
        texts=CaptionEncoder(model, clip),
    )
    torch.manual_seed(config.train.seed)
    network = Decoder(model)
    if config.init_from is not None:
        start_from(network, Path(config.init_from))
    if model.null_text == "clip":
        network.set_null_text(clip.encode_text([""]))
    process = GaussianDiffusion(model.diffusion)
    batches = open_batches(config.data, config.train, distributed)

    def embed(batch: dict[str, Any]) -> tuple[Tensor, Tensor, TextFeatures]:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        return image, memo.encode_image(image), memo.encode_text(batch["caption"])

    def loss_fn(engine: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        image, embedding, text = embed(batch)
        return decoder_loss(engine, process, model, image, embedding, text, generator)

    def sample(ema_network: nn.Module) -> Image.Image:
        """A few images above what the decoder makes of their embeddings, and their captions below."""
        batch = fixed_batch(config.data, min(_PREVIEWS, config.train.batch_size))
        real, embedding, text = embed({**batch, "image": batch["image"].to(distributed.device)})
        stage = DecoderStage(ema_network, model, distributed.device)
        drawn = stage.sample(embedding, range(len(embedding)), text=text)
        return captioned_grid([real.cpu(), drawn.cpu()], batch["caption"])

    def export(state: dict[str, Tensor], folder: Path) -> None:
        save_part(folder, KIND, model, state)

    return fit(network, loss_fn, batches, config.train, run_config=config, export=export, sample=sample)


def start_from(network: Decoder, folder: Path) -> None:
    """Load a trained decoder's weights of the same shape.

    Where it predicts another quantity (ε, x_0, v), the output layer keeps its fresh zeros: it would put out the wrong
    thing, while the features below it serve as well. An inpainting decoder may start from one that is none: the
    weights of its additional input channels are zero, so that it begins by painting as the other did (GLIDE, §3.3).
    The same holds for what tells the network the embedding's noise level.
    Raises UnclipError: the weights do not fit otherwise.
    """
    before, state = load_part(folder, KIND, DecoderConfig)
    own = network.state_dict()
    if before.inpainting and not network.config.inpainting:
        raise UnclipError(f"{folder} holds an inpainting decoder; a decoder that does not inpaint cannot start from it")
    if network.config.inpainting and not before.inpainting:
        name = "unet.conv_in.weight"
        missing = own[name].shape[1] - state[name].shape[1]
        if missing > 0:
            state[name] = F.pad(state[name], (0, 0, 0, 0, 0, missing))
    fresh = [name for name in own if name not in state and name.startswith(_MAY_START_FRESH)]
    if before.diffusion.prediction != network.config.diffusion.prediction:
        fresh += [name for name in own if name.startswith("unet.conv_out.")]
    load_strict(network, {**state, **{name: own[name] for name in fresh}}, folder)
