"""One sample before it is decoded, and the two kinds of sources: rows by index, and shards read in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from typing_extensions import TypeIs

from unclip.config import FilterConfig
from unclip.data.columns import Columns
from unclip.data.images import ImageError, Unwanted, decode_image, to_pixels


@dataclass(frozen=True)
class Row:
    """One sample before decoding: its captions (none: the caption is missing) and how to get its pixels."""

    name: str
    captions: tuple[str, ...]
    pixels: Callable[[int], Tensor] | None  # edge in pixels → uint8 (3, edge, edge); raises ImageError, Unwanted
    encoded: bool = True  # whether `pixels` decodes a file, which is worth a thread
    key: str | None = None  # what names it wherever it is stored
    content: Callable[[], bytes] | None = None  # stands in where there is no key
    score: float | None = None
    error: str | None = None  # a sample, or the rest of a shard, that could not be read
    features: Callable[[int], dict[str, np.ndarray]] | None = None  # number of the caption → CLIP's features
    low: Callable[[int], Tensor] | None = None  # the low-resolution picture, as `pixels`

    def identity(self) -> str:
        """The key, or a hash of the content, which stays when shards are cut anew."""
        if self.key is not None:
            return self.key
        return blake2b(self.content() if self.content is not None else b"", digest_size=16).hexdigest()


class Rows(Protocol):
    """A source with random access."""

    def __len__(self) -> int: ...

    def rows(self, indices: list[int]) -> list[Row]: ...


class Reader(Protocol):
    """Reads one shard from its beginning, or from a saved state."""

    def read(self, count: int) -> list[Row]:
        """The next rows, fewer at the shard's end. What cannot be read is a row with an error, and ends the shard."""
        ...

    def state(self) -> dict[str, Any]:
        """From which the shard is read on with the row after the last; `row` counts those before."""
        ...


class Shards(Protocol):
    """A source whose shards are read in order. Rows of a shard are numbered from 0."""

    @property
    def num_shards(self) -> int: ...

    def open(self, shard: int, state: dict[str, Any] | None = None) -> Reader: ...


def is_sharded(source: Rows | Shards) -> TypeIs[Shards]:
    """Whether a source is read in order, shard by shard."""
    return hasattr(source, "num_shards")


class CutRows:
    """A source with random access in consecutive shards of `lengths` rows, so that it can be read in order."""

    def __init__(self, source: Rows, lengths: list[int]) -> None:
        self._source = source
        self._ends = np.cumsum([0, *lengths]).tolist()

    @property
    def num_shards(self) -> int:
        return len(self._ends) - 1

    def open(self, shard: int, state: dict[str, Any] | None = None) -> Reader:
        return _Cut(self._source, self._ends[shard], self._ends[shard + 1], state["row"] if state else 0)


class _Cut:
    def __init__(self, source: Rows, start: int, stop: int, row: int) -> None:
        self._source, self._start, self._stop, self._row = source, start, stop, row

    def read(self, count: int) -> list[Row]:
        first = self._start + self._row
        indices = list(range(first, min(self._stop, first + count)))
        self._row += len(indices)
        return self._source.rows(indices)

    def state(self) -> dict[str, Any]:
        return {"row": self._row}


def row_of(
    example: dict[str, Any], columns: Columns, base: Path | None, fallback: str, limits: FilterConfig | None = None
) -> Row:
    """The row of what `datasets` gives for one sample."""
    value = columns.image_of(example)
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    low = columns.low_of(example)
    if isinstance(low, dict) and all(low.get(part) is None for part in ("bytes", "path")):
        low = None
    key = columns.key_of(example)
    name = str(path or example.get("__key__") or fallback)
    if key is None and path:
        key = _below(str(path), base)
    captions, undecodable = columns.captions(example)
    error = example.get("__error__")
    if error is None and undecodable and not captions:
        error = "its caption is not UTF-8 text"
    return Row(
        name,
        captions,
        partial(_pixels, value, base, name, limits),
        key=key,
        content=partial(_content, value, captions),
        score=columns.score_of(example),
        error=f"{name}: {error}" if error is not None else None,
        low=None if low is None else partial(_pixels, low, base, f"the low-resolution picture of {name}", None),
    )


def _below(path: str, base: Path | None) -> str:
    """A path that does not change when the whole data set is moved."""
    if base is not None and Path(path).is_absolute():
        try:
            return Path(path).relative_to(base.resolve()).as_posix()
        except ValueError:
            return path
    return path


def _content(value: Any, captions: tuple[str, ...]) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else "\n".join(captions).encode("utf-8", "replace")


def _pixels(value: Any, base: Path | None, name: str, limits: FilterConfig | None, size: int) -> Tensor:
    """Decode what an image column holds: bytes, a dictionary of bytes and path, or a path."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if data is not None else value.get("path")
    if value is None:
        raise ImageError(f"{name} has no image")
    if isinstance(value, str):
        if "://" in value:
            value = _read_remote(value)
        elif base is not None:
            value = base / value  # an absolute path stays as it is
    if not isinstance(value, (bytes, str, Path)):
        raise ImageError(f"{name} holds a {type(value).__name__} where an image was expected")
    check = None if limits is None else partial(check_size, limits)
    # Twice the wanted edge leaves the antialiasing to the resize filter.
    return to_pixels(decode_image(value, name=name, min_edge=2 * size, check=check), size)


def check_size(limits: FilterConfig, width: int, height: int) -> None:
    """Raises Unwanted: the picture is too small or too long."""
    short, long = min(width, height), max(width, height)
    if limits.min_edge is not None and short < limits.min_edge:
        raise Unwanted("size")
    if limits.max_aspect is not None and long > limits.max_aspect * short:
        raise Unwanted("aspect")


def _read_remote(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read())
    except Exception as error:
        raise ImageError(f"{url} cannot be read: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The innermost cause in one line; `datasets` wraps what happened in a general sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def batched(reader: Reader, count: int) -> Iterator[list[Row]]:
    """A shard's rows, `count` at a time."""
    while rows := reader.read(count):
        yield rows
