"""CLIP features kept in memory, for data sets small enough that every picture and caption comes back soon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from unclip.clip import FrozenCLIP, TextFeatures


class TextEncoder(Protocol):
    """Captions -> what a stage takes of them."""

    def encode_text(self, captions: Sequence[str]) -> TextFeatures: ...


class EmbeddingMemo:
    """`encode_text` and `encode_image` of a FrozenCLIP, remembering up to `size` answers of each kind.

    Keyed by the caption and by the picture's bytes, so that it is right for augmented pictures too (and useless for
    them). Image embeddings have unit length, or the CLIP's own. `texts` encodes captions in the CLIP's place.
    """

    def __init__(
        self, clip: FrozenCLIP, size: int, *, unit_length: bool = True, texts: TextEncoder | None = None
    ) -> None:
        self.clip, self.size, self.unit_length = clip, size, unit_length
        self.texts: TextEncoder = texts or clip
        self._images: dict[bytes, Tensor] = {}
        self._texts: dict[str, TextFeatures] = {}

    def encode_image(self, images: Tensor) -> Tensor:
        if not self.size:
            return self.clip.encode_image(images, unit_length=self.unit_length)
        keys = [image.cpu().numpy().tobytes() for image in images]

        def compute(new: list[int]) -> list[Tensor]:
            return list(self.clip.encode_image(images[new], unit_length=self.unit_length))

        return torch.stack(self._recall(self._images, keys, compute))

    def encode_text(self, captions: Sequence[str]) -> TextFeatures:
        if not self.size:
            return self.texts.encode_text(captions)

        def compute(new: list[int]) -> list[TextFeatures]:
            features = self.texts.encode_text([captions[i] for i in new])
            return [features[i] for i in range(len(features))]

        rows = self._recall(self._texts, list(captions), compute)
        norms = [row.norm for row in rows if row.norm is not None]
        return TextFeatures(
            torch.stack([row.tokens for row in rows]),
            torch.stack([row.mask for row in rows]),
            torch.stack([row.embedding for row in rows]),
            torch.stack(norms) if len(norms) == len(rows) else None,
        )

    def first(
        self, batches: Iterable[Mapping[str, Any]], samples: int
    ) -> Iterator[tuple[Tensor, Tensor, TextFeatures]]:
        """The first `samples` images of `batches` (or all there are), batch by batch, with their image embeddings and
        their captions' features.
        """
        left = samples
        for batch in islice(batches, samples):
            if left <= 0:
                return
            image, captions = batch["image"][:left], list(batch["caption"][:left])
            left -= len(image)
            yield image, self.encode_image(image.to(self.clip.device)), self.encode_text(captions)

    def _recall(self, memory: dict[Any, Any], keys: list[Any], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        new = {key: index for key, index in first.items() if key not in memory}
        answers = dict(zip(new, compute(list(new.values())), strict=True)) if new else {}
        result = [memory[key] if key in memory else answers[key] for key in keys]
        if len(memory) + len(answers) > self.size:
            memory.clear()
        memory.update(answers)
        return result
