"""Sampling images from CLIP image embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decoder.config import DecoderConfig
from decoder.dalle2 import Dalle2Decoder, Dalle2DecoderConfig
from decoder.inpainting import check_inpainting, keeping
from decoder.network import Decoder, ReadCondition
from decoder.objective import augmented_embedding
from decoder.text import text_embedding
from unclip.autoencoder import FrozenAutoencoder, located, open_autoencoder
from unclip.bundle import load_network, load_weights, read_part_json, read_statistics
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.diffusion import (
    Denoiser,
    GaussianDiffusion,
    SeededNoise,
    clip_from,
    get_sampler,
    make_denoiser,
    static_clip,
    timesteps_from,
)
from unclip.diffusion.samplers import Callback, Sampler
from unclip.digest import hold_in
from unclip.errors import UnclipError, UsageError
from unclip.nn.prepared import PreparedNetwork
from unclip.nn.storage import kept_for_reuse

KIND = "decoder"


class DecoderStage:
    """A trained decoder, ready to sample."""

    def __init__(self, network: nn.Module, config: DecoderConfig, device: torch.device | str = "cpu") -> None:
        self.network = network.eval()
        self.config = config
        self.device = torch.device(device)
        self.process = GaussianDiffusion(config.diffusion)
        self._autoencoder: FrozenAutoencoder | None = None

    def hold_in(self, dtype: torch.dtype) -> None:
        """Keep the weights in this precision and compute in it; norms' statistics and the sampler's state stay
        float32.
        """
        hold_in(self.network, dtype, self.config)

    @property
    def autoencoder(self) -> FrozenAutoencoder | None:
        """Of a decoder in latents, loaded when it is first used. Raises UnclipError: it cannot be loaded, or is another
        than the decoder was trained with.
        """
        latent = self.config.latent
        if latent is not None and self._autoencoder is None:
            self._autoencoder = open_autoencoder(latent, self.device)
        return self._autoencoder

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DecoderStage:
        """Read a part written by `train_decoder.py`. Raises UnclipError when it is incomplete or does not fit.

        With `dtype` bfloat16 or float16 the weights take half the memory; norms' statistics, the sampler's state and
        the images stay float32.
        """
        config, state = read_decoder_config(folder), load_weights(folder)
        network = load_network(lambda: build_network(config), state, folder)
        network = network.to(device, dtype).requires_grad_(False)
        stage = cls(network.to(memory_format=torch.channels_last), config, device)  # type: ignore[call-overload]
        statistics = read_statistics(folder)
        if statistics is not None:
            stage.process.use_statistics(statistics)
        return stage

    @torch.inference_mode()
    def sample(
        self,
        embedding: Tensor | None,
        seeds: Sequence[int],
        *,
        text: TextFeatures | None = None,
        steps: int | str | Sequence[int] | None = None,
        guidance: float | None = None,
        guidance_text: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        sampler: str | Sampler | None = None,
        eta: float | None = None,
        embedding_noise_level: int | None = None,
        negative: TextFeatures | None = None,
        negative_embedding: Tensor | None = None,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Image embeddings (B, E) (None: the learned null), one seed a sample, and optionally captions, as
        `CaptionEncoder` gives them -> images (B, 3, S, S) in [-1, 1], float32.

        guidance: scale for all conditions; 1 is the plain conditional model.
        guidance_text: with it, `guidance` is the scale for the image embedding alone, and this one for what the caption
        adds to it: out(∅) + s·(out(z) − out(∅)) + s_text·(out(z, y) − out(z)).
        guidance_interval, guidance_rescale: see `make_denoiser`.
        sampler: the name of one, or one made for the occasion (`repaint`, `sdedit`).
        embedding_noise_level: noise added to the embedding, in steps of the process, of which the network is told;
        needs a decoder trained with `embedding_noise_levels`.
        negative, negative_embedding: captions and image embeddings (B, E) to move away from. They take the place of ∅,
        each of them alone or both, and so act where the scale at ∅ is not 1.
        inpaint_image (B, 3, S, S) or (3, S, S) in [-1, 1] and inpaint_mask (B, 1, S, S) or (S, S), 1 = repaint,
        0 = keep: what is kept comes out as given. They need a decoder trained with `inpainting`, which without them
        paints everything.
        Raises UnclipError, UsageError: a shape or an option that does not fit this decoder.
        """
        config, count = self.config, len(seeds)
        level = embedding_noise_level or 0
        self._check(embedding, text, count, guidance_text, level)
        noise = SeededNoise(seeds)
        size = config.unet.image_size
        x = noise.draw((config.channels, size, size), self.device)
        condition = self._condition(embedding, text, count)
        null = self._null(condition, negative, negative_embedding, count)
        if config.embedding_noise_levels:
            # Drawn after x_T, which so depends on the seed alone.
            drawn = noise.draw((config.embedding_dim,), self.device) if level else torch.zeros(1, device=self.device)
            for one in (condition, null):
                one |= augmented_embedding(one["image_embedding"], level, drawn, self.process, config.scale)
        clip = clip_from(config.diffusion.x_start_clip, static_clip() if config.latent is None else None)
        if config.inpainting:
            image, known = self._known(inpaint_image, inpaint_mask, count)
            for one in (condition, null):
                one |= {"known_image": image, "known": known}
            clip = keeping(image, known, clip)
        elif inpaint_image is not None or inpaint_mask is not None:
            raise UsageError("this decoder was not trained to inpaint; use one trained with model.inpainting=true")
        options: dict[str, Any] = {
            "interval": config.guidance_interval if guidance_interval is None else guidance_interval,
            "rescale": config.guidance_rescale if guidance_rescale is None else guidance_rescale,
            "clip": clip,
        }
        has_text, has_embedding = text is not None, embedding is not None
        denoiser = self._denoiser(condition, null, guidance, guidance_text, has_text, has_embedding, options)
        kept = self.process.steps(timesteps_from(config.steps if steps is None else steps, self.process.timesteps))
        draw = get_sampler(sampler or config.sampler)
        with kept_for_reuse(self.device):
            x = draw(denoiser, x, kept, noise, callback=callback, **({} if eta is None else {"eta": eta}))
        x = self.to_pixels(x)
        # Multistep samplers end on a mixture of several x̂_0; what is kept is kept to the bit.
        return keeping(condition["known_image"], condition["known"], None)(x) if config.inpainting else x

    def to_x_start(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] as the process knows them: themselves, or their latents."""
        autoencoder = self.autoencoder
        return images if autoencoder is None else autoencoder.encode(images)

    def to_pixels(self, x_start: Tensor) -> Tensor:
        """The images (B, 3, S, S) in [-1, 1] of what the process ends with."""
        autoencoder = self.autoencoder
        return x_start.clamp(-1, 1) if autoencoder is None else autoencoder.decode(x_start.float())

    def conditional(self, embedding: Tensor, text: TextFeatures | None = None) -> Denoiser:
        """The denoiser of these embeddings (B, E) and captions, without guidance or clipping; all is to be painted. Its
        x_start are latents where the decoder works in latents.
        """
        condition = self._condition(embedding, text, len(embedding))
        if self.config.embedding_noise_levels:
            clean = torch.zeros(1, device=self.device)
            own = condition["image_embedding"]
            condition |= augmented_embedding(own, 0, clean, self.process, self.config.scale)
        if self.config.inpainting:
            image, known = self._known(None, None, len(embedding))
            condition |= {"known_image": image, "known": known}
        null = self._null(condition, None, None, len(embedding))
        return self._denoiser(condition, null, 1.0, 1.0, text is not None, True, {})

    def _denoiser(
        self,
        condition: dict[str, Tensor],
        null: dict[str, Tensor],
        guidance: float | None,
        guidance_text: float | None,
        has_text: bool,
        has_embedding: bool,
        options: dict[str, Any],
    ) -> Denoiser:
        config = self.config
        yes = torch.ones_like(condition["drop_text"])
        dtype = next(self.network.parameters()).dtype

        def cast(conditioning: dict[str, Any]) -> dict[str, Any]:
            return {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditioning.items()}

        own: Any = self.network

        def step(x: Tensor, t: Tensor, read: ReadCondition) -> Tensor:
            return own.conditioned(x.to(dtype).contiguous(memory_format=torch.channels_last), t, read)  # type: ignore[no-any-return]

        # The conditioning goes through the network once for all steps.
        network = PreparedNetwork(lambda **conditioning: own.read(**cast(conditioning)), step)
        scale = config.guidance if guidance is None else guidance
        text_scale = config.guidance_text if guidance_text is None else guidance_text
        if text_scale is None or not has_text:
            return make_denoiser(network, self.process, condition, null, scale, **options)
        if not has_embedding:
            return make_denoiser(network, self.process, condition, null, text_scale, **options)
        chain = [{**condition, "drop_text": yes}, condition]
        return make_denoiser(network, self.process, chain, null, [scale, text_scale], **options)

    def _check(
        self,
        embedding: Tensor | None,
        text: TextFeatures | None,
        count: int,
        guidance_text: float | None,
        noise_level: int,
    ) -> None:
        config = self.config
        if embedding is not None and embedding.shape != (count, config.embedding_dim):
            raise UnclipError(
                f"image embeddings of shape {tuple(embedding.shape)}; this decoder takes ({count}, "
                f"{config.embedding_dim})"
            )
        width = () if config.feature_dim is None else (config.feature_dim,)
        tokens = (count, config.context_length, *width)
        if text is not None and (text.tokens.shape != tokens or text.tokens.is_floating_point() != bool(width)):
            kind = {
                "clip": "token features of the CLIP it was trained with",
                "glide": "token ids, as decoder.CaptionEncoder gives them",
                "t5": "features of its T5, as decoder.CaptionEncoder gives them",
            }[config.text.kind]
            raise UnclipError(
                f"text tokens of shape {tuple(text.tokens.shape)} and type {str(text.tokens.dtype)[6:]}; this decoder "
                f"takes {tokens}: {kind}"
            )
        null: Any = getattr(self.network, "null_mask", None)
        if null is not None and not bool(null.any()):
            raise UnclipError(
                "this decoder drops a caption by the CLIP's features of '', and it holds none; set them with "
                "Decoder.set_null_text"
            )
        if text is None and guidance_text is not None:
            raise UsageError(f"guidance_text {guidance_text} needs a caption, and none is given; leave it out")
        self.check_noise_level(noise_level)

    def check_noise_level(self, level: int) -> None:
        """UsageError unless this decoder can be told that its embeddings carry so much noise."""
        largest = self.config.embedding_noise_levels
        if level and not largest:
            raise UsageError(
                f"embedding_noise_level {level} needs a decoder trained with model.embedding_noise_levels, which this "
                "one was not; leave it out"
            )
        if not 0 <= level <= largest:
            raise UsageError(f"embedding_noise_level is {level}; this decoder takes 0 to {largest}")

    def _null(
        self, condition: dict[str, Tensor], negative: TextFeatures | None, embedding: Tensor | None, count: int
    ) -> dict[str, Tensor]:
        """What guidance moves away from: neither embedding nor caption, or those given to move away from."""
        yes = torch.ones_like(condition["drop_text"])
        if negative is None and embedding is None:
            return {**condition, "drop_embedding": yes, "drop_text": yes}
        self._check(embedding, negative, count, None, 0)
        return self._condition(embedding, negative, count)

    def _known(self, image: Tensor | None, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """What is known of the pictures: image (B, 3, S, S) and where (B, 1, S, S); nothing, when nothing is given."""
        size = self.config.unet.image_size
        if image is None and mask is None:
            zeros = torch.zeros(count, 3, size, size, device=self.device)
            return zeros, zeros[:, :1]
        if image is None or mask is None:
            missing = "inpaint_image" if image is None else "inpaint_mask"
            raise UsageError(f"{missing} is missing; inpainting takes an image and a mask, 1 = repaint, 0 = keep")
        image, known = check_inpainting(image, mask, count, size)
        return image.to(self.device), known.to(self.device)

    def _condition(self, embedding: Tensor | None, text: TextFeatures | None, count: int) -> dict[str, Tensor]:
        config, device = self.config, self.device
        flags = torch.zeros(count, dtype=torch.bool, device=device)
        condition = {
            "image_embedding": torch.zeros(count, config.embedding_dim, device=device)
            if embedding is None
            else embedding.to(device).float(),
            "drop_embedding": flags | (embedding is None),
            "drop_text": flags | (text is None),
        }
        shape = (count, config.context_length)
        if text is not None:
            condition |= {"text_tokens": text.tokens.to(device), "text_mask": text.mask.to(device)}
        else:
            ids = config.feature_dim is None
            condition |= {
                "text_tokens": torch.zeros(shape, dtype=torch.long, device=device)
                if ids
                else torch.zeros(*shape, config.feature_dim or 0, device=device),
                "text_mask": torch.zeros(shape, dtype=torch.bool, device=device),
            }
        if config.text_embedding_to_time:
            condition["text_embedding"] = (
                torch.zeros(count, config.embedding_dim, device=device)
                if text is None
                else text_embedding(text, config).to(device)
            )
        return condition


def build_network(config: DecoderConfig) -> nn.Module:
    """The network that a configuration describes, with fresh weights."""
    return Dalle2Decoder(config) if isinstance(config, Dalle2DecoderConfig) else Decoder(config)


def read_decoder_config(folder: Path) -> DecoderConfig:
    """The configuration of a decoder's folder, of the class that its `architecture` names; an autoencoder that the
    folder carries has its place in it as its name. Raises UnclipError.
    """
    body = read_part_json(folder, KIND)["config"]
    foreign = isinstance(body, dict) and body.get("architecture") == "dalle2"
    config = parse_config(Dalle2DecoderConfig if foreign else DecoderConfig, body, origin=str(folder / "config.json"))
    return config.model_copy(update={"latent": located(config.latent, folder)})
