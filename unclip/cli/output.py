"""Writing pictures and arrays: whole or not at all, and never over something else unasked."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".json")
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
        if out is not None and not out.is_dir():
            suffix = out.suffix.lower()
            if suffix in _OTHER_FORMATS:
                raise UsageError(
                    f"--out {out} asks for {suffix}; pictures are written as .png, or into a folder"
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


def thumbnail(image: Image) -> Image:
    """A copy of at most 256 px for the grid, so that the grid of many large pictures stays small."""
    small = image.copy()
    small.thumbnail((_GRID_CELL, _GRID_CELL))
    return small


def grid_columns(count: int, num_images: int) -> int:
    """A row for each prompt where each has several pictures, else nearly a square."""
    return num_images if 1 < num_images < count else math.ceil(math.sqrt(count))


def check_free(file: Path, overwrite: bool) -> None:
    """UnclipError when the file exists and may not be replaced, or is a folder."""
    if file.is_dir():
        raise UnclipError(f"{file} is a folder; name a file")
    if file.exists() and not overwrite:
        raise FileTaken(f"{file} exists; pass --overwrite to replace it, or name another")


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
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
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
