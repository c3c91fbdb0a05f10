"""CLIP features of a whole data set, written once: `unclip embed --dataset`. unclip.data.embeddings reads them.

The work is cut into pieces that are the same however many processes share it: a piece is up to `rows` samples of one
shard of the source. Each is written under a temporary name and renamed when whole, so that a run that was killed goes
on with the next piece. Processes share nothing but the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.bundle import replacing, write_json
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.clip_identity import identify
from unclip.config import DataConfig
from unclip.data.embedding_folder import begin, complete, described, discard, skipped
from unclip.data.embeddings import FORMAT, find_embeddings
from unclip.data.fingerprint import fingerprint
from unclip.data.images import ImageError, Unwanted, to_float
from unclip.data.making import decode_row
from unclip.data.rows import CutRows, Reader, Row, Shards, is_sharded
from unclip.data.sources import open_source
from unclip.data.tally import Tally
from unclip.errors import UnclipError, UsageError

_THREADS = 8
_Decoded = tuple[Row, Tensor | None, Tensor | None]  # the row, the picture for the CLIP, the one to keep


@dataclass
class Progress:
    """What one process did: pieces it wrote, pieces that were there, and what was skipped."""

    written: int = 0
    found: int = 0
    rows: int = 0
    tally: Tally = field(default_factory=Tally)


def embed_dataset(
    config: DataConfig,
    clip_name: str,
    clip: FrozenCLIP,
    folder: Path,
    *,
    rows: int = 8192,
    batch_size: int = 64,
    image_size: int | None = None,
    pixels: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    told: Callable[[str], None] = lambda _: None,
) -> Progress:
    """Write the features of every sample of `config` that is selected, of all its captions, to `folder`. With
    `pixels` the pictures too, S×S, for a decoder. The CLIP sees them at `image_size`, its own by
    default. Of several processes each does its share of the shards; the last to end completes the manifest. Entered
    again, it goes on where it was killed.

    Raises UsageError: `config` asks for what cannot be stored; UnclipError: the folder holds something else, was begun
    with another CLIP, other settings or data that were changed since, or cannot be written; nothing in the data can be
    used, and then nothing is left behind.
    """
    _check(config)
    progress = Progress()
    source = _in_shards(config, rows, progress.tally if rank == 0 else Tally())
    stored = None if config.source == "synthetic" else find_embeddings(config)
    if stored is not None and stored.info.embedding_dim != clip.embedding_dim:
        raise UnclipError(
            f"the embeddings in {config.source} are {stored.info.embedding_dim} wide, those of the CLIP {clip_name!r} "
            f"are {clip.embedding_dim} wide; name the CLIP that they are of"
        )
    size = image_size or clip.image_size
    settings = {
        **_settings(config, clip_name, clip),
        "image_size": size,
        "pixels": pixels,
        "raw_length": stored is None or stored.info.raw_length,
        "rows_a_piece": rows,
        "source_shards": source.num_shards,
        "fingerprint": fingerprint(config, [folder]),
    }
    made = begin(folder, settings, config, lambda: _null(clip))
    writer = _Writer(config, clip, folder, batch_size, size, pixels, reuses=stored is not None)
    try:
        for shard in range(rank, source.num_shards, world_size):
            reader = _ShardReader(source, shard)
            for number in range(10**6):
                name = f"{shard:05d}-{number:05d}"
                piece = described(folder / name)
                if piece is None:
                    piece = writer.write(name, reader, number * rows, rows, progress.tally)
                    progress.written += 1
                    told(f"{folder / name}: {piece['rows']} samples")
                else:
                    progress.found += 1
                progress.rows += piece["rows"]
                if piece["last"]:
                    break
        if complete(folder, source.num_shards) == 0:
            why = progress.tally.report() or skipped(folder)
            discard(folder, made)
            raise UnclipError(f"no sample of the data set {config.source!r} can be used{f': {why}' if why else ''}")
    except OSError as error:
        raise UnclipError(f"cannot write to {folder}: {error.strerror or error}") from error
    return progress


def _check(config: DataConfig) -> None:
    """UsageError: a mixture, or what changes or goes beside the picture that is embedded."""
    if config.sources:
        raise UsageError("a mixture of several sources cannot be embedded; embed each one, and mix the folders")
    if config.changes:
        raise UsageError(
            f"data.{config.changes[0]} changes the picture in training, and what is embedded is the unchanged one; "
            "leave it out"
        )
    if config.low_column is not None:
        raise UsageError(f"data.low_column is {config.low_column!r}, and no such pictures are kept; leave it out")


def _in_shards(config: DataConfig, rows: int, tally: Tally) -> Shards:
    source = open_source(config, tally)
    if is_sharded(source):
        return source
    whole, rest = divmod(len(source), rows)
    return CutRows(source, [rows] * whole + ([rest] if rest else []))


def _settings(config: DataConfig, clip_name: str, clip: FrozenCLIP) -> dict[str, Any]:
    chosen = ("source", "split", "streaming", "image_column", "caption_column", "key_column", "holdout", "part")
    data = {name: value for name, value in config.model_dump(mode="json").items() if name in chosen}
    return {
        "format": FORMAT,
        "kind": "embeddings",
        "clip": identify(clip_name),
        "embedding_dim": clip.embedding_dim,
        "token_dim": clip.token_dim,
        "text_length": clip.context_length,
        "vocab_size": clip.vocab_size,
        "data": {**data, "filter": config.filter.model_dump(mode="json")},
    }


def _null(clip: FrozenCLIP) -> dict[str, np.ndarray]:
    """Features of the empty caption, as null.npz holds them."""
    null = clip.encode_text([""])
    assert null.norm is not None
    embedding = (null.embedding * null.norm[:, None])[0]
    return {
        "tokens": null.tokens[0].cpu().numpy(), "mask": null.mask[0].cpu().numpy(), "embedding": embedding.cpu().numpy()
    }  # fmt: skip


class _ShardReader:
    """Rows of a shard by number, read on where that is the next, and one ahead to see whether there are more."""

    def __init__(self, source: Shards, shard: int) -> None:
        self._source, self._shard = source, shard
        self._reader: Reader | None = None
        self._next, self._ahead = 0, list[Row]()

    def take(self, first: int, count: int) -> list[Row]:
        """Up to `count` rows from number `first` on."""
        if self._reader is None or first != self._next:
            state = {"row": first, "stream": None, "ended": False}
            self._reader, self._ahead = self._source.open(self._shard, state if first else None), []
        found = self._ahead + self._reader.read(count - len(self._ahead))
        self._next, self._ahead = first + len(found), []
        return found

    def ended(self) -> bool:
        """Whether there is none after the last row taken."""
        if self._reader is not None and not self._ahead:
            self._ahead = self._reader.read(1)
        return not self._ahead


class _Writer:
    """Rows → decoded → through the CLIP → a piece on disk."""

    def __init__(
        self,
        config: DataConfig,
        clip: FrozenCLIP,
        folder: Path,
        batch_size: int,
        size: int,
        pixels: int | None,
        reuses: bool,
    ) -> None:
        self.config, self.clip, self.folder = config, clip, folder
        clip.cuts.first_only = True
        self.batch_size, self.size, self.pixels = batch_size, size, pixels
        self.reuses = reuses  # the source holds image embeddings already, and may lack token features
        self.threads = ThreadPoolExecutor(_THREADS, "decode")

    def write(self, name: str, reader: _ShardReader, first: int, rows: int, tally: Tally) -> dict[str, Any]:
        """Make and store one piece, up to `rows` rows from number `first` on; returns its shard.json."""
        piece, count = _Piece(self.pixels), 0
        found = self._ahead(reader.take(first, min(self.batch_size, rows)))
        while found:
            count += len(found)
            left = min(self.batch_size, rows - count)
            following = self._ahead(reader.take(first + count, left) if left else [])  # decoded while the CLIP works
            self._add(piece, found, tally)
            found = following
        last = reader.ended()
        counts = {"rows": len(piece.keys), "captions": len(piece.masks), "read": count, "last": last}
        about: dict[str, Any] = counts if piece.keys else {**counts, "skipped": tally.report()}
        with replacing(self.folder / name) as temporary:
            piece.save(temporary, self.clip)
            write_json(temporary / "shard.json", about)
        return about

    def _ahead(self, rows: list[Row]) -> list[tuple[Row, Future[_Decoded | ImageError | Unwanted]]]:
        """Begin to decode."""
        return [(row, self.threads.submit(self._decode, row)) for row in rows]

    def _add(
        self, piece: _Piece, rows: list[tuple[Row, Future[_Decoded | ImageError | Unwanted]]], tally: Tally
    ) -> None:
        usable = []
        for row, future in rows:
            result = future.result()
            if isinstance(result, Unwanted):
                tally.leave_out(str(result))
            elif isinstance(result, ImageError):
                tally.add(row.name, row.name, str(result))
            else:
                usable.append(result)
        if not usable:
            return
        if self.reuses:
            stored = [row.features(0)["image_embedding"] for row, _, _ in usable if row.features is not None]
            image = torch.from_numpy(np.stack(stored))
        else:
            pictures = torch.stack([picture for _, picture, _ in usable if picture is not None])
            image = self.clip.encode_image(to_float(pictures).to(self.clip.device), unit_length=False)
        captions = [caption for row, _, _ in usable for caption in row.captions]
        size = self.batch_size
        texts = [self.clip.encode_text(captions[i : i + size]) for i in range(0, len(captions), size)]
        piece.add([row for row, _, _ in usable], image, texts, [small for _, _, small in usable])

    def _decode(self, row: Row) -> _Decoded | ImageError | Unwanted:
        try:
            selected, picture = decode_row(row, self.config, self.size)
            if picture is None and not self.reuses:
                raise ImageError(f"{row.name} has no image")
            small = None
            if self.pixels is not None:
                if row.pixels is None:
                    raise ImageError(f"{row.name} has no image to keep")
                small = picture if self.pixels == self.size else row.pixels(self.pixels)
        except (ImageError, Unwanted) as error:
            return error
        return selected, picture, small


class _Piece:
    """The arrays of a piece as they grow."""

    def __init__(self, pixels: int | None) -> None:
        self.keys: list[str] = []
        self.captions: list[list[str]] = []
        self.scores: list[float | None] = []
        self.images: list[np.ndarray] = []
        self.texts: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.pictures: list[np.ndarray] | None = None if pixels is None else []
        self.pixels = pixels

    def add(
        self, rows: list[Row], image: Tensor, texts: list[TextFeatures], pictures: list[Tensor | None]
    ) -> None:
        self.keys += [row.identity() for row in rows]
        self.captions += [list(row.captions) for row in rows]
        self.scores += [row.score for row in rows]
        self.images.append(image.float().cpu().numpy())
        for text in texts:
            assert text.norm is not None
            mask = text.mask.cpu()
            self.texts.append((text.embedding * text.norm[:, None]).cpu().numpy())
            self.tokens.append(text.tokens.cpu()[mask].half().numpy())
            self.masks += list(mask.numpy())
        if self.pictures is not None:
            self.pictures += [picture.numpy() for picture in pictures if picture is not None]

    def save(self, folder: Path, clip: FrozenCLIP) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        def whole(parts: list[np.ndarray], width: int, kind: Any) -> np.ndarray:
            return np.concatenate(parts) if parts else np.zeros((0, width), kind)

        np.save(folder / "image_embedding.npy", whole(self.images, clip.embedding_dim, np.float32))
        np.save(folder / "text_embedding.npy", whole(self.texts, clip.embedding_dim, np.float32))
        np.save(folder / "tokens.npy", whole(self.tokens, clip.token_dim, np.float16))
        masks = np.stack(self.masks) if self.masks else np.zeros((0, clip.context_length), bool)
        np.save(folder / "mask.npy", masks)
        ends = np.cumsum([0, *(len(captions) for captions in self.captions)]).astype(np.int64)
        np.save(folder / "caption_ends.npy", ends)
        if self.pictures is not None and self.pixels is not None:
            size = (0, 3, self.pixels, self.pixels)
            np.save(folder / "images.npy", np.stack(self.pictures) if self.pictures else np.zeros(size, np.uint8))
        schema = arrow.schema(
            [("key", arrow.string()), ("captions", arrow.list_(arrow.string())), ("score", arrow.float64())]
        )
        columns = {"key": self.keys, "captions": self.captions, "score": self.scores}
        parquet.write_table(arrow.table(columns, schema=schema), folder / "rows.parquet")
