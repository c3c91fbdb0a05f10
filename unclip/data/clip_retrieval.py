"""Local copies of embeddings in clip-retrieval's layout: img_emb/*.npy, text_emb/*.npy and metadata/*.parquet.

They have unit length, and no token features; those come from the captions.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unclip.config import DataConfig
from unclip.data.embeddings import EmbeddingInfo, check_pixels, open_array, open_table, place_of
from unclip.data.rows import Row
from unclip.errors import UnclipError

_CAPTIONS = ("caption", "captions", "text", "TEXT")
_KEYS = ("key", "image_path", "url", "URL", "hash")


class ClipRetrievalRows:
    """Image embeddings, text embeddings where there are some, and captions, by index.

    Raises UnclipError: files are missing, counts or widths differ, there is no caption column.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        images = _numbered(folder / "img_emb", ".npy")
        texts = _numbered(folder / "text_emb", ".npy") if (folder / "text_emb").is_dir() else {}
        tables = _numbered(folder / "metadata", ".parquet")
        if not images:
            raise UnclipError(f"{folder / 'img_emb'} holds no .npy file")
        for other, name, ending in ((texts, "text_emb", ".npy"), (tables, "metadata", ".parquet")):
            missing = sorted(set(images) - set(other))
            if missing and other:
                raise UnclipError(f"{folder / name} lacks the {ending} file number {missing[0]} that img_emb has")
        if not tables:
            raise UnclipError(f"{folder / 'metadata'} holds no .parquet file, and so there are no captions")
        numbers = sorted(images)
        self._images = [open_array(images[number], (None, None)) for number in numbers]
        width = self._images[0].shape[1]
        self._texts = [open_array(texts[number], (None, None)) for number in numbers] if texts else []
        self.lengths = [len(array) for array in self._images]
        self._check(images, texts, tables, numbers, width)
        self._ends = np.cumsum([0, *self.lengths])
        self.info = EmbeddingInfo(folder, width, has_text=bool(texts), raw_length=False)
        check_pixels(self.info, config)
        self._table = open_table([tables[number] for number in numbers], folder)
        columns = self._table.column_names
        self._caption = _pick(config.caption_column, columns, _CAPTIONS, "caption", folder)
        self._key = _pick(config.key_column, columns, _KEYS, "key", folder, needed=config.key_column is not None)
        score = config.filter.score_column
        self._score = None if score is None else _pick(score, columns, (), "score", folder)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: list[int]) -> list[Row]:
        if not indices:
            return []
        table = self._table[indices]
        result = []
        for number, index in enumerate(indices):
            shard, inside = place_of(self._ends, index)
            image = np.array(self._images[shard][inside], np.float32)
            text = None if not self._texts else np.array(self._texts[shard][inside], np.float32)
            caption = table[self._caption][number]
            captions = (caption,) if isinstance(caption, str) else tuple(caption or ())
            name = str(table[self._key][number]) if self._key is not None else f"{shard}/{inside}"
            finite = np.isfinite(image).all() and (text is None or np.isfinite(text).all())
            result.append(
                Row(
                    name,
                    captions,
                    None,
                    encoded=False,
                    key=name,
                    score=None if self._score is None else table[self._score][number],
                    error=None if finite else f"{name}: its embedding is not finite",
                    features=partial(_features, image, text),
                )
            )
        return result

    def _check(
        self,
        images: dict[int, Path],
        texts: dict[int, Path],
        tables: dict[int, Path],
        numbers: list[int],
        width: int,
    ) -> None:
        import pyarrow.parquet as parquet

        for place, number in enumerate(numbers):
            rows, own = self._images[place].shape
            if own != width:
                raise UnclipError(f"{images[number]} is {own} wide, {images[numbers[0]].name} is {width} wide")
            if texts and self._texts[place].shape != (rows, width):
                found = tuple(self._texts[place].shape)
                raise UnclipError(f"{texts[number]} has the shape {found}, {images[number].name} has {(rows, width)}")
            try:
                described = parquet.read_metadata(tables[number]).num_rows
            except Exception as error:
                raise UnclipError(f"{tables[number]} cannot be read as parquet: {error}") from error
            if described != rows:
                raise UnclipError(f"{tables[number]} has {described} rows, {images[number].name} has {rows}")


def _features(image: np.ndarray, text: np.ndarray | None, caption: int) -> dict[str, np.ndarray]:
    return {"image_embedding": image} if text is None else {"image_embedding": image, "text_embedding": text}


def _numbered(folder: Path, ending: str) -> dict[int, Path]:
    """img_emb_12.npy → 12."""
    found = {}
    for file in folder.glob(f"*{ending}"):
        match = re.search(r"(\d+)$", file.stem)
        if match:
            found[int(match.group(1))] = file
    return found


def _pick(
    wanted: str | None, columns: list[str], usual: tuple[str, ...], what: str, folder: Path, needed: bool = True
) -> Any:
    name = wanted if wanted is not None else next((one for one in usual if one in columns), None)
    if name in columns or (name is None and not needed):
        return name
    raise UnclipError(
        f"the metadata in {folder} have no {what} column{f' {name!r}' if name else ''}; columns found: "
        f"{', '.join(columns)}; name one with data.{'filter.score' if what == 'score' else what}_column"
    )
