"""Looking into CLIP's image space by drawing what lies there (unCLIP, §4 and §5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from unclip.clip import TextFeatures
from unclip.components import PrincipalComponents
from unclip.errors import UnclipError, UsageError
from unclip.inputs import SampleOptions, check_count, check_prompts, check_seeds
from unclip.parts import image_pixels
from unclip.stages import Stages
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER_DIMS = (20, 30, 40, 80, 120, 160, 200, 320)
"""The numbers of dimensions of unCLIP's Figure 7."""
Conditioning = Literal["caption", "text embedding", "prior"]
CONDITIONINGS: tuple[Conditioning, ...] = get_args(Conditioning)


@dataclass(frozen=True)
class Reconstructions:
    """One image from its embedding's first principal components, more of them from picture to picture.

    errors: ‖z − ẑ‖ / ‖z‖ before ẑ is brought to the length that the decoder takes; cosines: cos(z, ẑ).
    """

    dims: tuple[int, ...]
    embeddings: Tensor
    errors: tuple[float, ...]
    cosines: tuple[float, ...]
    images: list[Image]


@dataclass(frozen=True)
class Attack:
    """A picture, what CLIP takes it for, and variations of it. `text` is what was written on it, None for nothing."""

    text: str | None
    image: Image
    probabilities: dict[str, float]
    variations: list[Image]


