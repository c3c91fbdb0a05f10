"""A stage's training step as its own training script does it, with networks that have no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from unclip.autoencoder import FrozenAutoencoder
from unclip.clip import FrozenCLIP, TextFeatures, build_architecture, clip_loss
from unclip.config_latent import LatentConfig
from unclip.diffusion import GaussianDiffusion
from unclip.planning.recipe import Recipe
from unclip.planning.trace import Run
from unclip.training import EmbeddingMemo
from unclip.training.finetune import tune


@dataclass
class Workload:
    """The network that a run trains, the frozen encoders beside it by name, and one micro-batch through all of them:
    `run(batch, frozen_done)` returns the mean loss and calls `frozen_done()` between encoders and network.
    """

    network: nn.Module
    frozen: dict[str, nn.Module]
    run: Run
    assumptions: list[str] = field(default_factory=list)


def build_network(recipe: Recipe) -> nn.Module:
    """The network of a recipe by its stage's own constructor, on the default device."""
    model = recipe.config.model
    if recipe.stage == "clip":
        return build_architecture(model.open_clip_config())
    if recipe.stage == "prior":
        from prior.sampling import build_network as build_prior

        return build_prior(model)
    if recipe.stage == "decoder":
        from decoder import Decoder

        return Decoder(model)
    from upsamplers import Upsampler

    return Upsampler(model)


def open_workload(recipe: Recipe) -> Workload:
    """Network, encoders and step of a recipe; call and use this under `planning_tensors()`."""
    builders = {"clip": _clip, "prior": _prior, "decoder": _decoder, "upsampler": _upsampler}
    if recipe.config.train.lora is None:
        network = build_network(recipe)
        tune(network, recipe.config.train)
    else:
        with unset_fake_temporarily(), torch.device("meta"):  # peft cannot move tensors without memory
            network = build_network(recipe)
            tune(network, recipe.config.train)
        network.to_empty(device="cpu")
    return builders[recipe.stage](recipe, network.train())


def _clip(recipe: Recipe, network: nn.Module) -> Workload:
    model = recipe.config.model

    def run(batch: int, frozen_done: Callable[[], None]) -> Tensor:
        image, ids = _images(batch, model.image_size), _ids(batch, model.context_length)
        frozen_done()
        output = network(image, ids)
        return clip_loss(
            output["image_features"].float(),
            output["text_features"].float(),
            output["logit_scale"].clamp(max=100),
        )

    told = [
        "the contrastive loss is counted over one micro-batch, not over those of all GPUs, which is a small difference",
        "train.accumulation divides the batch within which images and captions are contrasted; more GPUs do not",
    ]
    return Workload(network, {}, run, told)


def _prior(recipe: Recipe, network: nn.Module) -> Workload:
    from prior.autoregressive import AutoregressivePrior
    from prior.config import AutoregressivePriorConfig
    from prior.objective import autoregressive_loss, prior_loss

    model: Any = recipe.config.model
    process = None if isinstance(model, AutoregressivePriorConfig) else GaussianDiffusion(model.diffusion)
    encoders = _Encoders(recipe, unit_length=model.embedding_length == "unit")
    network.computes_padding = True  # type: ignore[assignment]

    def run(batch: int, frozen_done: Callable[[], None]) -> Tensor:
        embedding = encoders.images(_images(batch, _edge(recipe)))
        text = encoders.captions(batch, model.text_length, model.token_dim)
        frozen_done()
        generator = torch.Generator()
        if isinstance(network, AutoregressivePrior):
            losses = autoregressive_loss(network, network, model, embedding, text, generator)
        else:
            losses = prior_loss(network, network, process, model, embedding, text, generator)  # type: ignore[arg-type]
        return losses["loss"].mean()

    return Workload(network, encoders.modules, run, ["captions fill the context; shorter ones take less"])


def _decoder(recipe: Recipe, network: nn.Module) -> Workload:
    from decoder.config import GlideText, T5Text
    from decoder.objective import decoder_loss

    model = recipe.config.model
    process = GaussianDiffusion(model.diffusion)
    text = model.text
    t5 = _FrozenText(text.name, text.length) if isinstance(text, T5Text) else None
    needs_clip = t5 is None and not isinstance(text, GlideText)
    encoders = _Encoders(recipe, unit_length=model.embedding_length == "unit")
    told = [] if t5 is None else [t5.told]
    if t5 is not None and t5.encoder is not None:
        encoders.modules["t5"] = t5.encoder

    latents = _Latents(model.latent, encoders.modules)

    def captions(batch: int) -> TextFeatures:
        clip = None
        if needs_clip or model.text_embedding_to_time:
            clip = encoders.captions(batch, model.text_length, model.token_dim)
        if clip is not None and needs_clip:
            return clip
        embedding = torch.zeros(batch, 0) if clip is None else clip.embedding
        norm = None if clip is None else clip.norm
        mask = torch.ones(batch, text.length, dtype=torch.bool)
        tokens = _ids(batch, text.length) if t5 is None else t5(batch, model.feature_dim)
        return TextFeatures(tokens, mask, embedding, norm)

    def run(batch: int, frozen_done: Callable[[], None]) -> Tensor:
        image = _images(batch, _edge(recipe)).contiguous(memory_format=torch.channels_last)
        embedding, text = encoders.images(image), captions(batch)
        x_start = latents.encode(image)
        frozen_done()
        losses = decoder_loss(network, process, model, x_start, embedding, text, torch.Generator())
        return losses["loss"].mean()

    return Workload(network, encoders.modules, run, told)


