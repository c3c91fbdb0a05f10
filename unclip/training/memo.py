"""CLIP features kept in memory, for data sets small enough that every picture and caption comes back soon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.clip import FrozenCLIP, TextFeatures
from unclip.clip_identity import identify, same_clip
from unclip.config import DataConfig
from unclip.data.embeddings import EmbeddingInfo, describe_embeddings, read_null
from unclip.errors import UnclipError, UsageError


class TextEncoder(Protocol):
    """Captions -> what a stage takes of them."""

    def encode_text(self, captions: Sequence[str]) -> TextFeatures: ...


class EmbeddingMemo:
    """`encode_text` and `encode_image` of a FrozenCLIP, remembering up to `size` answers of each kind; `image_of` and
    `text_of` of a batch, whose stored features come before the CLIP's.

    They are kept in the computer's memory, not a GPU's. Keyed by the caption and by the picture's bytes, so that it is
    right for augmented pictures too (and useless for them). Image embeddings have unit length, or the CLIP's own.
    `texts` encodes captions in the CLIP's place.
    `stored` describes the data where they are embeddings; what they hold is then never asked of the CLIP, and `clip`
    may be None where they hold all. `identity` tells which CLIP it is (unclip.clip_identity).
    """

    def __init__(
        self,
        clip: FrozenCLIP | None,
        size: int,
        *,
        unit_length: bool = True,
        texts: TextEncoder | None = None,
        stored: EmbeddingInfo | None = None,
        device: torch.device | str | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._clip, self.size, self.unit_length, self.stored = clip, size, unit_length, stored
        self._own_texts, self.identity = texts, identity
        self.device = torch.device(device) if device is not None else self.clip.device
        self._images: dict[bytes, Tensor] = {}
        self._texts: dict[str, TextFeatures] = {}

    @property
    def clip(self) -> FrozenCLIP:
        if self._clip is None:
            raise UnclipError("this run reads stored embeddings and loads no CLIP, but what is asked now needs one")
        return self._clip

    @property
    def texts(self) -> TextEncoder:
        return self._own_texts or self.clip

    def encode_with(self, build: Callable[[FrozenCLIP], TextEncoder], name: str) -> None:
        """Let `build(clip)` encode captions, also where features are stored; `name` is the CLIP to load for it."""
        if self._clip is None:
            self._clip = _for_data(name, self.device)
        self._own_texts = build(self._clip)

    @property
    def widths(self) -> dict[str, int]:
        """`embedding_dim`, `token_dim`, `text_length` and `vocab_size`, as far as the CLIP or the embeddings tell."""
        if self._clip is not None:
            clip = self._clip
            told: tuple[int | None, ...] = (
                clip.embedding_dim, clip.token_dim, clip.context_length, clip.vocab_size,
            )  # fmt: skip
        else:
            assert self.stored is not None
            found = self.stored
            told = (found.embedding_dim, found.token_dim, found.text_length, found.vocab_size)
        names = ("embedding_dim", "token_dim", "text_length", "vocab_size")
        return {name: width for name, width in zip(names, told, strict=True) if width is not None}

    def image_of(self, batch: Mapping[str, Any]) -> Tensor:
        """The image embeddings (B, E) of a batch, stored or the CLIP's."""
        if "image_embedding" not in batch:
            return self.encode_image(batch["image"].to(self.device))
        embedding: Tensor = batch["image_embedding"].to(self.device).float()
        return F.normalize(embedding, dim=-1) if self.unit_length else embedding

    def text_of(self, batch: Mapping[str, Any]) -> TextFeatures:
        """The text features of a batch, stored or encoded."""
        if self._own_texts is not None or not self._reads_text(batch):
            return self.encode_text(batch["caption"])
        embedding = batch["text_embedding"].to(self.device).float()
        if "tokens" in batch:
            tokens, mask = batch["tokens"].to(self.device).float(), batch["mask"].to(self.device)
        else:  # a stage that reads the text's embedding alone
            tokens = torch.zeros(len(embedding), 1, 1, device=self.device)
            mask = torch.zeros(len(embedding), 1, dtype=torch.bool, device=self.device)
        norm = None if self.stored is not None and not self.stored.raw_length else embedding.norm(dim=-1)
        return TextFeatures(tokens, mask, F.normalize(embedding, dim=-1), norm)

    def _reads_text(self, batch: Mapping[str, Any]) -> bool:
        return "tokens" in batch or (self._clip is None and "text_embedding" in batch)

    def null_text(self) -> TextFeatures:
        """The features of the empty caption, a batch of one."""
        if self._clip is not None:
            return self._clip.encode_text([""])
        if self.stored is None or self.stored.token_dim is None:
            return self.clip.encode_text([""])
        arrays = read_null(self.stored.folder)
        null = {name: torch.from_numpy(value)[None].to(self.device) for name, value in arrays.items()}
        embedding = null["embedding"]
        return TextFeatures(null["tokens"], null["mask"], F.normalize(embedding, dim=-1), embedding.norm(dim=-1))

    def encode_image(self, images: Tensor) -> Tensor:
        if not self.size:
            return self.clip.encode_image(images, unit_length=self.unit_length)
        keys = [image.cpu().numpy().tobytes() for image in images]

        def compute(new: list[int]) -> list[Tensor]:
            return list(self.clip.encode_image(images[new], unit_length=self.unit_length).cpu())

        return torch.stack(self._recall(self._images, keys, compute)).to(self.device)

    def encode_text(self, captions: Sequence[str]) -> TextFeatures:
        if not self.size:
            return self.texts.encode_text(captions)

        def compute(new: list[int]) -> list[TextFeatures]:
            features = self.texts.encode_text([captions[i] for i in new]).to("cpu")
            return [features[i] for i in range(len(features))]

        rows = self._recall(self._texts, list(captions), compute)
        norms = [row.norm for row in rows if row.norm is not None]
        return TextFeatures(
            torch.stack([row.tokens for row in rows]),
            torch.stack([row.mask for row in rows]),
            torch.stack([row.embedding for row in rows]),
            torch.stack(norms) if len(norms) == len(rows) else None,
        ).to(self.device)

    def first(
        self, batches: Iterable[Mapping[str, Any]], samples: int
    ) -> Iterator[tuple[dict[str, Any], Tensor, TextFeatures]]:
        """The first `samples` of `batches` (or all there are), batch by batch, with their image embeddings and their
        captions' features.
        """
        left = samples
        for batch in islice(batches, samples):
            if left <= 0:
                return
            part = {name: value[:left] for name, value in batch.items()}
            left -= len(part["caption"])
            yield part, self.image_of(part), self.text_of(part)

    def _recall(self, memory: dict[Any, Any], keys: list[Any], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        new = {key: index for key, index in first.items() if key not in memory}
        answers = dict(zip(new, compute(list(new.values())), strict=True)) if new else {}
        result = [memory[key] if key in memory else answers[key] for key in keys]
        if len(memory) + len(answers) > self.size:
            memory.clear()
        memory.update(answers)
        return result


def open_memo(
    data: DataConfig,
    clip: str,
    device: torch.device,
    size: int = 0,
    *,
    unit_length: bool = True,
    reads_tokens: bool = True,
    reads_images: bool = False,
) -> EmbeddingMemo:
    """The CLIP's side of a run: its memo, or that of the embeddings that `data` names, for which the CLIP is loaded
    only where they lack the token features that the stage reads. `reads_images`: the stage needs the pictures as well.

    Raises UnclipError: no such CLIP, or the embeddings are another's; UsageError: they lack what the stage needs.
    """
    stored, identity = describe_embeddings(data), identify(clip)
    if stored is None:
        asked = _for_data(clip, device)
        return EmbeddingMemo(asked, size, unit_length=unit_length, device=device, identity=identity)
    if stored.clip is not None and (difference := same_clip(stored.clip, identity)):
        raise UnclipError(
            f"the embeddings in {stored.folder} are not of the CLIP {clip!r}: {difference}; embed the data with it "
            "(`unclip embed --dataset`), or name the CLIP that they are of"
        )
    if not stored.raw_length and not unit_length:
        raise UsageError(
            f"the embeddings in {stored.folder} have unit length, and model.embedding_length is raw; embed the images "
            "themselves with `unclip embed --dataset`"
        )
    if reads_images and stored.pixels is None:
        raise UsageError(
            f"{stored.folder} holds no pictures, which a decoder learns to draw; embed the data again with "
            f"--pixels {data.image_size}"
        )
    loaded, identity = None, stored.clip or identity
    if (reads_tokens and stored.token_dim is None) or not stored.has_text:
        loaded = _for_data(clip, device)
        if loaded.embedding_dim != stored.embedding_dim:
            raise UnclipError(
                f"the embeddings in {stored.folder} are {stored.embedding_dim} wide, those of the CLIP {clip!r} are "
                f"{loaded.embedding_dim} wide; name the CLIP that they are of"
            )
    return EmbeddingMemo(loaded, size, unit_length=unit_length, stored=stored, device=device, identity=identity)


def _for_data(name: str, device: torch.device | str | None) -> FrozenCLIP:
    clip = FrozenCLIP.load(name, device=device or "cpu")
    clip.cuts.first_only = True
    return clip
