"""Somebody else's checkpoint used as if it were a bundle: converted when it is first named, then taken from the cache.

unclip.bundle.resolve_model asks `bundle_of` for whatever is no bundle itself.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.bundle import MANIFEST
from unclip.interop.detect import convert, detect, recognised
from unclip.interop.karlo import ConvertOptions


def bundle_of(folder: Path) -> Path:
    """The bundle made of a folder with somebody else's checkpoint; a folder that holds nothing of any layout is not
    ours to tell of, and comes back as it is.

    Raises UnclipError: as `detect`, for a layout that is not whole.
    """
    return cached([folder]) if recognised([folder]) else folder


def cached(folders: Sequence[Path]) -> Path:
    """The converted bundle of these folders in the cache, made now if it is not there yet."""
    detect(folders)
    out = cache_folder() / _key(folders)
    if not (out / MANIFEST).is_file():
        names = " and ".join(str(folder) for folder in folders)
        print(f"unclip: converting {names} into {out}, once", file=sys.stderr)
        with Told() as told:
            convert(folders, out, ConvertOptions(name=folders[0].absolute().name, overwrite=True), told)
    return out


def cache_folder() -> Path:
    """Where converted checkpoints are kept: $XDG_CACHE_HOME/unclip/converted, by default below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "unclip" / "converted"


class Told:
    """Hears of a conversion and draws a bar where stderr is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="MiB", file=sys.stderr, leave=False)
        self._bar.set_description(stage)
        self._bar.update(done - self._bar.n)


def _key(folders: Sequence[Path]) -> str:
    """A name that changes with any file of the folders: with its place, size or time."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update(str(folder.resolve()).encode())
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            status = file.stat()
            digest.update(f"{file.relative_to(folder)}:{status.st_size}:{status.st_mtime_ns}".encode())
    return f"{folders[0].resolve().name[:40]}-{digest.hexdigest()[:16]}"
