"""What tells a data set from another, and from what it was before: for folders of results that are gone on with."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from unclip.config import DataConfig
from unclip.errors import UnclipError

_CHOSEN = (
    "source", "split", "streaming", "image_column", "caption_column", "key_column", "holdout", "part", "synthetic",
    "filter",
)  # fmt: skip


def fingerprint(config: DataConfig, without: Iterable[Path] = ()) -> str:
    """16 hexadecimal digits of a data set's configuration, and of local files their names, sizes and times of change.

    Folders of `without` that lie in the data's own are left aside: results are written there. A data set of the Hub is
    told by its name and split alone. UnclipError: the files cannot be looked at.
    """
    body = {name: value for name, value in config.model_dump(mode="json").items() if name in _CHOSEN}
    known = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    try:
        for file in _files(config, without):
            about = file.stat()
            known.update(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UnclipError(f"the files of {config.source!r} cannot be read: {error.strerror or error}") from error
    return known.hexdigest()[:16]


def changed_since(config: DataConfig, mark: Path, without: Iterable[Path] = ()) -> bool:
    """Whether a file of the data was changed after the file `mark`: of results whose folder holds no fingerprint."""
    begun = mark.stat().st_mtime_ns
    return any(file.stat().st_mtime_ns > begun for file in _files(config, without))


def _files(config: DataConfig, without: Iterable[Path]) -> list[Path]:
    """The local files of the source, sorted; of a file of captions those of its folder, where its pictures are."""
    path = Path(config.source).expanduser()
    if path.is_file() and path.stem == "metadata":
        path = path.parent
    if path.is_dir():
        root = path.resolve()
        aside = [folder for one in without if root in (folder := one.expanduser().resolve()).parents]
        files = (p for p in path.rglob("*") if p.is_file())
        if aside:
            files = (p for p in files if not any(p.resolve().is_relative_to(folder) for folder in aside))
        return sorted(files)
    if path.is_file():
        return [path]
    if glob.has_magic(config.source):
        start = Path(path.anchor)
        return sorted(file for file in start.glob(str(path.relative_to(start))) if file.is_file())
    return []
