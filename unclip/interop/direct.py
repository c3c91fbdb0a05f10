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
from unclip.errors import UnclipError
from unclip.interop.detect import convert, detect, recognised
from unclip.interop.karlo import ConvertOptions

# What a layout of LAYOUTS needs of a repository: nothing pickled, no pictures.
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.gz", "*.md")


def bundle_of(name: str, folder: Path | None, revision: str | None = None) -> Path | None:
    """The bundle made of a `folder`, or of the Hub's repository `name` where `folder` is None.

    What holds nothing of any layout is not ours to tell of: a folder comes back as it is, and for a repository None.

    Raises UnclipError: as `detect`, for a layout that is not whole.
    """
    if folder is None:
        folder = fetch(name, revision)
        if folder is None or (folder / MANIFEST).is_file() or not recognised([folder]):
            return None
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


def fetch(name: str, revision: str | None = None) -> Path | None:
    """A Hub repository that is no bundle -> its folder in the Hub's cache. Says how much is downloaded first.

    None where it is a bundle, or where the Hub cannot be asked and nothing is cached. With HF_HUB_OFFLINE only the
    cache is looked at. Raises UnclipError: the repository holds no layout that is known.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    def local() -> Path | None:
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:  # the Hub's client raises many kinds
            return None

    if constants.HF_HUB_OFFLINE:
        return local()
    try:
        found = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception:
        return local()
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    wanted = wanted_files(sizes)
    if MANIFEST in sizes or not wanted:
        return None
    size = sum(sizes[file] for file in wanted) / 2**30
    print(f"unclip: {name} has {len(wanted)} files of {size:.1f} GiB; fetching what is not cached yet", file=sys.stderr)
    try:
        return Path(snapshot_download(name, revision=found.sha, allow_patterns=wanted))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnclipError(f"the download of {name} did not end well: {reason}; start it again to go on") from error


def wanted_files(sizes: dict[str, int]) -> list[str]:
    """Of a repository's files those that a conversion reads: of several variants of the same weights the whole one."""
    from fnmatch import fnmatch

    kept = [file for file in sizes if any(fnmatch(file, pattern) for pattern in PATTERNS)]
    whole = {file for file in kept if ".fp16." not in file}
    return sorted(file for file in kept if file in whole or file.replace(".fp16.", ".") not in whole)


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
