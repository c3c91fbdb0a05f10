"""Where captioned images come from: a source gives rows by index, or shards that are read in order."""

from __future__ import annotations

import zlib
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.config import DataConfig, FilterConfig
from unclip.data.columns import Columns, find_columns
from unclip.data.embeddings import find_embeddings
from unclip.data.locate import load_source
from unclip.data.rows import CutRows, Reader, Row, Rows, Shards, reason_of, row_of
from unclip.data.tally import Tally
from unclip.errors import UnclipError, UsageError

_ROWS_A_SHARD = 4096  # of a source with random access that is read in order


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
            Row(
                f"scene {index}",
                (scenes[number].caption,),
                partial(pixels, number),
                encoded=False,
                key=f"scene {self._seed} {index}",
            )
            for number, index in enumerate(indices)
        ]


class TableRows:
    """A map-style `datasets.Dataset`."""

    def __init__(self, dataset: Any, columns: Columns, base: Path | None, limits: FilterConfig) -> None:
        self._dataset = dataset.select_columns(columns.top_level)
        self._columns = columns
        self._base = base
        self._limits = limits

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, indices: list[int]) -> list[Row]:
        if not indices:
            return []
        try:
            table = self._dataset[indices]  # column → list; one read for all
        except UnicodeDecodeError:
            table = self._undecoded(indices)
        examples = ({name: values[i] for name, values in table.items()} for i in range(len(indices)))
        return [
            row_of(example, self._columns, self._base, f"sample {index}", self._limits)
            for example, index in zip(examples, indices, strict=True)
        ]

    def _undecoded(self, indices: list[int]) -> dict[str, list[Any]]:
        """The same rows with captions as bytes, where some are no UTF-8."""
        import pyarrow as arrow

        name = self._columns.caption[0]
        table = self._dataset.with_format("arrow")[indices]
        kind = table.schema.field(name).type
        if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
            raw = arrow.binary()
        elif arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
            raw = arrow.list_(arrow.binary())
        else:
            raise UnclipError(f"the caption column {name!r} holds text that is not UTF-8")
        place = table.schema.get_field_index(name)
        plain: dict[str, list[Any]] = table.set_column(place, name, table.column(name).cast(raw)).to_pydict()
        return plain


class StreamShards:
    """A `datasets.IterableDataset`, shard by shard."""

    def __init__(
        self, dataset: Any, columns: Columns, base: Path | None, limits: FilterConfig, names: list[str]
    ) -> None:
        self._dataset = dataset
        self._columns = columns
        self._base = base
        self._limits = limits
        self._names = names if len(names) == dataset.num_shards else []

    @property
    def num_shards(self) -> int:
        return int(self._dataset.num_shards)

    def open(self, shard: int, state: dict[str, Any] | None = None) -> Reader:
        part = self._dataset.shard(self.num_shards, shard)
        name = self._names[shard] if self._names else f"shard {shard}"
        return _StreamReader(part, name, state, self._columns, self._base, self._limits)


class _StreamReader:
    def __init__(
        self,
        dataset: Any,
        name: str,
        state: dict[str, Any] | None,
        columns: Columns,
        base: Path | None,
        limits: FilterConfig,
    ) -> None:
        self._dataset, self._name = dataset, name
        self._columns, self._base, self._limits = columns, base, limits
        self._state = state or {"row": 0, "stream": None, "ended": False}
        if self._state["stream"] is not None:
            dataset.load_state_dict(self._state["stream"])
        elif self._state["row"]:
            dataset = dataset.skip(self._state["row"])
        self._iterator = iter(dataset)
        self._may_save = self._state["stream"] is not None or self._state["row"] == 0

    def read(self, count: int) -> list[Row]:
        if self._state["ended"]:
            return []
        examples: list[dict[str, Any]] = []
        failure = None
        try:
            examples.extend(islice(self._iterator, count))
        except Exception as error:  # the reader of a format may raise anything
            failure = f"{self._name} is damaged and its rest is lost: {reason_of(error)}"
        first = self._state["row"]
        rows = [
            row_of(example, self._columns, self._base, f"sample {first + i} of {self._name}", self._limits)
            for i, example in enumerate(examples)
        ]
        if failure is not None:
            rows.append(Row(self._name, (), None, key=self._name, error=failure))
        ended = failure is not None or len(examples) < count
        stream = self._dataset.state_dict() if self._may_save and not ended else None
        self._state = {"row": first + len(rows), "stream": stream, "ended": ended}
        return rows

    def state(self) -> dict[str, Any]:
        return self._state


def open_source(config: DataConfig, tally: Tally | None = None) -> Rows | Shards:
    """Open what `config.source` names: shards where `config.streaming` says so, else rows by index.

    Raises UnclipError: nothing there, unreadable, empty, or a column is missing.
    """
    tally = Tally() if tally is None else tally
    if config.streaming and config.cache:
        raise UsageError("data.cache keeps a small set in memory and data.streaming reads a large one; set one of them")
    if config.source == "synthetic":
        _refuse_low(config, "scenes are drawn, and have")
        scenes = SyntheticRows(config)
        return _cut(scenes) if config.streaming else scenes
    embeddings = find_embeddings(config)
    if embeddings is not None:
        _refuse_low(config, "stored embeddings have")
        return CutRows(embeddings, embeddings.lengths) if config.streaming else embeddings
    dataset, base, names = load_source(config, tally)
    columns = find_columns(dataset, _first_example(dataset, config), config)
    for name in columns.decoded_by_datasets:
        import datasets

        # decoded here instead, so that a broken image costs one sample and not the run
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    if not config.streaming:
        return TableRows(dataset, columns, base, config.filter)
    return StreamShards(_with_raw_captions(dataset, columns), columns, base, config.filter, names)


def _refuse_low(config: DataConfig, what: str) -> None:
    if config.low_column is not None:
        raise UsageError(f"data.low_column is {config.low_column!r}, but {what} no such pictures; leave it out")


def _cut(source: Rows) -> CutRows:
    whole, rest = divmod(len(source), _ROWS_A_SHARD)
    return CutRows(source, [_ROWS_A_SHARD] * whole + ([rest] if rest else []))


def _with_raw_captions(dataset: Any, columns: Columns) -> Any:
    """Captions that are no UTF-8 would end a stream; as bytes they cost one sample each."""
    import datasets

    name = columns.caption[0]
    feature = None if dataset.features is None else dataset.features.get(name)
    if isinstance(feature, datasets.Value) and feature.dtype == "string":
        return dataset.cast_column(name, datasets.Value("binary"))
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Value) and inner.dtype == "string":
        return dataset.cast_column(name, datasets.List(datasets.Value("binary")))
    return dataset


def _first_example(dataset: Any, config: DataConfig) -> dict[str, Any]:
    """The first row of a stream, its images left encoded; rows by index need none to tell their columns."""
    empty = UnclipError(f"the data set {config.source!r} (split {config.split!r}) is empty: it has no samples")
    if not config.streaming:
        if len(dataset) == 0:
            raise empty
        return {}
    if dataset.features is not None:
        dataset = dataset.decode(False)
    failure: Exception | None = None
    for shard in range(dataset.num_shards):
        try:
            for example in dataset.shard(dataset.num_shards, shard):
                return dict(example)
        except Exception as error:  # the next shard may be whole
            failure = error
    if failure is not None:
        raise UnclipError(f"{config.source!r} cannot be read: {reason_of(failure)}") from failure
    raise empty
