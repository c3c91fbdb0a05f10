"""Frames as a moving picture: GIF and WebP by Pillow, MP4 by imageio's ffmpeg."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from unclip.cli.output import check_free, check_writable, write_atomically
from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".gif", ".webp", ".mp4")
_OUTPUT = "What is written"

Animate = Annotated[
    list[Path] | None,
    typer.Option(
        "--animate",
        metavar="FILE.gif|.webp|.mp4",
        help="Also write the frames as a moving picture; repeatable.",
        rich_help_panel=_OUTPUT,
    ),
]
Fps = Annotated[float, typer.Option(help="Frames a second of the moving picture.", rich_help_panel=_OUTPUT)]


class Animations:
    """Decides before anything is drawn whether the moving pictures can be written, and writes them.

    Raises UsageError: another format than .gif, .webp or .mp4, frames a second out of range, no encoder for MP4, a
    file named twice; UnclipError: a file that exists without `overwrite`, a folder that cannot be written to.
    """

    def __init__(self, files: Sequence[Path] | None, fps: float, overwrite: bool = False) -> None:
        self.files, self.fps, self.overwrite = list(files or []), fps, overwrite
        if not 0.1 <= fps <= 100:
            raise UsageError(f"--fps is {fps:g}, expected 0.1 to 100 frames a second")
        known: set[Path] = set()
        for file in self.files:
            suffix = file.suffix.lower()
            if suffix not in _SUFFIXES:
                raise UsageError(f"--animate {file} asks for {suffix or 'no format'}; expected {', '.join(_SUFFIXES)}")
            if suffix == ".mp4" and not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
                raise UsageError(
                    f"{file} needs imageio with ffmpeg, which is not installed: pip install 'unclip[video]'; .gif and "
                    ".webp do without"
                )
            check_free(file, overwrite)
            check_writable(file.parent)
            if file.resolve() in known:
                raise UsageError(f"--animate {file} is given twice; name each moving picture once")
            known.add(file.resolve())

    def save(self, frames: Sequence[Image]) -> list[Path]:
        """Write all of them; returns where they are."""
        for file in self.files:
            write_atomically(file, partial(self._dump, file=file, frames=frames), replace=self.overwrite)
        return self.files

    def _dump(self, stream: BinaryIO, file: Path, frames: Sequence[Image]) -> None:
        suffix, duration = file.suffix.lower(), round(1000 / self.fps)
        if suffix == ".mp4":
            stream.write(_mp4(frames, self.fps))
            return
        first, *rest = frames
        shared = {"save_all": True, "append_images": rest, "duration": duration, "loop": 0}
        if suffix == ".gif":
            first.save(stream, format="GIF", disposal=1, **shared)
        else:
            first.save(stream, format="WEBP", quality=90, method=4, **shared)


def _mp4(frames: Sequence[Image], fps: float) -> bytes:
    """H.264 in 4:2:0, which every player knows. UnclipError: ffmpeg fails."""
    import imageio.v2 as imageio
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frames.mp4"
        try:
            options = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2, "quality": 8}
            writer: Any
            with imageio.get_writer(file, format="FFMPEG", fps=fps, **options) as writer:  # type: ignore[arg-type]
                for frame in frames:
                    writer.append_data(np.asarray(frame))
            return file.read_bytes()
        except (OSError, RuntimeError) as error:
            raise UnclipError(f"ffmpeg could not write an MP4: {str(error).strip().splitlines()[-1]}") from error
