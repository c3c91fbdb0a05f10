"""Pictures from weighted mixtures of images and prompts: arithmetic on CLIP image embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from unclip.errors import UsageError
from unclip.inputs import check_count, check_output, check_prompts, check_seeds
from unclip.mixtures import weighted_mean
from unclip.parts import image_pixels
from unclip.stages import Stages
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from PIL.Image import Image


class Mixing(Stages):
    """The method `mix`."""

    @overload
    def mix(
        self,
        images: Sequence[tuple[Any, float]] = ...,
        prompts: Sequence[tuple[str, float]] = ...,
        *,
        output: Literal["pil"] = ...,
        **options: Any,
    ) -> list[Image]: ...
    @overload
    def mix(
        self,
        images: Sequence[tuple[Any, float]] = ...,
        prompts: Sequence[tuple[str, float]] = ...,
        *,
        output: Literal["tensor"],
        **options: Any,
    ) -> Tensor: ...
    def mix(
        self,
        images: Sequence[tuple[Any, float]] = (),
        prompts: Sequence[tuple[str, float]] = (),
        *,
        mean: str = "linear",
        text_embedding: bool = False,
        num_images: int = 1,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """Pictures of a weighted mean of image embeddings: those of `images`, and those that the prior makes of
        `prompts`, each with its weight (unclip.mixtures.weighted_mean).

        Each image is a PIL image, a path or a tensor (3, H, W) in [-1, 1]. Picture i is drawn with seed + i, prior and
        decoder alike. `mean` is "linear" or "spherical"; with `text_embedding` the prompts' own CLIP text embeddings
        take the place of the prior's. A single image of weight 1 gives what `variations` gives, to the bit. Raises
        UsageError: nothing to mix, weights that are all 0 or not finite, embeddings that cancel each other.
        """
        check_output(output)
        check_count(num_images)
        chosen = self._options(options)
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        weights = [float(weight) for _, weight in (*images, *prompts)]
        if not weights:
            raise UsageError("nothing to mix; name at least one image or prompt")
        texts = check_prompts([text for text, _ in prompts]) if prompts else []
        self.timings = Timings()
        pixels = [image_pixels(image, self.clip.image_size, self.device) for image, _ in images]
        fixed = [self._timed("clip", partial(self.embed_image, one)) for one in pixels]
        for one in fixed:
            if len(one) != 1:
                raise UsageError(f"each image of a mixture is a single one, got {len(one)}")
        drawn = self._of_prompts(texts, seeds, chosen, progress, text_embedding)
        rows = [torch.cat([*fixed, *(of[i : i + 1] for of in drawn)]) for i in range(num_images)]
        embedding = torch.stack([weighted_mean(row, weights, mean) for row in rows])
        return self._finish(self._render(embedding, None, seeds, chosen, progress), output)

    def _of_prompts(
        self, texts: list[str], seeds: list[int], options: Any, progress: Progress | None, raw: bool
    ) -> list[Tensor]:
        """For each prompt its embeddings (B, E), one a seed."""
        from decoder.text import text_embedding

        found = []
        for text in texts:
            features = self._timed("clip", partial(self.embed_text, [text] * len(seeds)))
            if raw:
                found.append(text_embedding(features, self.decoder.config))
            else:
                found.append(self._prior(features, seeds, options, progress))
        return found
