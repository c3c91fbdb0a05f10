"""Image files and bytes become tensors, and tensors become pictures again.

Everything ends in 8-bit RGB: alpha is laid on white, 16-bit values are scaled, EXIF orientation is applied.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unclip.errors import UnclipError, UsageError

# Pillow opens far more, among them EPS, for which it starts Ghostscript: a picture must not run a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")


class Unwanted(Exception):
    """The configuration leaves this sample out; the message is the reason it is counted under."""


class ImageError(UnclipError):
    """Bytes or a file that cannot be read as an image; the message is one sentence that names it."""


def decode_image(
    source: bytes | str | Path,
    name: str | None = None,
    min_edge: int | None = None,
    check: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Decode an encoded image (bytes) or an image file (path) to RGB, the first frame of an animated one.

    `name` stands for the picture in error messages (default: the path). `min_edge` lets a JPEG be decoded at
    a reduced resolution, both edges still at least that many pixels, which is several times faster. `check` is
    called with width and height before anything is decoded, and may raise.
    Raises ImageError: no such file, not an image, truncated, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return to_rgb(decode_raw(source, name, min_edge, check))


def decode_raw(
    source: bytes | str | Path,
    name: str | None = None,
    min_edge: int | None = None,
    check: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """`decode_image` without the way to RGB: the picture in the mode and with the alpha channel that it has."""
    file: io.BytesIO | Path
    if isinstance(source, bytes):
        label, file = name or "the image", io.BytesIO(source)
        if not source:
            raise ImageError(f"{label} is empty")
    else:
        label, file = name or str(source), Path(source)
        if not file.is_file():
            folder = f"{source} is a folder, expected an image file"
            raise ImageError(folder if file.is_dir() else f"there is no image file at {source}")
    try:
        with Image.open(file, formats=_known_formats()) as image:
            _refuse_bomb(image, label)
            if check is not None:
                check(image.width, image.height)
            if min_edge is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, (min_edge, min_edge))
            image.load()
            return _upright(image)
    except (ImageError, Unwanted):
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{label} is not an image in a format that is read here ({_format_list()})"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{label} is refused as a possible decompression bomb: {error}") from error
    except Exception as error:  # a damaged file can raise nearly anything inside a Pillow plugin
        reason = str(error) or type(error).__name__
        raise ImageError(f"{label} cannot be decoded as an image: {reason}") from error


def load_image(path: str | Path) -> Image.Image:
    """Read the image file at `path` as an RGB picture, for the command line. Raises ImageError."""
    return decode_image(Path(path).expanduser())


def picture_of(given: object) -> Image.Image:
    """What a caller calls a picture, as an upright RGB one: a path, a PIL image, or 8 bits as an array (H, W),
    (H, W, 3) or (H, W, 4). Raises ImageError: a file that cannot be read; UsageError: anything else.
    """
    if isinstance(given, (str, Path)):
        return load_image(given)
    if isinstance(given, Image.Image):
        return to_rgb(_upright(given))
    if isinstance(given, np.ndarray):
        known = given.dtype == np.uint8 and given.ndim in (2, 3) and given.shape[2:] in ((), (3,), (4,))
        if not known or not given.size:
            raise UsageError(
                f"an image array of {given.dtype} and shape {given.shape}; expected 8 bits and (H, W, 3), (H, W, 4) or "
                "(H, W)"
            )
        return to_rgb(Image.fromarray(given))
    raise UsageError(f"an image of type {type(given).__name__}; expected a path, a PIL image, an array or a tensor")


def checked_pixels(images: Tensor) -> Tensor:
    """Pictures as a tensor of any shape: floats in [-1, 1], or 8 bits, which are scaled to these. UsageError: other
    numbers.
    """
    if images.dtype == torch.uint8:
        return to_float(images)
    if not images.is_floating_point():
        raise UsageError(f"an image tensor of {images.dtype}; expected floats in [-1, 1], or 8 bits (torch.uint8)")
    largest = float(images.detach().abs().max()) if images.numel() else 0.0
    if not largest <= 2:  # NaN as well; a little beyond 1 is what resizing leaves
        raise UsageError(
            f"an image tensor with values up to {largest:g}; expected floats in [-1, 1] (0..255 become so by "
            "x / 127.5 - 1), or 8 bits (torch.uint8)"
        )
    return images.float()


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to `size` pixels with an antialiased Lanczos filter, and cut out the centre.

    Returns uint8 (3, size, size).
    """
    width, height = image.size
    if (width, height) != (size, size):
        edge = min(width, height)
        left, top = (width - edge) / 2, (height - edge) / 2
        # Resizing only the centre square amounts to cropping afterwards, but keeps a 1 x 10000 strip cheap.
        box = (left, top, left + edge, top + edge)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    array = np.array(image.convert("RGB"), dtype=np.uint8)  # (size, size, 3)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Like `to_pixels`, as float32 (3, size, size) in [-1, 1]."""
    return to_float(to_pixels(image, size))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 of any shape → float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_pil(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] → 8-bit picture, clamped and rounded to nearest. Inverse of `to_tensor`."""
    if tensor.dim() != 3 or tensor.shape[0] != 3:
        raise ValueError(f"expected a tensor of shape (3, H, W), got {tuple(tensor.shape)}")
    pixels = tensor.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def make_grid(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Lay pictures out row by row on white, `gap` pixels apart, in cells as large as the largest."""
    if not images or columns < 1:
        raise ValueError("a grid needs at least one image and one column")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(i.width for i in images), max(i.height for i in images)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + gap), row * (height + gap)))
    return grid


def _known_formats() -> list[str]:
    """The accepted formats that this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _format_list() -> str:
    return ", ".join(_known_formats())


def _refuse_bomb(image: Image.Image, label: str) -> None:
    """Pillow only warns between one and two times its limit; a training set has no use for such a picture."""
    limit = Image.MAX_IMAGE_PIXELS
    pixels = image.width * image.height
    if limit is not None and pixels > limit:
        raise ImageError(
            f"{label} is refused as a possible decompression bomb: "
            f"{image.width} x {image.height} is over the limit of {limit} pixels"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF data do not make a good picture bad."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit greyscale by 255/65535, floating point from [0, 1]; `Image.convert` would clip both."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    full = 65535.0
    if image.mode == "F":
        largest = values.max(initial=0.0)
        full = 1.0 if largest <= 1 else 255.0 if largest <= 255 else 65535.0
    grey = np.rint(np.clip(values / full, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
