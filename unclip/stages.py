"""The stages of a model side by side, and how each of them is run: what all of UnCLIP's methods stand on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unclip.clip import FrozenCLIP, TextFeatures
from unclip.diffusion import get_sampler, timesteps_from
from unclip.errors import UnclipError, UsageError
from unclip.inputs import SampleOptions, check_prompts, check_size, to_bytes
from unclip.parts import image_pixels
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from decoder import CaptionEncoder, DecoderStage
    from prior import PriorStage
    from upsamplers import UpsamplerStage


@dataclass(frozen=True)
class Negative:
    """What guidance moves away from: captions as the prior and as the decoder take them, and their image embeddings
    (B, E) where the decoder is to move away from these too.
    """

    text: TextFeatures
    caption: TextFeatures
    embedding: Tensor | None = None


class Stages:
    """CLIP, prior, decoder and upsamplers. Each family of UnCLIP's methods is a class that inherits this one."""

    clip: FrozenCLIP
    prior: PriorStage | None
    decoder: DecoderStage
    upsamplers: list[UpsamplerStage]
    manifest: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    timings: Timings
    _captions: CaptionEncoder | None  # may be large, and is for prompts alone

    @property
    def name(self) -> str:
        """What the manifest calls this model."""
        return str(self.manifest.get("name") or "unnamed")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edges of the pictures this model can make, in pixels."""
        sizes = [self.decoder.config.image_size]
        for stage in self.upsamplers:
            sizes.append(sizes[-1] * stage.config.factor)
        return tuple(sizes)

    @property
    def unit_length(self) -> bool:
        """Whether the decoder reads embeddings of length 1, and not as long as the CLIP makes them."""
        return self.decoder.config.embedding_length == "unit"

    def embed_text(self, prompts: str | Sequence[str]) -> TextFeatures:
        """CLIP's features of prompts: token features, mask, and embeddings (B, E) of unit length."""
        return self.clip.encode_text(check_prompts(prompts))

    def embed_image(self, images: Any, *, unit_length: bool | None = None) -> Tensor:
        """CLIP image embeddings (B, E) for a PIL image, a path, a tensor (B, 3, H, W) in [-1, 1], or a list of images
        and paths. Their length is 1 with `unit_length`, without it the CLIP's own, and by default the one that this
        model's decoder takes: 1, unless it was trained on the CLIP's own, as Karlo's was.
        """
        unit = self.unit_length if unit_length is None else unit_length
        embedding = self.clip.encode_image(image_pixels(images, self.clip.image_size, self.device), unit_length=unit)
        check_finite(embedding, "clip")
        return embedding

    def check_options(self, **options: Any) -> None:
        """UsageError, UnclipError: options of `sample` that this model cannot follow."""
        self._options(options)

    # ---- inside ----------------------------------------------------------------------------------------

    def check_size(self, size: int | None) -> int:
        """The size to make; UsageError when the model cannot make it."""
        return self.sizes[-1] if size is None else check_size(size, self.sizes)

    def _options(self, given: dict[str, Any]) -> SampleOptions:
        """Options that this model can follow, found out before any stage runs."""
        known = SampleOptions.__dataclass_fields__
        for name in given:
            if name not in known:
                raise UsageError(f"unknown option {name!r}; known: {', '.join(known)}")
        options = SampleOptions(**given)
        self.check_size(options.size)
        if options.sampler is not None:
            get_sampler(options.sampler)
        if options.prior_steps is not None and self.prior is not None:
            self.prior.check_options(steps=options.prior_steps)
        if options.decoder_steps is not None:
            timesteps_from(options.decoder_steps, self.decoder.process.timesteps)
        self.decoder.check_noise_level(options.embedding_noise_level or 0)
        for stage in self.upsamplers:
            stage.timesteps(options.upsampler_steps)
        return options

    def _caption(self, texts: Sequence[str], text: TextFeatures) -> TextFeatures:
        """What the decoder takes of captions whose CLIP features are `text`."""
        if self.decoder.config.text.kind == "clip":
            return text
        if self._captions is None:
            from decoder import CaptionEncoder

            self._captions = CaptionEncoder(self.decoder.config, self.clip)
        encoder = self._captions
        return self._timed("text", lambda: encoder.encode_text(texts, text))  # type: ignore[no-any-return]

    def _draw(
        self,
        texts: list[str],
        seeds: list[int],
        options: SampleOptions,
        progress: Progress | None,
        negative: list[str] | None = None,
        negative_embedding: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts, one seed each -> images (B, 3, S, S) in [-1, 1] and the prompts' text embeddings (B, E)."""
        text = self._timed("clip", lambda: self.embed_text(texts))
        caption = self._caption(texts, text)
        away = None
        if negative is not None:
            away = self._away(negative, seeds, options, progress, negative_embedding)
        embedding = self._prior(text, seeds, options, progress, away)
        return self._render(embedding, caption, seeds, options, progress, away), text.embedding

    def _away(
        self,
        texts: list[str],
        seeds: list[int],
        options: SampleOptions,
        progress: Progress | None,
        with_embedding: bool,
    ) -> Negative:
        """Negative prompts, one a sample. UsageError: no scale of guidance is above 1, so that they cannot act."""
        scales = {"prior_guidance": options.prior_guidance, "guidance": options.guidance}
        stages: dict[str, Any] = {"prior_guidance": self.prior, "guidance": self.decoder}
        for name, stage in stages.items():
            if scales[name] is None and stage is not None:
                scales[name] = stage.config.guidance
        asked = ["guidance"] if with_embedding else list(scales)
        if not any((scales[name] or 0) > 1 for name in asked):
            what = "the embedding of a negative prompt" if with_embedding else "a negative prompt"
            found = " and ".join(f"{name} is {scales[name] or 0:g}" for name in asked)
            raise UsageError(f"{what} acts where guidance is above 1, and {found}; raise {' or '.join(asked)}")
        text = self._timed("clip", lambda: self.embed_text(texts))
        embedding = self._prior(text, seeds, options, progress) if with_embedding else None
        return Negative(text, self._caption(texts, text), embedding)

    def _prior(
        self,
        text: TextFeatures,
        seeds: list[int],
        options: SampleOptions,
        progress: Progress | None,
        negative: Negative | None = None,
    ) -> Tensor:
        if self.prior is None:
            raise UnclipError(
                "this model has no prior, so it cannot start from a prompt; use variations or decode"
            )
        stage = self.prior
        return self._timed(
            "prior",
            lambda: stage.sample(
                text,
                seeds,
                steps=options.prior_steps,
                guidance=options.prior_guidance,
                negative=None if negative is None else negative.text,
                callback=heard("prior", progress),
            ),
        )

    def _render(
        self,
        embedding: Tensor | None,
        text: TextFeatures | None,
        seeds: list[int],
        options: SampleOptions,
        progress: Progress | None,
        negative: Negative | None = None,
    ) -> Tensor:
        """Embeddings (B, E), None for the decoder's null, -> images (B, 3, S, S) in [-1, 1] at the wanted size."""
        away: dict[str, Any] = {}
        if negative is not None:
            away = {"negative": negative.caption, "negative_embedding": negative.embedding}
        images = self._timed(
            "decoder",
            lambda: self.decoder.sample(
                embedding, seeds, text=text, callback=heard("decoder", progress), **options.of_decoder(), **away
            ),
        )
        return self._enlarge(images, seeds, options, progress, text)

    def _enlarge(
        self,
        images: Tensor,
        seeds: list[int],
        options: SampleOptions,
        progress: Progress | None,
        text: TextFeatures | None = None,
    ) -> Tensor:
        """Pictures (B, 3, S, S) of one of the model's sizes through the upsamplers, up to the wanted size; `text` is
        their captions, for an upsampler that reads them.
        """
        size = self.check_size(options.size)
        for stage in self.upsamplers:
            if images.shape[-1] >= size:
                break
            if stage.config.high_size <= images.shape[-1]:
                continue
            name = f"upsampler_{stage.config.high_size}"
            told = heard(name, progress)
            limit = to_bytes(options.memory_limit)
            draw = partial(stage.sample, images, seeds, options.upsampler_steps, told, memory_limit=limit, text=text)
            images = self._timed(name, draw)
        return images

    def _read_by_upsamplers(self, prompt: str, count: int) -> TextFeatures | None:
        """A prompt's features for `count` pictures that are enlarged, where an upsampler reads them."""
        if all(stage.config.text_dim is None for stage in self.upsamplers):
            return None
        return self._timed("clip", lambda: self.embed_text([prompt] * count))  # type: ignore[no-any-return]

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one stage and add up its time. Networks other than CLIP run in `dtype`; the samplers' state stays
        float32.
        """
        start = time.perf_counter()
        lower = self.dtype != torch.float32 and name != "clip"
        with torch.autocast(self.device.type, self.dtype) if lower else nullcontext():
            result = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timings.seconds[name] = self.timings.seconds.get(name, 0.0) + time.perf_counter() - start
        if isinstance(result, Tensor):
            check_finite(result, name, self.dtype if lower else torch.float32)
        return result

    @staticmethod
    def _finish(images: Tensor, output: str) -> Any:
        from unclip.data import to_pil

        return images if output == "tensor" else [to_pil(image) for image in images.cpu()]


def check_finite(result: Tensor, stage: str, dtype: torch.dtype = torch.float32) -> None:
    """UnclipError where a stage made what is no picture and no embedding."""
    if not bool(torch.isfinite(result).all()):
        kind = str(dtype).removeprefix("torch.")
        mend = "its weights are damaged" if dtype == torch.float32 else f"{kind} may be too coarse for it, try float32"
        raise UnclipError(f"the {stage} made NaN or infinite values; {mend}")


def heard(stage: str, progress: Progress | None) -> Any:
    """A stage's callback that passes on what happens."""
    return None if progress is None else lambda number, total, _x: progress(stage, number, total)


def negative_prompts(given: str | Sequence[str] | None, prompts: int, each: int) -> list[str] | None:
    """Negative prompts for `each` pictures of every prompt, from one for all or one a prompt. UsageError: another
    number of them, or an empty one.
    """
    if given is None:
        return None
    several = check_prompts(given, "negative prompt")
    if isinstance(given, str):
        several *= prompts
    if len(several) != prompts:
        raise UsageError(f"{len(several)} negative prompts for {prompts} prompts; expected one each, or one for all")
    return [text for text in several for _ in range(each)]
