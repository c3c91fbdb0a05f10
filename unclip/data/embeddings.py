"""A folder of CLIP features, as `unclip embed --dataset` writes it: read without the CLIP, memory-mapped.

    embeddings.json        which CLIP, widths, and the shards with their counts
    null.npz               features of the empty caption
    00000-000/             a shard of N samples with M captions
      image_embedding.npy  (N, E) float32, of the CLIP's own length
      text_embedding.npy   (M, E) float32, of the CLIP's own length
      tokens.npy           (T, D) float16, the features of the captions' real tokens one after another
      mask.npy             (M, L) bool, which positions of the context those are
      images.npy           (N, 3, S, S) uint8, where pictures were kept
      rows.parquet         key, captions (a list), score
      shard.json           counts, and whether it is the last of its part of the data
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.config import DataConfig
from unclip.data.images import to_pixels
from unclip.data.rows import Row, reason_of
from unclip.errors import UnclipError, UsageError

MANIFEST = "embeddings.json"
FORMAT = 1
_OPEN_SHARDS = 256


@dataclass(frozen=True)
class EmbeddingInfo:
    """What a folder of embeddings says of itself. Without tokens `token_dim` and `text_length` are None."""

    folder: Path
    embedding_dim: int
    token_dim: int | None = None
    text_length: int | None = None
    vocab_size: int | None = None
    clip: dict[str, Any] | None = None  # unclip.clip.identify
    has_text: bool = True  # whether the captions' embeddings are there too
    raw_length: bool = True  # whether embeddings have the CLIP's own length
    pixels: int | None = None


def holds_embeddings(source: str) -> bool:
    """Whether `data.source` names a folder of embeddings, of either layout."""
    folder = Path(source).expanduser()
    return (folder / MANIFEST).is_file() or _is_clip_retrieval(folder)


def _is_clip_retrieval(folder: Path) -> bool:
    return (folder / "img_emb").is_dir() and (folder / "metadata").is_dir()


def find_embeddings(config: DataConfig) -> Any | None:
    """The rows of a folder of embeddings; None where the source is something else. UnclipError: damaged."""
    folder = Path(config.source).expanduser()
    if (folder / MANIFEST).is_file():
        return EmbeddingRows(folder, config)
    if _is_clip_retrieval(folder):
        from unclip.data.clip_retrieval import ClipRetrievalRows

        return ClipRetrievalRows(folder, config)
    return None


def describe_embeddings(config: DataConfig) -> EmbeddingInfo | None:
    """What the source, or all sources of a mixture, say of their CLIP; None where they are images.

    Raises UnclipError: damaged, or two folders of a mixture are of different CLIPs.
    """
    found: list[EmbeddingInfo] = []
    for one, _ in config.each():
        if not holds_embeddings(one.source):
            return None
        found.append(find_embeddings(one).info)  # type: ignore[union-attr]
    first = found[0]
    for other in found[1:]:
        widths = (other.embedding_dim, other.token_dim, other.text_length)
        if widths != (first.embedding_dim, first.token_dim, first.text_length) or other.clip != first.clip:
            raise UnclipError(f"{first.folder} and {other.folder} hold embeddings of different CLIPs; mix those of one")
    return first


def read_manifest(folder: Path) -> dict[str, Any]:
    """The parsed embeddings.json. UnclipError: unreadable, another format."""
    try:
        body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnclipError(f"{folder / MANIFEST} cannot be read as JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else None
        raise UnclipError(f"{folder / MANIFEST} has format {found!r}, this version reads format {FORMAT}")
    return body


def read_null(folder: Path) -> dict[str, np.ndarray]:
    """`tokens` (L, D) float32, `mask` (L,) and `embedding` (E,), of the CLIP's own length, of the empty caption."""
    try:
        with np.load(folder / "null.npz", allow_pickle=False) as file:
            return {name: file[name] for name in ("tokens", "mask", "embedding")}
    except (OSError, ValueError, KeyError) as error:
        raise UnclipError(f"{folder / 'null.npz'} cannot be read: {error}") from error