def _upsampler(recipe: Recipe, network: nn.Module) -> Workload:
    from unclip.config import parse_config
    from upsamplers.config import NoCorruptionConfig, UpsamplerConfig
    from upsamplers.objective import pair, pair_loss

    # A corruption looks at pixels, which are not there; it is the data's preparation and no part of the network.
    body = {**recipe.config.model.model_dump(), "corruption": NoCorruptionConfig().model_dump()}
    model = parse_config(UpsamplerConfig, body)
    process = GaussianDiffusion(model.diffusion)
    frozen: dict[str, nn.Module] = {}
    latents = None if model.latent is None else _Latents(model.latent, frozen)

    def run(batch: int, frozen_done: Callable[[], None]) -> Tensor:
        generator = torch.Generator()
        x_start, low_res = pair(_images(batch, _edge(recipe)), model, generator, latents)
        frozen_done()
        return pair_loss(network, process, model, x_start, low_res, generator)["loss"].mean()

    return Workload(network, frozen, run, ["the corruption of the low-resolution image is not counted"])


class _Latents:
    """Images -> latents by the autoencoder in a local folder, which is entered into `modules`; for another name,
    latents of its shape at no cost.
    """

    def __init__(self, latent: LatentConfig | None, modules: dict[str, nn.Module]) -> None:
        self.latent = latent
        self.model: FrozenAutoencoder | None = None
        if latent is not None and Path(latent.name).expanduser().is_dir():
            self.model = modules["autoencoder"] = FrozenAutoencoder.without_weights(latent.name)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/f, W/f); in pixels the images themselves."""
        if self.model is not None:
            return self.model.encode(images)
        if self.latent is None:
            return images
        edges = (size // self.latent.factor for size in images.shape[2:])
        return images.new_zeros(len(images), self.latent.channels, *edges)


class _Encoders:
    """The frozen CLIP of a recipe as the stages use it; where none can be found, features of its shape at no cost."""

    def __init__(self, recipe: Recipe, unit_length: bool) -> None:
        self._dim = recipe.config.model.embedding_dim
        self.modules: dict[str, nn.Module] = {}
        self._memo: EmbeddingMemo | None = None
        if recipe.clip is not None:
            clip = FrozenCLIP(build_architecture(recipe.clip), _Tokenizer(), recipe.config.clip)
            self.modules["clip"] = clip
            # A cache would look at pixels; what it spares after the first epoch is told in the plan's assumptions.
            self._memo = EmbeddingMemo(clip, 0, unit_length=unit_length)

    def images(self, images: Tensor) -> Tensor:
        if self._memo is None:
            return torch.randn(len(images), self._dim)
        return self._memo.encode_image(images)

    def captions(self, batch: int, length: int, width: int) -> TextFeatures:
        if self._memo is None:
            mask = torch.ones(batch, length, dtype=torch.bool)
            return TextFeatures(
                torch.randn(batch, length, width), mask, torch.randn(batch, self._dim), torch.ones(batch)
            )
        return self._memo.encode_text([""] * batch)


class _Tokenizer:
    """Ids of the right shape for captions that nobody has read."""

    def __call__(self, captions: Sequence[str], context_length: int = 77) -> Tensor:
        return _ids(len(captions), context_length)


class _FrozenText:
    """A T5-style encoder whose configuration lies in a local folder; for another name, features at no cost."""

    def __init__(self, name: str, length: int) -> None:
        self.encoder: nn.Module | None = None
        self.length = length
        self.told = f"the text encoder {name!r} is no local folder: running it is not counted"
        if (Path(name) / "config.json").is_file():
            import transformers

            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
            self.encoder = transformers.AutoModelForTextEncoding.from_config(config).eval().requires_grad_(False)
            self.told = f"the frozen text encoder is the one in {name}"

    def __call__(self, batch: int, width: int) -> Tensor:
        if self.encoder is None:
            return torch.randn(batch, self.length, width)
        ids = _ids(batch, self.length)
        with torch.no_grad():
            features: Tensor = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return features.float()


def _images(batch: int, edge: int) -> Tensor:
    return torch.randn(batch, 3, edge, edge)


def _ids(batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, dtype=torch.int64)


def _edge(recipe: Recipe) -> int:
    """Edge of the images that reach the network, pixels."""
    data = recipe.config.data
    return int(data.crop_size or data.image_size)
