"""Writing pictures and arrays: whole or not at all, and never over something else unasked."""

from __future__ import annotations

import math
import os
import re
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_OTHER_FORMATS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".jxl", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff"),
    *(".svg", ".pdf", ".eps", ".ps", ".psd", ".xcf", ".ico", ".tga", ".ppm", ".pgm", ".pnm", ".exr", ".hdr", ".qoi"),
    *(".npy", ".npz", ".json"),
}
_FILMS = {".gif", ".apng", ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ogv", ".wmv"}
_LONGEST_NAME = 255
"""Bytes of a file's name, in every common file system."""
_GRID_CELL = 256
_SLUG_BYTES = 80


class FileTaken(UnclipError):
    """The name is taken and may not be replaced."""


class PictureWriter:
    """Decides where pictures go, before anything is drawn, and writes them there.

    `out` is a .png file for one picture, else a folder. Raises UsageError: a file for several pictures,
    another format; UnclipError: the file exists and `overwrite` is not set, nothing can be written there.
    """

    def __init__(self, out: Path | None, count: int, overwrite: bool = False) -> None:
        self.overwrite = overwrite
        self.file: Path | None = None
        self.folder = Path("outputs") if out is None else out
        self._taken: set[Path] = set()
        if out is not None and not _is_folder(out):
            suffix = out.suffix.lower()
            if suffix in _OTHER_FORMATS | _FILMS:
                films = "; a moving picture is what interpolate and textdiff --animate" if suffix in _FILMS else ""
                raise UsageError(
                    f"--out {out} asks for {suffix}; pictures are written as .png, or into a folder{films}"
                )
            if suffix == ".png":
                self._take_file(out, count)
        check_writable(self.folder)

    def _take_file(self, out: Path, count: int) -> None:
        if count != 1:
            raise UsageError(
                f"--out {out} is a file for one picture, but {count} are asked for; name a folder"
            )
        check_free(out, self.overwrite)
        self.file, self.folder = out, out.parent

    def save(self, image: Image, label: str, seed: int, text: dict[str, str]) -> Path:
        """Write one picture with `text` as PNG metadata; returns where it is."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in text.items():
            info.add_text(key, value.replace("\0", " "))
        return self._write(image, self.file, f"{slug(label)}-seed{seed}", info)

    def save_grid(self, images: list[Image], columns: int) -> Path:
        """Write all pictures side by side, each made by `thumbnail`."""
        from unclip.data.images import make_grid

        grid = make_grid(images, columns)
        if self.file is not None:
            beside = self.file.with_name(f"{self.file.stem}-grid.png")
            if len(os.fsencode(beside.name)) <= _LONGEST_NAME:
                return self._write(grid, beside if self.overwrite or not beside.exists() else None, beside.stem)
        return self._write(grid, None, "grid")

    def _write(self, image: Image, file: Path | None, stem: str, info: Any = None) -> Path:
        def dump(stream: BinaryIO) -> None:
            image.save(stream, format="PNG", pnginfo=info)

        if file is not None:
            write_atomically(file, dump, replace=self.overwrite)
            return file
        for number in range(1, 10**9):
            candidate = self.folder / f"{stem}-{number}.png"
            if candidate in self._taken or (candidate.exists() and not self.overwrite):
                continue
            try:
                write_atomically(candidate, dump, replace=self.overwrite)
            except FileTaken:  # another process was faster
                continue
            self._taken.add(candidate)
            return candidate
        raise UnclipError(f"no free file name left for {stem} in {self.folder}")


def slug(text: str) -> str:
    """A file name made of a prompt's letters and digits."""
    folded = unicodedata.normalize("NFKC", text).lower()
    name = re.sub(r"[\W_]+", "-", folded).strip("-")
    short = name.encode("utf-8", "ignore")[:_SLUG_BYTES].decode("utf-8", "ignore").strip("-")
    return short or "picture"


def bare_name(file: str | Path) -> str:
    """A file's name as a picture may tell of it: without its folder, and as text that can be written."""
    return Path(file).name.encode("utf-8", "replace").decode()


def thumbnail(image: Image) -> Image:
    """A copy of at most 256 px for the grid, so that the grid of many large pictures stays small."""
    small = image.copy()
    small.thumbnail((_GRID_CELL, _GRID_CELL))
    return small


def grid_columns(count: int, num_images: int) -> int:
    """A row for each prompt where each has several pictures, else nearly a square."""
    return num_images if 1 < num_images < count else math.ceil(math.sqrt(count))


def check_free(file: Path, overwrite: bool) -> None:
    """UnclipError when the file exists and may not be replaced, is a folder, or cannot have this name."""
    if _is_folder(file):
        raise UnclipError(f"{file} is a folder; name a file")
    if file.exists() and not overwrite:
        raise FileTaken(f"{file} exists; pass --overwrite to replace it, or name another")


def _is_folder(path: Path) -> bool:
    """UnclipError when nothing can have this name."""
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _LONGEST_NAME:
        name = path.name if len(path.name) <= 40 else f"{path.name[:40]}…"
        raise UnclipError(f"cannot write {name}: a name of {longest} bytes; file systems take up to {_LONGEST_NAME}")
    try:
        return path.is_dir()
    except OSError as error:  # a path too long
        raise UnclipError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """UnclipError when files cannot be written to a folder, which need not exist yet."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise UnclipError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not nearest.is_dir():
        raise UnclipError(f"cannot write to {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UnclipError(f"cannot write to {folder}: no permission in {nearest}")


def write_atomically(file: Path, dump: Callable[[BinaryIO], None], replace: bool) -> None:
    """Write to a temporary name, then rename. Raises FileTaken unless `replace`, UnclipError when writing
    fails.
    """
    # No longer than other names are: the file's own may take all that the file system allows.
    temporary = file.with_name(f".tmp-{os.getpid()}-{zlib.crc32(os.fsencode(file.name)):08x}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                dump(stream)
            if replace:
                temporary.replace(file)
            elif not _rename_if_free(temporary, file):
                raise FileTaken(f"{file} exists; pass --overwrite to replace it, or name another")
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UnclipError(f"cannot write {file}: {error.strerror or error}") from error


def _rename_if_free(temporary: Path, file: Path) -> bool:
    """False when the name is taken: a hard link fails then, which a rename does not."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if file.exists():
            return False
        temporary.rename(file)
    return True
