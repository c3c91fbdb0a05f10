"""UnCLIP: the stages of a bundle as one object. Text -> image embedding -> 64 px -> 256 px -> 1024 px."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from unclip.adapters import apply_adapters
from unclip.bundle import BUNDLED, MANIFEST, PARTS, PCA, read_manifest, resolve_model
from unclip.clip import FrozenCLIP
from unclip.components import PrincipalComponents
from unclip.editing import Editing
from unclip.errors import UnclipError, UsageError
from unclip.inputs import (
    SampleOptions,
    check_count,
    check_dtype,
    check_embeddings,
    check_output,
    check_prompts,
    check_seeds,
    check_size,
    resolve_device,
)
from unclip.latents import Latents
from unclip.manipulation import Manipulation
from unclip.mixing import Mixing
from unclip.parts import bundle_sizes, check_fit, image_pixels, needed_parts
from unclip.probing import Probing
from unclip.reranking import Reranking
from unclip.stages import Stages, negative_prompts
from unclip.tokens import LearnedTokens
from unclip.upscaling import Progress, Timings, Upscaling

if TYPE_CHECKING:
    from PIL.Image import Image

    from decoder import DecoderStage
    from prior import PriorStage
    from upsamplers import UpsamplerStage


class UnCLIP(Manipulation, Editing, Probing, Mixing, Reranking, Stages, Upscaling):
    """A whole unCLIP system. `UnCLIP.from_pretrained()` loads the model that comes with the package.

    >>> from unclip import UnCLIP
    >>> model = UnCLIP.from_pretrained()
    >>> model.sizes
    (64, 256, 1024)
    >>> images = model.sample("pizza", size=64, seed=0)
    >>> images[0].size
    (64, 64)
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        decoder: DecoderStage,
        prior: PriorStage | None = None,
        upsamplers: Sequence[UpsamplerStage] = (),
        manifest: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        components: PrincipalComponents | None = None,
    ) -> None:
        self.components = components
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, list(upsamplers)
        self.manifest = manifest or {}
        self.device, self.dtype = torch.device(device), dtype
        self.timings = Timings()
        self._captions = None
        check_fit(clip, decoder, prior, self.upsamplers, components)

    # ---- loading ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = BUNDLED,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        size: int | None = None,
        revision: str | None = None,
        adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
        tokens: Sequence[str | Path | LearnedTokens] = (),
    ) -> UnCLIP:
        """Load a bundle: the bundled model by default, a folder with `unclip.json`, or a Hub id 'user/name', which
        may name a revision: 'user/name@main'. Of a Hub id only the parts that `size` needs are downloaded.

        `dtype` is the precision that the networks compute in; `size` leaves out the upsamplers that are not
        needed for it; `adapters` are folders of low-rank adapters, 'FOLDER', 'FOLDER:0.5' or (folder, 0.5), which
        are merged into the weights; `tokens` are learned ones, or files of them, which prompts may mention from then
        on. Raises UnclipError: no such folder, a part missing, parts that do not fit together, weights damaged, an
        adapter for another network, tokens of another CLIP, no such device. UsageError: a size that the model cannot
        make.
        """
        from decoder import DecoderStage
        from prior import PriorStage
        from upsamplers import UpsamplerStage

        check_dtype(dtype)
        folder = resolve_model(name, revision, parts=lambda described: needed_parts(described, size))
        manifest = read_manifest(folder)
        parts: dict[str, str] = manifest["parts"]
        for needed in ("clip", "decoder"):
            if needed not in parts:
                raise UnclipError(f"{folder / MANIFEST} names no {needed!r}; it has {', '.join(parts)}")
        if size is not None:
            check_size(size, bundle_sizes(folder, parts))
        place = resolve_device(device)
        clip = FrozenCLIP.load(str(folder / parts["clip"]), device=place)
        for given in tokens:
            clip.add_tokens(given if isinstance(given, LearnedTokens) else LearnedTokens.load(given))
        decoder = DecoderStage.load(folder / parts["decoder"], place)
        prior = PriorStage.load(folder / parts["prior"], place) if "prior" in parts else None
        upsamplers = []
        reached = decoder.config.image_size
        for part in PARTS[3:]:
            if part in parts and (size is None or reached < size):
                stage = UpsamplerStage.load(folder / parts[part], place)
                upsamplers.append(stage)
                reached *= stage.config.factor
        own: dict[str, list[Any]] = {"prior": [prior] if prior else [], "decoder": [decoder], "upsampler": upsamplers}
        apply_adapters(adapters, own, all_there=size is None)
        if dtype != torch.float32:
            # Autocast would cast frozen weights anew at every sampling step. Adapters were merged in float32.
            decoder.hold_in(dtype)
            if prior is not None:
                prior.hold_in(dtype)
            for stage in upsamplers:
                stage.hold_in(dtype)
        components = PrincipalComponents.load(folder / parts[PCA]) if PCA in parts else None
        return cls(clip, decoder, prior, upsamplers, manifest, place, dtype, components)

    # ---- embeddings ------------------------------------------------------------------------------------

    def predict_embedding(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        options: SampleOptions | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """The prior's image embeddings (B, E); a single seed serves all prompts, as in `sample`."""
        text = self.embed_text(prompts)
        return self._prior(text, check_seeds(seed, len(text)), options or SampleOptions(), progress)

    # ---- pictures --------------------------------------------------------------------------------------

    @overload
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = ...,
        seed: int | Sequence[int] = ...,
        negative_prompt: str | Sequence[str] | None = ...,
        negative_embedding: bool = ...,
        output: Literal["pil"] = ...,
        progress: Progress | None = ...,
        **options: Any,
    ) -> list[Image]: ...
    @overload
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = ...,
        seed: int | Sequence[int] = ...,
        negative_prompt: str | Sequence[str] | None = ...,
        negative_embedding: bool = ...,
        output: Literal["tensor"],
        progress: Progress | None = ...,
        **options: Any,
    ) -> Tensor: ...
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] | None = None,
        negative_embedding: bool = False,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """Pictures for prompts: `num_images` of each, in the order of the prompts.

        Image i of a prompt is drawn with seed + i, so the same seed gives the same picture whatever else is
        in the batch; `seed` may also be a sequence with one seed a prompt. `options` are the fields of
        SampleOptions (size, guidance, decoder_steps, …). Returns PIL images, or with output="tensor" a tensor
        (B, 3, S, S) in [-1, 1].

        negative_prompt, one for all or one a prompt: guidance of the prior and the decoder moves away from it instead
        of from no caption. Where the scale is 1 it does nothing. negative_embedding: the decoder also moves away from
        the prior's embedding of it.
        Raises UsageError: an empty prompt, an impossible size, a negative prompt where no guidance is above 1.
        """
        check_output(output)
        check_count(num_images)
        chosen = self._options(options)
        several = check_prompts(prompts)
        texts = [prompt for prompt in several for _ in range(num_images)]
        seeds = [first + i for first in check_seeds(seed, len(several)) for i in range(num_images)]
        check_seeds(seeds, len(texts))
        negative = negative_prompts(negative_prompt, len(several), num_images)
        self.timings = Timings()
        images, _ = self._draw(texts, seeds, chosen, progress, negative, negative_embedding)
        return self._finish(images, output)

    @overload
    def variations(
        self,
        image: Any,
        *,
        num_images: int = ...,
        seed: int = ...,
        output: Literal["pil"] = ...,
        progress: Progress | None = ...,
        **options: Any,
    ) -> list[Image]: ...
    @overload
    def variations(
        self,
        image: Any,
        *,
        num_images: int = ...,
        seed: int = ...,
        output: Literal["tensor"],
        progress: Progress | None = ...,
        **options: Any,
    ) -> Tensor: ...
    def variations(
        self,
        image: Any,
        *,
        num_images: int = 1,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """Pictures that share an image's CLIP embedding (unCLIP §3.1), from fresh noise.

        With `Latents` of one picture in place of the image they start from its own x_T; the option eta then says how
        much noise is drawn on the way, 0 (the picture itself) to 1 (x_T forgotten; default).
        """
        check_output(output)
        check_count(num_images)
        chosen = self._options(options)
        if isinstance(image, Latents):
            self.timings = Timings()
            eta = 1.0 if chosen.eta is None else chosen.eta
            return self._finish(self._varied(image, num_images, seed, eta, chosen, progress), output)
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        self.timings = Timings()
        pixels = image_pixels(image, self.clip.image_size, self.device)
        embedding = self._timed("clip", lambda: self.embed_image(pixels))
        if len(embedding) != 1:
            raise UsageError(f"variations takes one image, got {len(embedding)}")
        images = self._render(embedding.expand(num_images, -1), None, seeds, chosen, progress)
        return self._finish(images, output)

    @overload
    def decode(
        self,
        embeddings: Any,
        *,
        seed: int | Sequence[int] = ...,
        output: Literal["pil"] = ...,
        progress: Progress | None = ...,
        **options: Any,
    ) -> list[Image]: ...
    @overload
    def decode(
        self,
        embeddings: Any,
        *,
        seed: int | Sequence[int] = ...,
        output: Literal["tensor"],
        progress: Progress | None = ...,
        **options: Any,
    ) -> Tensor: ...
    def decode(
        self,
        embeddings: Any,
        *,
        seed: int | Sequence[int] = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """Pictures straight from CLIP image embeddings, (E,) or (B, E), tensor or numpy array of floats; any
        length is brought to 1, unless the decoder takes embeddings as long as the CLIP makes them. All are drawn
        with the same seed, or with one each. Raises UsageError: wrong width, dtype, NaN, a vector of zeros.
        """
        check_output(output)
        chosen = self._options(options)
        self.timings = Timings()
        embedding = check_embeddings(embeddings, self.clip.embedding_dim, unit_length=self.unit_length)
        images = self._render(embedding, None, check_seeds(seed, len(embedding)), chosen, progress)
        return self._finish(images, output)
