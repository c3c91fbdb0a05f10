"""The figures of docs/editing.md, drawn with the bundled model and fixed seeds."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw

CELL = 128


@cache
def _model():  # type: ignore[no-untyped-def]
    from unclip import UnCLIP

    return UnCLIP.from_pretrained(size=256)


def _drawn(prompt: str) -> Image.Image:
    return _model().sample(prompt, seed=0)[0]


def _sheet(rows: list[list[Image.Image]], heads: list[str], colours: int = 256) -> Image.Image:
    """Rows of pictures under one line of headings, each picture no larger than a cell."""
    gap, top = 4, 16
    width = len(heads) * (CELL + gap) - gap
    sheet = Image.new("RGB", (width, top + len(rows) * (CELL + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.text((column * (CELL + gap) + 2, 2), head, fill="black")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            small = picture.convert("RGB")
            small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            left, upper = j * (CELL + gap), top + i * (CELL + gap)
            sheet.paste(small, (left, upper))
            pen.rectangle((left, upper, left + small.width - 1, upper + small.height - 1), outline="#bbbbbb")
    return sheet.quantize(colours, dither=Image.Dither.NONE)


def masks() -> Image.Image:
    """One mask and what dilate and feather make of it; the same for grey: what is painted is mixed in by a half."""
    from unclip.masks import dilate, feather, read_mask

    model, source = _model(), _drawn("pizza")
    painted = Image.new("L", source.size, 0)
    ImageDraw.Draw(painted).ellipse((90, 30, 210, 150), fill=255)
    mask = read_mask(painted)
    treated = [mask, dilate(mask, 30), feather(mask, 30), mask / 2]
    results = [model.inpaint(source, one, "strawberry", size=256)[0] for one in treated]
    shown = [Image.fromarray((255 * one.numpy()).round().astype("uint8")) for one in treated]
    rows = [[source, *shown], [Image.new("RGB", source.size, "white"), *results]]
    return _sheet(rows, ["picture", "mask", "--dilate 30", "--feather 30", "grey"])


def inpainting() -> Image.Image:
    """A part erased, and painted anew: by the picture's own embedding, by its name, by another, and between."""
    model, rows = _model(), []
    for prompt, other, box in (
        ("pizza", "strawberry", (90, 30, 190, 120)),
        ("owl", "fox", (40, 60, 216, 150)),
        ("red apple", "green apple", (128, 0, 256, 256)),
    ):
        source = _drawn(prompt)
        mask = Image.new("L", source.size, 0)
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        erased = Image.composite(Image.new("RGB", source.size, "#888888"), source, mask)
        rows.append(
            [
                source,
                erased,
                model.inpaint(erased, mask)[0],
                model.inpaint(erased, mask, prompt)[0],
                model.inpaint(source, mask, other)[0],
                model.inpaint(source, mask, other, keep_embedding=0.5)[0],
            ]
        )
    return _sheet(rows, ["picture", "erased", "own embedding", "its name", "another", "half and half"])


def outpainting() -> Image.Image:
    """Cut pictures continued to the whole, and a wide canvas in frames."""
    model, rows = _model(), []
    for prompt in ("pizza", "owl", "cookie"):
        source = _drawn(prompt)
        upper, left = source.crop((0, 0, 256, 150)), source.crop((0, 0, 150, 256))
        wide = model.outpaint(source, "owl", right=192, frame=256, overlap=0.25)[0]
        rows.append(
            [
                upper,
                model.outpaint(upper, prompt, bottom=106)[0],
                model.outpaint(upper, bottom=106)[0],
                left,
                model.outpaint(left, prompt, right=106)[0],
                wide,
            ]
        )
    heads = ["cut", "--bottom, by name", "--bottom, unnamed", "cut", "--right, by name", "--right 192: owl"]
    return _sheet(rows, heads)


def strengths() -> Image.Image:
    """SDEdit over strength, each column one."""
    model, values, rows = _model(), (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0), []
    for source, prompt in (("fox", "wolf"), ("owl", "eagle"), ("pizza", "cookie")):
        picture = _drawn(source)
        rows.append([picture, *(model.edit(picture, prompt, strength=strength)[0] for strength in values)])
    return _sheet(rows, ["picture", *(f"{strength:g}" for strength in values)], colours=64)


def restoration() -> Image.Image:
    """A picture compressed hard and restored, a part of it enlarged."""
    from unclip import UnCLIP

    model = UnCLIP.from_pretrained()
    rows = []
    for prompt, box in (("strawberry", (420, 380, 676, 636)), ("owl", (330, 250, 586, 506))):
        source = model.sample(prompt, seed=0)[0]
        packed = io.BytesIO()
        source.save(packed, "JPEG", quality=8)
        compressed = Image.open(packed).convert("RGB")
        restored = model.restore(compressed, seed=0)[0]
        rows.append([source, compressed, restored, *(one.crop(box) for one in (source, compressed, restored))])
    return _sheet(rows, ["drawn", "JPEG, quality 8", "restored", "drawn", "JPEG, quality 8", "restored"])


FIGURES: dict[str, Callable[[], Image.Image]] = {
    "editing_masks": masks,
    "editing_inpainting": inpainting,
    "editing_outpainting": outpainting,
    "editing_strength": strengths,
    "editing_restoration": restoration,
}
