"""What a `data.source` is: local files and which builder of `datasets` reads them, or a data set of the Hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from unclip.config import DataConfig
from unclip.data.rows import reason_of
from unclip.data.tally import Tally
from unclip.data.tars import json_kinds, read_tars, tar_features
from unclip.errors import UnclipError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLITS = re.compile(r"(train|training|validation|valid|val|dev|test|testing|eval)(?![A-Za-z])")
# How `datasets` puts it that there was no row to infer the columns from.
_SIGNS_OF_EMPTINESS = ("corresponds to no data", "at least one table")


def load_source(config: DataConfig, tally: Tally) -> tuple[Any, Path | None, list[str]]:
    """The data set of `datasets`, the folder against which relative image paths are resolved, and the names of the
    files where each is a shard. Files that cannot be read while others can are counted.

    Raises UnclipError: nothing there, unreadable, empty.
    """
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
        return _load_hub(config), None, []
    else:
        raise UnclipError(
            f"there is no data set at {source!r}: expected a folder with metadata.jsonl, parquet files, "
            "webdataset tars, embeddings, a Hugging Face Hub id such as user/name, or 'synthetic'"
        )
    dataset, names = _load_local(config, builder, files, tally)
    return dataset, base, names


def _load_local(config: DataConfig, builder: str, files: list[Path], tally: Tally) -> tuple[Any, list[str]]:
    readable = [file for file in files if file.stat().st_size > 0]
    empty = UnclipError(f"the data set {config.source!r} is empty: {files[0]} holds no samples")
    if not readable:
        raise empty
    for file in sorted(set(files) - set(readable)):
        tally.add(str(file), file.name, "is empty")
    try:
        return _open(config, builder, readable), [file.name for file in readable]
    except Exception as error:  # the reader of a format may raise anything
        if isinstance(error, IndexError) or any(sign in str(error) for sign in _SIGNS_OF_EMPTINESS):
            raise empty from error
        failure = error
    if builder == "parquet":
        reasons = {file: _damage(file) for file in readable}
        whole = [file for file in readable if reasons[file] is None]
        if whole and len(whole) < len(readable):
            for file, reason in reasons.items():
                if reason is not None:
                    tally.add(str(file), file.name, reason)
            return _open(config, builder, whole), [file.name for file in whole]
    raise UnclipError(f"{config.source!r} cannot be read as {builder}: {reason_of(failure)}") from failure


def _open(config: DataConfig, builder: str, files: list[Path]) -> Any:
    import datasets

    paths = [str(file.resolve()) for file in files]
    if builder == "webdataset":
        needed = tuple(name for name in (config.filter.score_column,) if name is not None)
        features = tar_features(files, needed)
        if features is not None:
            return _open_tars(config, paths, features)
    name = re.split(r"\W", config.split)[0] or "train"  # data.split may be a slice such as train[:1000]
    return datasets.load_dataset(
        builder,
        data_files={name: [glob.escape(path) for path in paths]},
        split=config.split,
        streaming=config.streaming,
    )


def _open_tars(config: DataConfig, paths: list[str], features: Any) -> Any:
    import datasets

    fields = tuple(name for name in features if not name.startswith("__"))
    options = {"files": paths, "fields": fields, "kinds": json_kinds(features)}
    if config.streaming:
        return datasets.IterableDataset.from_generator(read_tars, features=features, gen_kwargs=options)
    # `datasets` knows a table it has made before by the arguments, so a file that was changed must change them.
    stamps = tuple((Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths)
    split = re.split(r"\W", config.split)[0] or "train"
    table = datasets.Dataset.from_generator(
        _read_stamped, features=features, gen_kwargs={**options, "stamps": stamps}, split=datasets.NamedSplit(split)
    )
    return _sliced(table, config.split)


def _read_stamped(files: list[str], fields: tuple[str, ...], kinds: dict[str, str], stamps: Any) -> Any:
    return read_tars(files, fields, kinds)


def _sliced(table: Any, split: str) -> Any:
    """The slice of `train[:1000]`, as `datasets` reads it."""
    import datasets

    if "[" not in split:
        return table
    name = re.split(r"\W", split)[0]
    found = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(table)})
    return datasets.concatenate_datasets(
        [table.select(range(part.from_ or 0, len(table) if part.to is None else part.to)) for part in found]
    )


def _damage(file: Path) -> str | None:
    """What is wrong with a parquet file; None where all of it can be read."""
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            for _ in table.iter_batches(batch_size=1024):
                pass
    except Exception as error:
        return f"cannot be read as parquet: {reason_of(error)}"
    return None


def _load_hub(config: DataConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(config.source, split=config.split, streaming=config.streaming)
    except Exception as error:  # network, permissions, a name that does not exist, a format of its own
        raise UnclipError(
            f"{config.source!r} is no local file or folder, and could not be loaded from the Hugging Face "
            f"Hub: {reason_of(error)}"
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
