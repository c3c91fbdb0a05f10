"""CLIP features kept in memory, for data sets small enough that every picture and caption comes back soon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.clip import FrozenCLIP, TextFeatures


class EmbeddingMemo:
    """`encode_text` and `encode_image` of a FrozenCLIP, remembering up to `size` answers of each kind.

    Keyed by the caption and by the picture's bytes, so that it is right for augmented pictures too (and useless for
    them).
    """

    def __init__(self, clip: FrozenCLIP, size: int) -> None:
        self.clip, self.size = clip, size
        self._images: dict[bytes, Tensor] = {}
        self._texts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def encode_image(self, images: Tensor) -> Tensor:
        if not self.size:
            return self.clip.encode_image(images)
        keys = [image.cpu().numpy().tobytes() for image in images]

        def compute(new: list[int]) -> list[Tensor]:
            return list(self.clip.encode_image(images[new]))

        return torch.stack(self._recall(self._images, keys, compute))

    def encode_text(self, captions: Sequence[str]) -> TextFeatures:
        if not self.size:
            return self.clip.encode_text(captions)

        def compute(new: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
            features = self.clip.encode_text([captions[i] for i in new])
            return list(zip(features.tokens, features.mask, features.embedding, strict=True))

        rows = self._recall(self._texts, list(captions), compute)
        tokens, mask, embedding = (torch.stack(part) for part in zip(*rows, strict=True))
        return TextFeatures(tokens, mask, embedding)

    def _recall(self, memory: dict[Any, Any], keys: list[Any], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        new = {key: index for key, index in first.items() if key not in memory}
        answers = dict(zip(new, compute(list(new.values())), strict=True)) if new else {}
        result = [memory[key] if key in memory else answers[key] for key in keys]
        if len(memory) + len(answers) > self.size:
            memory.clear()
        memory.update(answers)
        return result
