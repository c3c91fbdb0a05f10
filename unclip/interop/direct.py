"""Somebody else's checkpoint used as if it were a bundle: converted when it is first named, then taken from the cache.

unclip.bundle.resolve_model asks `bundle_of` for whatever is no bundle itself, and `upsampler_of` for upscaling alone.
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
from unclip.interop.karlo import ConvertOptions, DiffusersKarlo, write_part

_UPSAMPLER = ("super_res_first", "super_res_last", "super_res_scheduler")  # folders of diffusers' layout


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


def upsampler_files(described: Path) -> list[str]:
    """Patterns of the weights that upscaling needs of a checkpoint whose descriptions lie here; none where its layout
    does not set them apart.
    """
    if not (described / _UPSAMPLER[0] / "config.json").is_file():
        return []
    return [f"{name}/*.safetensors" for name in _UPSAMPLER if (described / name).is_dir()]


def upsampler_of(folder: Path) -> Path:
    """An upsampler's part made of somebody else's checkpoint, from the cache; the whole bundle where that is there
    already, or where nothing less can be read. Raises UnclipError: the upsampler is damaged.
    """
    if not upsampler_files(folder) or (cache_folder() / _key([folder]) / MANIFEST).is_file():
        return bundle_of(folder)
    digest = _key([folder / name for name in _UPSAMPLER])[-16:]
    out = cache_folder() / f"{folder.resolve().name[:40]}-upsampler-{digest}"
    if not out.is_dir():
        print(f"unclip: converting the upsampler of {folder} into {out}, once", file=sys.stderr)
        write_part(DiffusersKarlo([folder]), "upsampler_256", out)
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
