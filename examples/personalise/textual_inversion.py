"""Textual inversion (Gal et al. 2022): a new word, learned from a few pictures, while all networks stay as they are.

    deepspeed examples/personalise/textual_inversion.py --config examples/personalise/textual_inversion.yaml

The run writes `token.safetensors`, for `unclip sample --token` and `UnCLIP.from_pretrained(tokens=…)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from decoder.objective import decoder_loss
from prior.objective import autoregressive_loss, prior_loss
from prior.sampling import DiffusionPriorStage
from unclip import UnCLIP
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.config import Config, DataConfig, TrainConfig
from unclip.data import make_grid, to_pil
from unclip.errors import UsageError
from unclip.tokens import check_name
from unclip.training import Distributed, fit, main_for, open_batches

PREVIEWS = 8


class TokenConfig(Config):
    """The new word."""

    name: str = Field("<zorb>", description="how captions mention it: small letters, digits, - or _ between < and >")
    words: str = Field("apple", description="what it starts from, in words that the CLIP knows")
    rows: int | None = Field(
        None, ge=1, description="rows of the token table that it takes; by default as many as `words`"
    )


class LossConfig(Config):
    """What the word is to bring about, and how much of it counts."""

    prior: float = Field(1.0, ge=0, description="weight: the prior is to predict the pictures' CLIP embeddings")
    decoder: float = Field(1.0, ge=0, description="weight: the decoder is to draw the pictures")
    drop_embedding: float = Field(
        0.5, ge=0, le=1, description="share of samples in which the decoder has the caption alone to go by"
    )

    @model_validator(mode="after")
    def _something_counts(self) -> LossConfig:
        if not self.prior + self.decoder:
            raise ValueError("prior and decoder are both 0, so that there is nothing to learn from")
        return self


class InversionConfig(Config):
    """A run of textual inversion."""

    bundle: str = Field("emoji", description="the model whose word it is to become: 'emoji', a folder, or a Hub id")
    model: TokenConfig = TokenConfig()
    templates: tuple[str, ...] = Field(
        ("{}", "a {}", "a picture of a {}"), min_length=1, description="captions, {} in the place of the word"
    )
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _mention_it(self) -> InversionConfig:
        check = [text for text in self.templates if "{}" not in text]
        if check:
            raise ValueError(f"the template {check[0]!r} has no {{}} for the word")
        return self


class Token(nn.Module):
    """The only thing that learns: rows (V, D) of the CLIP's token table."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self) -> Tensor:
        return self.rows.clone()  # ZeRO 3 takes the parameter itself away again


def run(config: InversionConfig, distributed: Distributed) -> Path:
    """Learn the word. Raises UsageError: a name that is none, pictures of another size, a decoder that reads captions
    with a vocabulary of its own while `loss.decoder` is above 0.
    """
    name, loss = check_name(config.model.name), config.loss
    system = UnCLIP.from_pretrained(config.bundle, device=distributed.device, size=config.data.image_size)
    size, asked = system.decoder.config.image_size, config.data.image_size
    if asked != size:
        raise UsageError(f"data.image_size is {asked}, and the decoder of {config.bundle} draws {size} px")
    if loss.decoder and system.decoder.config.text.kind != "clip":
        raise UsageError(
            f"the decoder of {config.bundle} reads captions with a vocabulary of its own, which a word of the CLIP "
            "does not reach; set loss.decoder=0"
        )
    if loss.prior and system.prior is None:
        raise UsageError(f"{config.bundle} has no prior; set loss.prior=0")
    clip, captions = system.clip, [template.format(name) for template in config.templates]
    token = Token(start_rows(clip, config.model))

    def loss_fn(engine: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        image: Tensor = batch["image"]
        which = torch.randint(len(captions), (len(image),), generator=generator, device=image.device)
        text = clip.text_features([captions[i] for i in which.tolist()], {name: engine()})
        return token_loss(system, loss, image, text, generator)

    def sample(ema: nn.Module) -> Image.Image:
        with torch.no_grad():
            text = clip.text_features([captions[0]] * PREVIEWS, {name: ema()})
        seeds = range(PREVIEWS)
        embedding = None if system.prior is None else system.prior.sample(text, seeds)
        drawn = system.decoder.sample(embedding, seeds, text=text)
        return make_grid([to_pil(image) for image in drawn.cpu()], columns=PREVIEWS)

    def export(state: dict[str, Tensor], folder: Path) -> Path:
        file = folder.with_name("token.safetensors")
        clip.learned({name: state["rows"]}, {name: config.model.words}).save(file)
        return file

    batches = open_batches(config.data, config.train, distributed)
    return fit(token, loss_fn, batches, config.train, run_config=config, export=export, sample=sample)


def token_loss(
    system: UnCLIP, loss: LossConfig, image: Tensor, text: TextFeatures, generator: torch.Generator
) -> dict[str, Tensor]:
    """Per-sample losses (B,) of the frozen networks for images (B, 3, S, S) in [-1, 1] and what the CLIP makes of
    captions with the word; `loss` is their weighted sum.
    """
    prior, decoder = system.prior, system.decoder
    unit = decoder.config.embedding_length == "unit"
    embedding = system.clip.encode_image(image, unit_length=unit)  # what the prior makes, the decoder takes
    losses = {"loss": torch.zeros(len(image), device=image.device)}
    if prior is not None and loss.prior:
        # No caption is dropped: where it is, nothing is said of the word.
        told: Any = prior.config.model_copy(update={"drop_text": 0.0})
        if isinstance(prior, DiffusionPriorStage):
            found = prior_loss(prior.network, prior.network, prior.process, told, embedding, text, generator)
        else:
            found = autoregressive_loss(prior.network, prior.network, told, embedding, text, generator)
        losses["prior"], losses["cosine"] = found["loss"], found["cosine"]
        losses["loss"] = losses["loss"] + loss.prior * losses["prior"]
    if loss.decoder:
        given = decoder.config.model_copy(
            update={"drop_text": 0.0, "drop_both": 0.0, "drop_embedding": loss.drop_embedding}
        )
        x_start = decoder.to_x_start(image)
        found = decoder_loss(decoder.network, decoder.process, given, x_start, embedding, text, generator)
        losses["decoder"] = found["loss"]
        losses["loss"] = losses["loss"] + loss.decoder * losses["decoder"]
    return losses


def start_rows(clip: FrozenCLIP, config: TokenConfig) -> Tensor:
    """The rows (V, D) of the words that it starts from, repeated or cut to as many as asked for. UsageError: no
    words."""
    rows = clip.token_vectors(config.words)
    if not len(rows):
        raise UsageError("model.words is empty; say what the word is to start from, such as 'apple'")
    wanted = config.rows or len(rows)
    return rows[torch.arange(wanted, device=rows.device) % len(rows)]


if __name__ == "__main__":
    main_for(InversionConfig, run, (__doc__ or "").partition("\n")[0])
