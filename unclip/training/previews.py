"""What a run shows on the way: always the same samples, laid out with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.config import DataConfig
from unclip.data import build_batches, to_pil

_GAP, _MARGIN, _LINES = 4, 3, 4


def fixed_batch(data: DataConfig, count: int, seed: int = 0) -> dict[str, Any]:
    """`count` whole samples that are the same however often a run is continued: of those held out of training where
    there are any (`data.holdout`), else of the data's own."""
    sources = tuple(one.model_copy(update={"cache": None}) for one in data.sources)
    change: dict[str, Any] = {"crop_size": None, "cache": False, "workers": 0, "sources": sources}
    if data.holdout:
        change["part"] = "validation"
    return dict(next(build_batches(data.model_copy(update=change).unchanged(), batch_size=count, seed=seed)))


def captioned_grid(rows: Sequence[Tensor], captions: Sequence[str], cell: int = 112) -> Image.Image:
    """Rows of images (N, 3, H, W) in [-1, 1], one above the other, and the N captions below, each as wide as its
    column.

    Small images are enlarged by a whole factor, so that a column is `cell` pixels or wider.
    """
    height, width = rows[0].shape[-2:]
    scale = max(1, -(-cell // width))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(max(10, width // 11))
    texts = [_wrap(caption, font, width - 2 * _MARGIN) for caption in captions]
    line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 12
    below = line * max((len(text) for text in texts), default=0) + 2 * _MARGIN
    size = (len(captions) * (width + _GAP) - _GAP, len(rows) * (height + _GAP) + below)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for number, images in enumerate(rows):
        for column, image in enumerate(images):
            picture = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (column * (width + _GAP), number * (height + _GAP)))
    for column, text in enumerate(texts):
        for number, words in enumerate(text):
            place = (column * (width + _GAP) + _MARGIN, len(rows) * (height + _GAP) + _MARGIN + number * line)
            draw.text(place, words, fill="black", font=font)
    return grid


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """At most four lines of this width in pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > _LINES:
        lines = [*lines[:_LINES]]
        lines[-1] += " …"
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: Any, width: int) -> str:
    while len(line) > 1 and font.getlength(line) > width:
        line = line[:-2] + "…"
    return line
