"""Where captioned images come from: a source gives rows by index, or a resumable stream of them."""

from __future__ import annotations

import glob
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unclip.config import DataConfig
from unclip.data.columns import Columns, find_columns
from unclip.data.images import ImageError, decode_image, to_pixels
from unclip.data.tars import tar_features
from unclip.errors import UnclipError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = re.compile(r"(train|training|validation|valid|val|dev|test|testing|eval)(?![A-Za-z])")
_NAMES_SHOWN = 5
# How `datasets` puts it that there was no row to infer the columns from.
_SIGNS_OF_EMPTINESS = ("corresponds to no data", "at least one table")


@dataclass(frozen=True)
class Row:
    """One sample before decoding: its captions (none: the caption is missing) and how to get its pixels."""

    name: str
    captions: tuple[str, ...]
    pixels: Callable[[int], Tensor]  # edge in pixels → uint8 (3, edge, edge); raises ImageError
    encoded: bool = True  # whether `pixels` decodes a file, which is worth a thread


class Rows(Protocol):
    """A source with random access."""

    def __len__(self) -> int: ...

    def rows(self, indices: list[int]) -> list[Row]: ...


@dataclass
class Tally:
    """Counts the broken samples that were skipped, each once, and keeps the names of the first ones."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set, repr=False)

    def add(self, key: object, name: str, reason: str) -> None:
        """Count the sample known by `key` unless it was counted before."""
        if hash(key) in self._seen:
            return
        self._seen.add(hash(key))
        self.count += 1
        if len(self.first) < _NAMES_SHOWN:
            self.first.append(reason if name in reason else f"{name}: {reason}")

    def report(self) -> str:
        """One sentence about what was skipped; empty when nothing was."""
        if not self.count:
            return ""
        plural = "sample was" if self.count == 1 else "samples were"
        more = "" if self.count <= len(self.first) else f", and {self.count - len(self.first)} more"
        return f"{self.count} broken {plural} skipped ({'; '.join(self.first)}{more})"


class SyntheticRows:
    """The scenes of unclip.data.synthetic; another split holds other scenes."""

    def __init__(self, config: DataConfig) -> None:
        self._length = config.synthetic.size
        self._max_objects = config.synthetic.max_objects
        self._seed = 0 if config.split == "train" else zlib.crc32(config.split.encode())

    def __len__(self) -> int:
        return self._length

    def rows(self, indices: list[int]) -> list[Row]:
        from unclip.data.synthetic import render, scene

        scenes = [scene(index, self._seed, self._max_objects) for index in indices]

        def pixels(number: int, size: int) -> Tensor:
            return torch.from_numpy(render(scenes[number], size)).permute(2, 0, 1).contiguous()

        return [
            Row(f"scene {index}", (scenes[number].caption,), partial(pixels, number), encoded=False)
            for number, index in enumerate(indices)
        ]


class TableRows:
    """A map-style `datasets.Dataset`."""

    def __init__(self, dataset: Any, columns: Columns, base: Path | None) -> None:
        self._dataset = dataset.select_columns(columns.top_level)
        self._columns = columns
        self._base = base

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, indices: list[int]) -> list[Row]:
        if not indices:
            return []
        table = self._dataset[indices]  # column → list; one read for all
        examples = ({name: values[i] for name, values in table.items()} for i in range(len(indices)))
        return [
            _row(example, self._columns, self._base, f"sample {index}")
            for example, index in zip(examples, indices, strict=True)
        ]


class StreamRows:
    """A `datasets.IterableDataset` that already belongs to one rank."""

    def __init__(self, dataset: Any, columns: Columns, base: Path | None, seed: int) -> None:
        self._dataset = dataset
        self._columns = columns
        self._base = base
        self._seed = seed
        self._iterator: Iterator[dict[str, Any]] = iter(())
        self._number = 0
        self._state: dict[str, Any] | None = None

    def start(self, epoch: int, state: dict[str, Any] | None, number: int) -> None:
        """Begin an epoch, or continue it from a `state` that `number` rows preceded."""
        # `datasets` shuffles the order of shards by its epoch; only epoch 0 keeps the order of the files.
        self._dataset.set_epoch(1 + (self._seed * 7919 + epoch) % 2**31)
        self._dataset.load_state_dict(state)
        self._iterator = iter(self._dataset)
        self._number = number
        self._state = state

    def state(self) -> dict[str, Any] | None:
        """State after the last row read; None at the start of an epoch."""
        return self._state

    def read(self, count: int) -> list[Row]:
        """The next `count` rows, fewer at the end of the epoch."""
        try:
            examples = list(islice(self._iterator, count))
        except Exception as error:  # the reader of a format may raise anything
            raise UnclipError(f"the stream broke after sample {self._number}: {_reason(error)}") from error
        rows = [
            _row(example, self._columns, self._base, f"sample {self._number + i}")
            for i, example in enumerate(examples)
        ]
        self._number += len(rows)
        if rows:
            self._state = self._dataset.state_dict()
        return rows


def open_source(config: DataConfig, rank: int = 0, world_size: int = 1, seed: int = 0) -> Rows | StreamRows:
    """Open what `config.source` names; a stream is split between ranks here, rows by index are shared.

    Raises UnclipError: nothing there, unreadable, empty, or a column is missing.
    """
    if config.source == "synthetic":
        return SyntheticRows(config)
    dataset, base = _load(config)
    found = _first_example(dataset, config)
    columns = find_columns(dataset, found, config.image_column, config.caption_column, config.source)
    for name in columns.decoded_by_datasets:
        import datasets

        # decoded here instead, so that a broken image costs one sample and not the run
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    if not config.streaming:
        return TableRows(dataset, columns, base)
    from datasets.distributed import split_dataset_by_node

    share = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
    return StreamRows(share, columns, base, seed)


def _first_example(dataset: Any, config: DataConfig) -> dict[str, Any]:
    """The first row of a stream, its images left encoded; rows by index need none to tell their columns."""
    empty = UnclipError(
        f"the data set {config.source!r} (split {config.split!r}) is empty: it has no samples"
    )
    if not config.streaming:
        if len(dataset) == 0:
            raise empty
        return {}
    try:
        if dataset.features is not None:
            dataset = dataset.decode(False)
        example = next(iter(dataset), None)
    except Exception as error:
        raise UnclipError(f"{config.source!r} cannot be read: {_reason(error)}") from error
    if example is None:
        raise empty
    return dict(example)


def _load(config: DataConfig) -> tuple[Any, Path | None]:
    """Returns the data set and the folder against which relative image paths are resolved."""
    source = config.source
    path = Path(source).expanduser()
    if path.is_file() or path.is_dir():
        builder, files, base = _local_files(path, config.split)
    elif glob.has_magic(source):
        root = Path(path.anchor)
        matches = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
        if not matches:
            raise UnclipError(f"no file matches the pattern {source!r}")
        builder, files, base = _builder_for(matches, source), matches, matches[0].parent
    elif _HUB_ID.fullmatch(source) and path.suffix not in (".parquet", ".tar", ".jsonl"):
        return _load_hub(config), None
    else:
        raise UnclipError(
            f"there is no data set at {source!r}: expected a folder with metadata.jsonl, parquet files, "
            "webdataset tars, a Hugging Face Hub id such as user/name, or 'synthetic'"
        )
    return _load_local(config, builder, files), base


def _load_local(config: DataConfig, builder: str, files: list[Path]) -> Any:
    import datasets

    name = re.split(r"\W", config.split)[0] or "train"  # data.split may be a slice such as train[:1000]
    readable = [file for file in files if file.stat().st_size > 0]
    empty = UnclipError(f"the data set {config.source!r} is empty: {files[0]} holds no samples")
    if not readable:
        raise empty
    data_files = {name: [glob.escape(str(file.resolve())) for file in readable]}
    features = tar_features(readable) if builder == "webdataset" else None
    try:
        return datasets.load_dataset(
            builder, features=features, data_files=data_files, split=config.split, streaming=config.streaming
        )
    except Exception as error:  # the reader of a format may raise anything
        if isinstance(error, IndexError) or any(sign in str(error) for sign in _SIGNS_OF_EMPTINESS):
            raise empty from error
        raise UnclipError(f"{config.source!r} cannot be read as {builder}: {_reason(error)}") from error


def _load_hub(config: DataConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(config.source, split=config.split, streaming=config.streaming)
    except Exception as error:  # network, permissions, a name that does not exist, a format of its own
        raise UnclipError(
            f"{config.source!r} is no local file or folder, and could not be loaded from the Hugging Face "
            f"Hub: {_reason(error)}"
        ) from error


def _local_files(path: Path, split: str) -> tuple[str, list[Path], Path]:
    """Builder of `datasets`, its files and their folder, for a file or folder that exists."""
    if path.is_file():
        if path.name in _METADATA:
            return "imagefolder", [path], path.parent
        return _builder_for([path], str(path)), [path], path.parent
    for folder in (path, path / split):
        metadata = [folder / name for name in _METADATA if (folder / name).is_file()]
        if metadata:
            # The metadata file alone names every image, so that the folder itself need not be listed.
            return "imagefolder", metadata[:1], folder
    for pattern in ("*.parquet", "*.tar", "metadata.jsonl"):
        files = sorted(path.rglob(pattern))
        if files:
            builder = "imagefolder" if pattern == "metadata.jsonl" else _builder_for(files, str(path))
            return builder, _of_split(files, path, split), path
    raise UnclipError(
        f"the folder {path} holds no data set: no metadata.jsonl (one line an image, with file_name and "
        "caption), no .parquet and no .tar file"
    )


def _builder_for(files: list[Path], source: str) -> str:
    suffixes = {file.suffix for file in files}
    if suffixes == {".parquet"}:
        return "parquet"
    if suffixes == {".tar"}:
        return "webdataset"
    raise UnclipError(
        f"{source!r} names files ending in {', '.join(sorted(suffixes)) or 'nothing'}; expected only "
        ".parquet, only .tar, or metadata.jsonl"
    )


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """Where names tell splits apart (`train-00000-of-00002.parquet`, `test/0.tar`), the files of that one."""
    named: dict[str, list[Path]] = {}
    for file in files:
        match = next((m for part in file.relative_to(root).parts if (m := _SPLITS.match(part))), None)
        named.setdefault(match.group(1) if match else "", []).append(file)
    wanted = re.split(r"\W", split)[0]
    if wanted in named:
        return named[wanted]
    if "" in named:
        return named[""]
    raise UnclipError(f"{root} has no split {split!r}; it holds {', '.join(sorted(named))}")


def _row(example: dict[str, Any], columns: Columns, base: Path | None, fallback: str) -> Row:
    value = columns.image_of(example)
    path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    name = str(path or example.get("__key__") or fallback)
    return Row(name, columns.captions(example), partial(_pixels, value, base, name))


def _pixels(value: Any, base: Path | None, name: str, size: int) -> Tensor:
    """Decode what an image column holds: bytes, a dictionary of bytes and path, or a path."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ImageError(f"{name} has no image")
    if isinstance(value, str):
        if "://" in value:
            value = _read_remote(value)
        elif base is not None:
            value = base / value  # an absolute path stays as it is
    if not isinstance(value, (bytes, str, Path)):
        raise ImageError(f"{name} holds a {type(value).__name__} where an image was expected")
    # Twice the wanted edge leaves the antialiasing to the resize filter.
    return to_pixels(decode_image(value, name=name, min_edge=2 * size), size)


def _read_remote(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read())
    except Exception as error:
        raise ImageError(f"{url} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; `datasets` wraps what happened in a general sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