class Probing(Stages):
    """The methods `pca`, `zero_shot`, `typographic`, `compare_conditioning`, `draw_conditioned` and `guidance_sheet`.
    """

    components: PrincipalComponents | None

    def pca(
        self,
        image: Any,
        dims: Sequence[int] | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> Reconstructions:
        """An image's embedding rebuilt from its first k principal components for each k of `dims`, and decoded, all
        from the same noise (unCLIP §4, Figure 7).

        By default k is the paper's 20, 30, 40, 80, 120, 160, 200, 320, and the number of components there are in place
        of those beyond it. Raises UnclipError: the model holds no PCA. UsageError: more dimensions than there are.
        """
        chosen = self._options(options)
        components = self._components()
        if dims is None:
            own = tuple(sorted({min(number, components.count) for number in PAPER_DIMS}))
        else:
            own = tuple(int(number) for number in dims)
        components.check_dims(list(own))
        self.timings = Timings()
        whole = self._embedded(image)
        rebuilt = torch.cat([components.reconstruct(whole, number) for number in own])
        errors = (whole - rebuilt).norm(dim=1) / whole.norm()
        cosines = torch.nn.functional.cosine_similarity(whole, rebuilt)
        if self.unit_length and bool((rebuilt.norm(dim=1) == 0).any()):
            raise UsageError("the embedding rebuilt has no length; take more dimensions")
        taken = torch.nn.functional.normalize(rebuilt, dim=1) if self.unit_length else rebuilt
        seeds = check_seeds(seed, len(own))
        images = self._finish(self._render(taken, None, seeds, chosen, progress), "pil")
        return Reconstructions(own, rebuilt, tuple(errors.tolist()), tuple(cosines.tolist()), images)

    def zero_shot(self, images: Any, labels: Sequence[str], *, template: str = "{}") -> Tensor:
        """CLIP's probabilities (B, L) of labels: softmax of the cosines times CLIP's learned scale (Radford et al.
        2021, §3.1.2). `template` makes a caption of a label, such as "a photo of a {}".
        Raises UsageError: fewer than two labels, two alike, a template without {}.
        """
        names = check_prompts(labels, "label")
        if len(names) < 2:
            raise UsageError(f"1 label ({names[0]!r}) leaves CLIP no choice; name at least two")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"the label {twice!r} is given twice; name each once")
        if "{}" not in template:
            raise UsageError(f"the template {template!r} has no {{}} for the label; write 'a photo of a {{}}'")
        captions = [template.replace("{}", name) for name in names]
        cosines = self.embed_image(images, unit_length=True) @ self.embed_text(captions).embedding.T
        return (cosines * self.clip.logit_scale).softmax(dim=1)

    def typographic(
        self,
        image: Any,
        texts: str | Sequence[str],
        *,
        labels: Sequence[str] | None = None,
        template: str = "{}",
        num_images: int = 3,
        seed: int = 0,
        width: float = 0.7,
        height: float = 0.5,
        font: Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Attack]:
        """Typographic attacks (unCLIP §4, Figure 6): the picture as it is, then with each text on a label stuck onto
        it; for each what CLIP takes it for among `labels`, and `num_images` variations.

        `labels` are by default the texts and the prompts that the model says it knows. `width`, `height` and `font` are
        the label's, see unclip.data.lettering.stick_label. Raises UsageError: no labels, or as `zero_shot` does.
        """
        from unclip.data.lettering import stick_label

        check_count(num_images)
        chosen = self._options(options)
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        words = check_prompts(texts, "text")
        names = list(dict.fromkeys([*words, *self.manifest.get("example_prompts", [])])) if labels is None else labels
        picture = _one_picture(image)
        attacked = [stick_label(picture, text, width=width, height=height, font=font) for text in words]
        self.timings = Timings()
        found = []
        for text, one in zip([None, *words], [picture, *attacked], strict=True):
            shares = self._timed("clip", partial(self.zero_shot, one, names, template=template))[0].tolist()
            ranked = dict(sorted(zip(names, shares, strict=True), key=lambda pair: -pair[1]))
            embedding = self._embedded(one).expand(num_images, -1)
            drawn = self._finish(self._render(embedding, None, seeds, chosen, progress), "pil")
            found.append(Attack(text, one, ranked, drawn))
        return found

    def compare_conditioning(
        self,
        prompt: str,
        *,
        num_images: int = 4,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> dict[str, list[Image]]:
        """Pictures of one prompt from the same noise by three ways to condition the decoder (unCLIP §5.1, Figure 8):
        "caption" (no image embedding), "text embedding" (caption, and CLIP's text embedding as if it were an image's),
        "prior" (caption, and the prior's image embedding). Raises UnclipError: the model has no prior.
        """
        check_count(num_images)
        chosen = self._options(options)
        (text,) = check_prompts(prompt)
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        self.timings = Timings()
        texts = [text] * num_images
        features = self._timed("clip", lambda: self.embed_text(texts))
        drawn = {way: self._conditioned(texts, features, way, seeds, chosen, progress) for way in CONDITIONINGS}
        return {way: self._finish(images, "pil") for way, images in drawn.items()}

    def draw_conditioned(
        self,
        prompts: str | Sequence[str],
        conditioning: Conditioning = "prior",
        *,
        seed: int | Sequence[int] = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of prompts by one of the ways of `compare_conditioning`; with "prior" those
        of `sample`. A single seed serves all prompts. Raises UsageError: an unknown way; UnclipError: the model has no
        prior.
        """
        if conditioning not in CONDITIONINGS:
            raise UsageError(f"unknown conditioning {conditioning!r}; possible: {', '.join(CONDITIONINGS)}")
        chosen = self._options(options)
        texts = check_prompts(prompts)
        seeds = check_seeds(seed, len(texts))
        self.timings = Timings()
        features = self._timed("clip", lambda: self.embed_text(texts))
        return self._conditioned(texts, features, conditioning, seeds, chosen, progress)

    def _conditioned(
        self,
        texts: list[str],
        features: TextFeatures,
        conditioning: Conditioning,
        seeds: list[int],
        options: SampleOptions,
        progress: Progress | None,
    ) -> Tensor:
        from decoder.text import text_embedding

        caption = self._caption(texts, features)
        embedding: Tensor | None = None
        if conditioning == "text embedding":
            embedding = text_embedding(features, self.decoder.config)
        elif conditioning == "prior":
            embedding = self._prior(features, seeds, options, progress)
        return self._render(embedding, caption, seeds, options, progress)

    def guidance_sheet(
        self,
        prompt: str,
        scales: Sequence[float] = (1, 2, 3, 4),
        *,
        prior_scales: Sequence[float] | None = None,
        num_images: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[list[list[Image]]]:
        """Pictures of one prompt, from the same noise, by guidance scale (unCLIP §5.2, Figure 9): first by the prior's
        scale (one entry for the model's own where `prior_scales` is None), then by the decoder's, then `num_images`
        of each. Raises UsageError: no scales, a negative one.
        """
        check_count(num_images)
        (text,) = check_prompts(prompt)
        for name, values in (("scales", scales), ("prior_scales", prior_scales)):
            if values is not None and not len(values):
                raise UsageError(f"{name} is empty; expected guidance scales such as 1 2 3 4")
        for name in ("guidance", "prior_guidance"):
            if name in options and (name == "guidance" or prior_scales is not None):
                raise UsageError(f"{name} is what the sheet varies; leave it out, and name the scales")
        whole: list[list[list[Image]]] = []
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        pairs: list[dict[str, Any]] = [{}] if prior_scales is None else [{"prior_guidance": s} for s in prior_scales]
        rows = [[self._options({**options, **pair, "guidance": scale}) for scale in scales] for pair in pairs]
        self.timings = Timings()
        features = self._timed("clip", lambda: self.embed_text([text] * num_images))
        caption = self._caption([text] * num_images, features)
        for row in rows:
            embedding = self._prior(features, seeds, row[0], progress)
            drawn = [self._render(embedding, caption, seeds, chosen, progress) for chosen in row]
            whole.append([self._finish(images, "pil") for images in drawn])
        return whole

    def _embedded(self, image: Any) -> Tensor:
        """The embedding (1, E) of one image, of the length that the decoder takes."""
        pixels = image_pixels(image, self.clip.image_size, self.device)
        if len(pixels) != 1:
            raise UsageError(f"one image is taken, got {len(pixels)}")
        return self._timed("clip", lambda: self.embed_image(pixels))  # type: ignore[no-any-return]

    def _components(self) -> PrincipalComponents:
        if self.components is None:
            raise UnclipError(
                "this model holds no PCA of its image embeddings; measure one with "
                "`unclip fit-pca --model MODEL --data SOURCE`"
            )
        return self.components


def _one_picture(image: Any) -> Image:
    """A PIL image, a path, or a tensor (3, H, W) or (1, 3, H, W) in [-1, 1] as an RGB picture."""
    from unclip.data.images import checked_pixels, picture_of, to_pil

    if not isinstance(image, Tensor):
        return picture_of(image)
    if tuple(image.shape[:-2]) not in ((3,), (1, 3)):
        raise UsageError(f"an image tensor of shape {tuple(image.shape)}; expected (3, H, W) in [-1, 1]")
    return to_pil(checked_pixels(image).reshape(image.shape[-3:]))
