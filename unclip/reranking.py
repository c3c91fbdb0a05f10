"""Drawing many pictures and keeping those that CLIP finds closest to the prompt (DALL·E, Ramesh et al. 2021, §2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unclip.errors import UsageError
from unclip.inputs import SampleOptions, check_count, check_prompts, check_seeds
from unclip.stages import Stages, negative_prompts
from unclip.upscaling import Progress, Timings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Ranked:
    """A picture that was kept: its prompt, its place from 1, the cosine of its CLIP embedding and the prompt's, and the
    seed that draws it again.
    """

    image: Image
    prompt: str
    rank: int
    score: float
    seed: int


@dataclass(frozen=True)
class _Draft:
    """A picture at the size at which it was scored, (3, S, S) on the CPU."""

    pixels: Tensor
    score: float
    seed: int


class Reranking(Stages):
    """The methods `clip_scores` and `sample_best`."""

    def clip_scores(self, images: Any, prompts: str | Sequence[str]) -> Tensor:
        """Cosines (B,) of the CLIP embeddings of images, as `embed_image` takes them, and prompts, one each or one for
        all. Raises UsageError: another number of prompts.
        """
        several = check_prompts(prompts)
        pictures = self.embed_image(images, unit_length=True)
        if len(several) not in (1, len(pictures)):
            raise UsageError(f"{len(several)} prompts for {len(pictures)} images; expected one each, or one for all")
        return (pictures * self.embed_text(several).embedding).sum(1)

    def sample_best(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 32,
        keep: int = 4,
        seed: int = 0,
        batch_size: int = 8,
        negative_prompt: str | Sequence[str] | None = None,
        negative_embedding: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Ranked]:
        """Of `num_images` pictures of each prompt the `keep` best by the cosine of CLIP's image and text embedding,
        best first, in the order of the prompts.

        Picture i is drawn with seed + i, `batch_size` together, and of those drawn no more than `keep` are held.
        Pictures are scored at the model's smallest size that fills CLIP's input, and only those kept go on to a larger
        one: each equals what `sample` draws with its seed. Otherwise as `sample`.
        Raises UsageError: more to keep than are drawn, a batch of none, and as `sample` does.
        """
        check_count(num_images)
        if not 1 <= keep <= num_images:
            raise UsageError(f"keep is {keep}, expected 1 to the number of pictures drawn, {num_images}")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, expected 1 or more")
        chosen = self._options(options)
        several = check_prompts(prompts)
        seeds = check_seeds([seed + i for i in range(num_images)], num_images)
        away = negative_prompts(negative_prompt, len(several), 1)
        draft = replace(chosen, size=self.scoring_size(chosen.size))
        self.timings = Timings()
        kept: list[Ranked] = []
        for number, text in enumerate(several):
            best: list[_Draft] = []
            for start in range(0, num_images, batch_size):
                own = seeds[start : start + batch_size]
                negative = None if away is None else [away[number]] * len(own)
                images, wanted = self._draw([text] * len(own), own, draft, progress, negative, negative_embedding)
                scores = (self._timed("clip", partial(self.clip.encode_image, images)) * wanted).sum(1)
                fresh = zip(images.cpu().unbind(), scores.tolist(), own, strict=True)
                best += [_Draft(pixels.clone(), score, one) for pixels, score, one in fresh]
                best = sorted(best, key=lambda one: (-one.score, one.seed))[:keep]
            kept += self._ranked(best, text, chosen, batch_size, progress)
        return kept

    def scoring_size(self, size: int | None) -> int:
        """The model's smallest edge that fills CLIP's input, or the wanted one where none below it does."""
        wanted = self.check_size(size)
        return next((edge for edge in self.sizes if self.clip.image_size <= edge <= wanted), wanted)

    def _ranked(
        self, best: list[_Draft], text: str, options: SampleOptions, batch_size: int, progress: Progress | None
    ) -> list[Ranked]:
        """Drafts by falling score, brought to the wanted size."""
        kept = []
        for start in range(0, len(best), batch_size):
            some = best[start : start + batch_size]
            pixels = torch.stack([one.pixels for one in some]).to(self.device)
            caption = self._read_by_upsamplers(text, len(some))
            drawn = self._enlarge(pixels, [one.seed for one in some], options, progress, caption)
            images = self._finish(drawn, "pil")
            for rank, (one, image) in enumerate(zip(some, images, strict=True), start + 1):
                kept.append(Ranked(image, text, rank, one.score, one.seed))
        return kept
