"""Drawing scenes: emoji placed on a grid of 32 units, from their vectors, at any size; and tars of what was drawn."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from prepare import _add, _draw

GRID = 32
BACKGROUNDS = {
    "white": (255, 255, 255), "grey": (160, 160, 160), "black": (24, 24, 24), "red": (214, 48, 49),
    "orange": (250, 145, 40), "yellow": (255, 221, 60), "green": (70, 165, 85), "blue": (60, 115, 220),
    "purple": (140, 85, 190), "pink": (252, 165, 200),
}  # fmt: skip
Colour = tuple[int, int, int]
Box = tuple[int, int, int]


@lru_cache(maxsize=4096)
def piece(svg: str, edge: int) -> Image.Image:
    """One emoji, centred in a transparent square of `edge` pixels. Raises ValueError for a broken drawing."""
    drawn = _draw(Path(svg), width=edge)
    if drawn.height > edge:
        drawn = _draw(Path(svg), height=edge)
    drawn.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    if drawn.getchannel("A").getbbox() is None:
        raise ValueError("it draws nothing")
    canvas = Image.new("RGBA", (edge, edge), (0, 0, 0, 0))
    canvas.paste(drawn, ((edge - drawn.width) // 2, (edge - drawn.height) // 2))
    return canvas


def visible(drawn: Image.Image, background: Colour) -> bool:
    """Whether enough of a drawing stands out from a background."""
    rgba = np.asarray(drawn, np.float32) / 255
    distance = np.abs(rgba[..., :3] - np.asarray(background, np.float32) / 255).max(-1)
    weight = rgba[..., 3]
    return bool((weight * (distance > 0.3)).sum() / max(weight.sum(), 1e-6) > 0.5)


def draw_scene(boxes: Sequence[tuple[str, Box]], background: Colour, size: int) -> Image.Image:
    """(SVG, (left, top, edge)) pairs on a plain background, as an RGB picture of `size` pixels."""
    if size % GRID:
        return _draw_vectors(boxes, background, size)
    unit = size // GRID
    canvas = Image.new("RGB", (size, size), background)
    for svg, (left, top, edge) in boxes:
        drawn = piece(svg, edge * unit)
        canvas.paste(drawn, (left * unit, top * unit), drawn)
    return canvas


def _draw_vectors(boxes: Sequence[tuple[str, Box]], background: Colour, size: int) -> Image.Image:
    """The same where the grid does not fall on pixels: one SVG holds the others, and the renderer does the rest."""
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {GRID} {GRID}">'
             f'<rect width="{GRID}" height="{GRID}" fill="rgb{background}"/>']  # fmt: skip
    for svg, (left, top, edge) in boxes:
        data = base64.b64encode(Path(svg).read_bytes()).decode()
        parts.append(f'<image x="{left}" y="{top}" width="{edge}" height="{edge}" '
                     f'href="data:image/svg+xml;base64,{data}"/>')  # fmt: skip
    png = resvg_py.svg_to_bytes(svg_string="".join(parts) + "</svg>", skip_system_fonts=True, width=size)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, dict[str, Any]]]) -> None:
    """A webdataset tar of (key, PNG, truth); it appears under its name only when it is whole."""
    part = path.with_name(f".{path.name}.part")
    with tarfile.open(part, "w") as tar:
        for key, png, meta in samples:
            _add(tar, f"{key}.png", png)
            _add(tar, f"{key}.txt", meta["caption"].encode())
            _add(tar, f"{key}.json", json.dumps(meta, ensure_ascii=False).encode())
    part.replace(path)