class EmbeddingRows:
    """The samples of a folder that `unclip embed --dataset` has finished.

    Raises UnclipError: not finished, a shard is missing or does not have the counts and widths of the manifest.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        body = read_manifest(folder)
        if not body.get("complete"):
            raise UnclipError(f"{folder} is not finished; run the `unclip embed` that began it again, it goes on")
        self._folder, self._shards = folder, body["shards"]
        self.lengths: list[int] = [shard["rows"] for shard in self._shards]
        if not sum(self.lengths):
            raise UnclipError(f"the embeddings in {folder} are empty: they have no samples")
        names = ("embedding_dim", "token_dim", "text_length", "vocab_size", "clip", "pixels", "raw_length")
        self.info = EmbeddingInfo(folder, **{name: body[name] for name in names})
        self._ends = np.cumsum([0, *self.lengths])
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        for shard in self._shards:
            if not (folder / shard["name"]).is_dir():
                raise UnclipError(f"{folder} is incomplete: its shard {shard['name']} is missing")
        check_pixels(self.info, config)
        self._table = open_table([folder / shard["name"] / "rows.parquet" for shard in self._shards], folder)
        if len(self._table) != sum(self.lengths):
            raise UnclipError(f"{folder} names {sum(self.lengths)} samples, its rows.parquet hold {len(self._table)}")
        self._shard(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: list[int]) -> list[Row]:
        if not indices:
            return []
        table = self._table[indices]
        result = []
        for number, index in enumerate(indices):
            place, inside = place_of(self._ends, index)
            shard = self._shard(place)
            key = table["key"][number]
            finite = bool(np.isfinite(shard.image[inside]).all())
            result.append(
                Row(
                    key,
                    tuple(table["captions"][number]),
                    None if shard.images is None else partial(shard.pixels, inside),
                    encoded=False,
                    key=key,
                    score=table["score"][number],
                    error=None if finite else f"{key}: its embedding is not finite",
                    features=partial(shard.features, inside),
                )
            )
        return result

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            self._open[number] = _Shard(self._folder / self._shards[number]["name"], self._shards[number], self.info)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


class _Shard:
    """The arrays of one shard, memory-mapped."""

    def __init__(self, folder: Path, counts: dict[str, Any], info: EmbeddingInfo) -> None:
        rows, captions = counts["rows"], counts["captions"]
        width, size = info.embedding_dim, info.pixels
        self.image = open_array(folder / "image_embedding.npy", (rows, width))
        self.text = open_array(folder / "text_embedding.npy", (captions, width))
        self.mask = open_array(folder / "mask.npy", (captions, info.text_length))
        lengths = self.mask.sum(1, dtype=np.int64)
        self._token_ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self.tokens = open_array(folder / "tokens.npy", (int(self._token_ends[-1]), info.token_dim))
        self._caption_ends = open_array(folder / "caption_ends.npy", (rows + 1,))
        self.images = None if size is None else open_array(folder / "images.npy", (rows, 3, size, size))

    def features(self, row: int, caption: int) -> dict[str, np.ndarray]:
        number = int(self._caption_ends[row]) + caption
        mask = np.array(self.mask[number])
        tokens = np.zeros((len(mask), self.tokens.shape[1]), self.tokens.dtype)
        tokens[mask] = self.tokens[self._token_ends[number] : self._token_ends[number + 1]]
        return {
            "image_embedding": np.array(self.image[row], np.float32),
            "text_embedding": np.array(self.text[number], np.float32),
            "tokens": tokens,
            "mask": mask,
        }

    def pixels(self, row: int, size: int) -> Tensor:
        assert self.images is not None
        picture = np.array(self.images[row])
        if picture.shape[-1] == size:
            return torch.from_numpy(picture)
        from PIL import Image

        return to_pixels(Image.fromarray(picture.transpose(1, 2, 0)), size)


def open_array(file: Path, shape: Sequence[int | None]) -> np.ndarray:
    """A .npy file, memory-mapped, of this shape (None: any). UnclipError: missing, damaged, another shape."""
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if file.exists() and 0 in shape:  # an array without elements cannot be mapped
            return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]
        raise UnclipError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise UnclipError(f"{file} cannot be read: {error.strerror or error}") from error
    wanted = tuple(have if want is None else want for want, have in zip(shape, array.shape, strict=False))
    if array.shape != wanted or len(array.shape) != len(shape):
        expected = tuple("any" if want is None else want for want in shape)
        raise UnclipError(f"{file} has the shape {array.shape}, expected {expected}; it is damaged or of another set")
    return array


def open_table(files: list[Path], folder: Path) -> Any:
    """The rows of parquet files through `datasets`, which memory-maps them. UnclipError: unreadable."""
    import glob

    import datasets

    try:
        paths = [glob.escape(str(file.resolve())) for file in files]
        return datasets.load_dataset("parquet", data_files={"train": paths}, split="train")
    except Exception as error:  # the reader of a format may raise anything
        reason = reason_of(error)
        raise UnclipError(f"the captions beside the embeddings in {folder} cannot be read: {reason}") from error


def check_pixels(info: EmbeddingInfo, config: DataConfig) -> None:
    """UsageError: the pictures are smaller than what the run asks for, or limits are set that are checked no more."""
    if info.pixels is not None and info.pixels < config.image_size:
        raise UsageError(
            f"{info.folder} keeps pictures of {info.pixels} px and data.image_size asks for {config.image_size}; "
            f"embed them again with --pixels {config.image_size}, or set data.image_size={info.pixels}, which must be "
            "the size of a decoder or an upsampler as well"
        )
    if config.changes:
        raise UsageError(
            f"data.{config.changes[0]} changes the picture, and {info.folder} holds the embedding of the unchanged "
            "one; leave it out, or train from the images"
        )
    limits = config.filter
    if limits.min_edge is not None or limits.max_aspect is not None:
        raise UsageError(
            f"{info.folder} holds embeddings, whose pictures' sizes are not known any more; filter when embedding: "
            "unclip embed --dataset … --set filter.min_edge=…"
        )


def place_of(ends: np.ndarray, index: int) -> tuple[int, int]:
    """The shard that holds a row, and the row's number in it; `ends` is 0 and where each shard ends."""
    shard = int(np.searchsorted(ends, index, side="right")) - 1
    return shard, index - int(ends[shard])
