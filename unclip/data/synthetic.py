"""Captioned shapes, drawn from signed distance functions: a data set of any length that needs no file.

A scene is fixed by (index, seed) and is the same picture at every resolution; only its sampling differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 40),
    "green": (50, 160, 70),
    "blue": (45, 90, 215),
    "purple": (140, 65, 180),
    "pink": (245, 130, 180),
    "black": (25, 25, 25),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (165, 165, 165),
    **{name: COLOURS[name] for name in ("yellow", "blue", "green", "pink", "black")},
}
# Radius of a shape in units of the edge, by the number of objects in the scene: they never overlap.
RADII = {
    1: {"small": 0.13, "large": 0.25},
    2: {"small": 0.11, "large": 0.205},
    3: {"small": 0.09, "large": 0.15},
}
# Places of a single object; x to the right and y downwards in units of the edge.
PLACES: dict[str, tuple[float, float]] = {
    "in the centre": (0.5, 0.5),
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
}


@dataclass(frozen=True)
class Shape:
    """One object: its words, and its centre and radius in units of the picture's edge."""

    colour: str
    kind: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def phrase(self) -> str:
        return f"{_article(self.size)} {self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background, and the sentence that describes them."""

    objects: tuple[Shape, ...]
    background: str
    caption: str


def scene(index: int, seed: int = 0, max_objects: int = 2) -> Scene:
    """The scene number `index` (≥ 0) of the data set `seed`, with one to `max_objects` (≤ 3) shapes."""
    if not 1 <= max_objects <= len(RADII):
        raise ValueError(f"max_objects must lie in 1..{len(RADII)}, got {max_objects}")
    rng = np.random.default_rng((seed, index))

    def choose(names: Iterable[str]) -> str:
        known = list(names)
        return known[int(rng.integers(len(known)))]

    count = int(rng.integers(1, max_objects + 1))
    background = choose(BACKGROUNDS)
    colours = [name for name in COLOURS if name != background]
    colours = [colours[i] for i in rng.permutation(len(colours))[:count]]
    kinds = [choose(KINDS) for _ in range(count)]
    sizes = [choose(("small", "large")) for _ in range(count)]
    if count == 1:
        place = choose(PLACES)
        centres = [PLACES[place]]
        relation = "" if place == "in the centre" else place
    else:
        horizontal = bool(rng.random() < 0.5)
        along = (np.arange(count) + 0.5) / count
        centres = [(float(a), 0.5) if horizontal else (0.5, float(a)) for a in along]
        relation = "left of" if horizontal else "above"
    objects = tuple(
        Shape(c, k, s, x, y, RADII[count][s])
        for c, k, s, (x, y) in zip(colours, kinds, sizes, centres, strict=True)
    )
    return Scene(objects, background, _caption(objects, background, relation))


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Draw a scene as uint8 (size, size, 3); edges are antialiased over one pixel at any size."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    picture = np.empty((size, size, 3), dtype=np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for shape in scene.objects:
        # Only the square around the shape is touched, with two pixels to spare for its soft edge.
        reach = shape.radius + 2 / size
        columns = slice(*np.searchsorted(axis, (shape.x - reach, shape.x + reach)))
        rows = slice(*np.searchsorted(axis, (shape.y - reach, shape.y + reach)))
        x = (axis[None, columns] - shape.x) / shape.radius
        y = (axis[rows, None] - shape.y) / shape.radius
        distance = KINDS[shape.kind](x, y) * np.float32(shape.radius * size)  # in pixels, negative inside
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        patch = picture[rows, columns]
        patch += cover * (np.array(COLOURS[shape.colour], dtype=np.float32) - patch)
    return np.rint(picture).astype(np.uint8)


def _caption(objects: tuple[Shape, ...], background: str, relation: str) -> str:
    ground = f"on {_article(background)} {background} background"
    if len(objects) == 1:
        return " ".join(filter(None, [objects[0].phrase, relation, ground]))
    return f"{f' {relation} '.join(shape.phrase for shape in objects)} {ground}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# Signed distances in units of the radius, for x of shape (1, W) and y of shape (H, 1), negative inside.
# The formulas are those of Inigo Quilez, "2D distance functions".


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.78) - 0.22


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.82, 0.82)


def _diamond(x: Array, y: Array) -> Array:
    s = np.float32(np.sqrt(0.5))
    return _box((x + y) * s, (x - y) * s, 0.7, 0.7)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _polygon(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """Exact distance to a closed polygon: nearest edge, and inside by the even-odd rule."""
    x, y = np.broadcast_arrays(x, y)
    squared = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - np.float32(ax), y - np.float32(ay)
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(squared, (px - ex * t) ** 2 + (py - ey * t) ** 2, out=squared)
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _corners(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """`count` corners around the origin from the top, their radii repeating `radii`."""
    angles = [2 * np.pi * i / count for i in range(count)]
    return [
        (radii[i % len(radii)] * np.sin(a), -radii[i % len(radii)] * np.cos(a)) for i, a in enumerate(angles)
    ]


_TRIANGLE = [(x, y + 0.2) for x, y in _corners(3, (1.08,))]
_STAR = _corners(10, (1.0, 0.45))


def _triangle(x: Array, y: Array) -> Array:
    return _polygon(x, y, _TRIANGLE)


def _star(x: Array, y: Array) -> Array:
    return _polygon(x, y, _STAR)


KINDS: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
}
