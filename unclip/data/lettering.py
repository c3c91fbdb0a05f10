"""Words on pictures: a paper label stuck onto one, and sheets of pictures with their rows and columns named."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from unclip.errors import TOLD, UnclipError, UsageError

_EDGE = 256
"""Pictures smaller than this are enlarged before they are written on, so that letters stay letters."""
_SMALLEST = 8
"""Height in pixels below which letters cannot be read."""
_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs")
"""Categories of what leaves no ink: spaces, controls, joiners, halves of characters."""
_INK, _PAPER, _FRAME = (20, 20, 20), (255, 255, 255), (150, 150, 150)


def load_font(size: float, file: Path | None = None) -> Any:
    """Pillow's own font, which has Latin letters, or a TrueType or OpenType file's. UnclipError: not a font."""
    if file is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(str(file), size)
    except OSError as error:
        raise UnclipError(f"the font {file} cannot be read: {error}; expected a TrueType or OpenType file") from error


def check_letters(text: str, font: Path | None = None) -> None:
    """UsageError: letters that a font cannot draw, all of which would be the same box (or nothing).

    A font draws those as its glyph .notdef, the one of a code point that never is a character.
    """
    letters = load_font(32, font)
    nothing = _drawn("\U0010ffff", letters)
    seen = dict.fromkeys(one for one in text if unicodedata.category(one) not in _UNSEEN)
    missing = [repr(one) for one in seen if _drawn(one, letters) == nothing]
    if missing:
        more = f" and {len(missing) - TOLD} more" if len(missing) > TOLD else ""
        name = "Pillow's own font" if font is None else f"the font {font}"
        raise UsageError(
            f"{name} has no letters for {', '.join(missing[:TOLD])}{more}; name one that has with --font (font=)"
        )


def _drawn(letter: str, letters: Any) -> tuple[Any, bytes]:
    mask = letters.getmask(letter)
    return mask.size, bytes(mask)


def stick_label(
    image: Image.Image, text: str, *, width: float = 0.7, height: float = 0.5, font: Path | None = None
) -> Image.Image:
    """A copy of the picture with a white paper label across it that says `text`, as large as `width` of the picture's
    width lets it be.

    `height` is where the label's middle lies, 0 (the top edge) to 1. A picture whose shorter edge is below 256 px is
    enlarged to that first. Raises UsageError: no text, letters that the font has not, a number outside
    (0, 1], a text too long to be read.
    """
    if not text.strip():
        raise UsageError("the text to stick on is empty; name what CLIP is to be made to see, such as 'pizza'")
    check_letters(text, font)
    if not 0 < width <= 1 or not 0 <= height <= 1:
        raise UsageError(f"the label's width {width:g} and height {height:g} are shares of the picture, from 0 to 1")
    scale = max(1.0, _EDGE / min(image.size))
    edges = (round(image.width * scale), round(image.height * scale))
    picture = (image.resize(edges, Image.Resampling.BICUBIC) if scale > 1 else image.copy()).convert("RGB")
    room = width * picture.width
    size = _fitting(text, room * 0.9, 0.4 * picture.height, font)
    if size < _SMALLEST:
        raise UsageError(f"the text of {len(text)} letters is too long to be read on this picture; shorten it")
    draw, letters = ImageDraw.Draw(picture), load_font(size, font)
    box = draw.textbbox((0, 0), text, font=letters, anchor="mm")
    pad = 0.3 * size
    half = ((box[2] - box[0]) / 2 + pad, (box[3] - box[1]) / 2 + pad)
    x = picture.width / 2
    y = min(max(height * picture.height, half[1]), picture.height - half[1])
    frame = (x - half[0], y - half[1], x + half[0], y + half[1])
    draw.rounded_rectangle(frame, radius=pad / 2, fill=_PAPER, outline=_FRAME, width=max(1, round(size / 16)))
    draw.text((x, y - (box[1] + box[3]) / 2), text, font=letters, fill=_INK, anchor="mm")
    return picture


def labelled_sheet(
    rows: Sequence[Sequence[Image.Image | str | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    *,
    gap: int = 4,
) -> Image.Image:
    """Pictures row by row on white in cells as large as the largest, with the rows' names at the left and the columns'
    above. A cell may also be text (several lines of it), or None for an empty one.
    """
    pictures = [cell for row in rows for cell in row if isinstance(cell, Image.Image)]
    if not pictures:
        raise ValueError("a sheet needs at least one picture")
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = max(len(row) for row in rows)
    letters = load_font(max(10, min(width, height) / 12))
    left = 0 if row_labels is None else round(max(_extent(label, letters)[0] for label in row_labels)) + 2 * gap
    top = 0 if column_labels is None else round(max(_extent(label, letters)[1] for label in column_labels)) + 2 * gap
    size = (left + columns * (width + gap) - gap, top + len(rows) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, label in enumerate(column_labels or ()):
        place = (left + number * (width + gap) + width / 2, top / 2)
        draw.text(place, label, font=letters, fill=_INK, anchor="mm", align="center")
    for number, row in enumerate(rows):
        y = top + number * (height + gap)
        if row_labels is not None:
            draw.text((gap, y + height / 2), row_labels[number], font=letters, fill=_INK, anchor="lm")
        for column, cell in enumerate(row):
            x = left + column * (width + gap)
            if isinstance(cell, Image.Image):
                sheet.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
            elif cell:
                draw.text((x + width / 2, y + height / 2), cell, font=letters, fill=_INK, anchor="mm", align="center")
    return sheet


def _fitting(text: str, width: float, height: float, font: Path | None) -> float:
    """The largest size at which a line is no wider and no higher than this: extents grow in proportion to it."""
    reference = 100
    wide, high = _extent(text, load_font(reference, font))
    return min(width / max(wide, 1), height / max(high, 1)) * reference


def _extent(text: str, letters: Any) -> tuple[float, float]:
    """Width and height of text in pixels, of several lines or one."""
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    box = draw.textbbox((0, 0), text, font=letters)
    return box[2] - box[0], box[3] - box[1]
