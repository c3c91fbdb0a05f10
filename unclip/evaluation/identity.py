"""Which picture of a data set is a drawn one nearest to? In the CLIP's features, and in pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.data.images import to_float
from unclip.errors import UnclipError, UsageError, nearest
from unclip.evaluation.dataset import EvaluationData
from unclip.evaluation.suites import RIGHT, Prompt

if TYPE_CHECKING:
    from unclip.clip import FrozenCLIP
    from unclip.evaluation.suites import Suite

EDGE = 32
_BATCH = 64


class Gallery:
    """All pictures of a data set as unit CLIP embeddings (N, E) and as pixels of 32×32 (N, 3·32·32), and the captions
    by which one is asked for. A check of prompts: whether the nearest is the one meant.

    Raises UnclipError: no picture can be read. Pictures that look alike under several captions are one each; a caption
    that several have means any of them.
    """

    aspects = (RIGHT, "by CLIP", "by pixels")

    def __init__(self, data: EvaluationData, clip: FrozenCLIP) -> None:
        self.clip = clip
        self._by_caption: dict[str, set[int]] = {}
        features, small, count = [], [], 0
        for _, piece in data.pieces():
            kept, pictures = data.pixels(piece, max(EDGE, clip.image_size))
            if not kept:
                continue
            images = to_float(pictures)
            features.append(clip.encode_image(images.to(clip.device)).cpu())
            small.append(_small(images))
            for number, sample in enumerate(kept, count):
                for caption in sample.row.captions:
                    self._by_caption.setdefault(_plain(caption), set()).add(number)
            count += len(kept)
        if not count:
            raise UnclipError(f"{data.config.source} has no picture that can be read: {data.tally.report()}")
        self.features, self.small = torch.cat(features), torch.cat(small)

    def __len__(self) -> int:
        return len(self.features)

    def find(self, caption: str) -> set[int]:
        """The pictures with this caption. UsageError: there are none."""
        found = self._by_caption.get(_plain(caption))
        if found is None:
            raise UsageError(
                f"no picture of the data has the caption {caption!r}; {nearest(_plain(caption), self._by_caption)}"
            )
        return found

    def expect(self, suite: Suite) -> None:
        """See that every prompt's target is there, before anything is drawn."""
        for category in suite.categories.values():
            for one in category.prompts:
                self.find(one.target or one.prompt)

    def nearest(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) in [-1, 1] -> (B,) indices of the largest cosine, and of the least squared error."""
        by_clip = [
            (self.clip.encode_image(part.to(self.clip.device)).cpu() @ self.features.T).argmax(1)
            for part in pictures.split(_BATCH)
        ]
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cat(by_clip), torch.cdist(_small(pictures.cpu()), self.small, compute_mode=exact).argmin(1)

    def __call__(self, asked: Prompt, pictures: Tensor) -> list[dict[str, bool]]:
        meant = self.find(asked.target or asked.prompt)
        verdicts = []
        for clip, pixels in zip(*(found.tolist() for found in self.nearest(pictures)), strict=True):
            ok = clip in meant, pixels in meant
            verdicts.append(dict(zip(self.aspects, (all(ok), *ok), strict=True)))
        return verdicts


def _small(images: Tensor) -> Tensor:
    return F.interpolate(images.float(), (EDGE, EDGE), mode="area").flatten(1)


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())
