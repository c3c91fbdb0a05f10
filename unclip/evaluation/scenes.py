"""What does a picture of drawn shapes show? Its colours, shapes, sizes, number and places, found from the pixels alone
and compared with what a caption of unclip.data.synthetic asks for.

The background is the named colour nearest to the picture's rim. What differs from it falls into connected pieces; each
is told by its colour, by the outline that fits it best, by its extent and by its centre.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from unclip.data.synthetic import BACKGROUNDS, COLOURS, KINDS, PLACES, RADII
from unclip.errors import UsageError

ASPECTS = ("colour", "shape", "size", "count", "position", "background")
SMALLEST = 0.004  # of the picture: what is smaller is a speck and no object
_TEMPLATE = 48
_REACH = 1.12  # of a template, in radii: no shape goes farther


@dataclass(frozen=True)
class Thing:
    """An object that a caption names, or one that was found; then `x`, `y` and `radius` are in units of the edge."""

    colour: str
    kind: str
    size: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.0


@dataclass(frozen=True)
class Expected:
    """What a caption says: objects in their order, where they are, and the background."""

    things: tuple[Thing, ...]
    relation: str
    background: str


@dataclass(frozen=True)
class Seen:
    """What a picture shows; objects in reading order of the axis on which they spread."""

    things: tuple[Thing, ...]
    background: str


@dataclass(frozen=True)
class Verdict:
    """Which of a caption's statements hold. Colours, shapes and sizes are those of the objects in their order, and are
    wrong where their number is.
    """

    colour: bool
    shape: bool
    size: bool
    count: bool
    position: bool
    background: bool

    @property
    def right(self) -> bool:
        return all(getattr(self, aspect) for aspect in ASPECTS)


_OBJECT = rf"an? (?P<size>small|large) (?P<colour>{'|'.join(COLOURS)}) (?P<kind>{'|'.join(KINDS)})"
_GROUND = re.compile(rf"(?P<rest>.+) on an? (?P<background>{'|'.join(BACKGROUNDS)}) background")


def parse(caption: str) -> Expected:
    """A caption in the words of unclip.data.synthetic. UsageError: other words, or too many objects."""
    whole = _GROUND.fullmatch(" ".join(caption.lower().split()))
    rest = whole["rest"] if whole else ""
    relation = ""
    if whole:
        place = next((name for name in PLACES if rest.endswith(f" {name}")), "")
        relation = place or next((word for word in ("left of", "above") if f" {word} " in rest), "")
        rest = rest.removesuffix(f" {place}") if place else rest
    parts = rest.split(f" {relation} ") if relation in ("left of", "above") else [rest]
    found = [re.fullmatch(_OBJECT, part) for part in parts]
    if whole is None or len(parts) > max(RADII) or not all(found):
        raise UsageError(
            f"{caption!r} is no caption of a drawn scene; expected words such as 'a small red circle at the top on a "
            "white background' or 'a large blue star left of a small pink ring on a grey background'"
        )
    things = tuple(Thing(one["colour"], one["kind"], one["size"]) for one in found if one is not None)
    return Expected(things, relation or "in the centre", whole["background"])


def see(picture: np.ndarray) -> Seen:
    """uint8 (H, W, 3), 32 px or more -> what it shows."""
    from scipy import ndimage

    if picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < 32:
        raise UsageError(f"a picture of shape {picture.shape}; expected (height, width, 3) of 32 px or more")
    image = picture.astype(np.float32)
    edge = image.shape[0]
    rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(rim, axis=0)
    background = nearest(ground, BACKGROUNDS)
    # Half of the way to the nearest colour that an object may have is where one begins.
    away = np.linalg.norm(image - ground, axis=2)
    nearest_other = min(
        float(np.linalg.norm(np.subtract(rgb, ground))) for name, rgb in COLOURS.items() if name != background
    )
    mask = away > min(0.5 * nearest_other, 60.0)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    things = []
    for number in range(1, count + 1):
        piece = labels == number
        if piece.sum() >= SMALLEST * edge * edge:
            things.append(_told(image, piece, ground, background))
    radii = RADII[min(max(len(things), 1), max(RADII))]
    limit = (radii["small"] * radii["large"]) ** 0.5
    sized = [
        Thing(one.colour, one.kind, "large" if one.radius > limit else "small", one.x, one.y, one.radius)
        for one in things
    ]
    spread = [np.ptp([one.x for one in sized]) if sized else 0, np.ptp([one.y for one in sized]) if sized else 0]
    sized.sort(key=lambda one: one.x if spread[0] >= spread[1] else one.y)
    return Seen(tuple(sized), background)


def judge(expected: Expected, seen: Seen) -> Verdict:
    """Statement by statement; positions by the place, or by the order along the axis that the caption names."""
    things = seen.things
    count = len(things) == len(expected.things)
    pairs = list(zip(expected.things, things, strict=True)) if count else []
    return Verdict(
        colour=count and all(want.colour == got.colour for want, got in pairs),
        shape=count and all(want.kind == got.kind for want, got in pairs),
        size=count and all(want.size == got.size for want, got in pairs),
        count=count,
        position=count and _placed(expected, things),
        background=expected.background == seen.background,
    )


def check(caption: str, picture: np.ndarray) -> Verdict:
    """Whether a picture shows what a caption asks for."""
    return judge(parse(caption), see(picture))


def nearest(rgb: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the colour nearest to `rgb` (3,), by squared difference."""
    return min(names, key=lambda name: float(np.square(np.subtract(rgb, names[name])).sum()))


def _placed(expected: Expected, things: tuple[Thing, ...]) -> bool:
    if expected.relation in PLACES:
        one = things[0]
        found = min(PLACES, key=lambda name: (one.x - PLACES[name][0]) ** 2 + (one.y - PLACES[name][1]) ** 2)
        return found == expected.relation
    sideways = expected.relation == "left of"
    along = [one.x if sideways else one.y for one in things]
    across = [one.y if sideways else one.x for one in things]
    # `see` has put them in order of the axis on which they spread more, so that this must be the caption's.
    return np.ptp(along) > np.ptp(across) and along == sorted(along)


def _told(image: np.ndarray, piece: np.ndarray, ground: np.ndarray, background: str) -> Thing:
    """One connected piece: colour, kind, centre and radius; `size` is settled when the number of objects is known."""
    from scipy import ndimage

    edge = image.shape[0]
    core = ndimage.binary_erosion(piece)
    colours = {name: rgb for name, rgb in COLOURS.items() if name != background}
    colour = nearest(np.median(image[core if core.sum() >= 4 else piece], axis=0), colours)
    # How much of each pixel is covered, from its place between the background's colour and the object's.
    line = np.subtract(np.median(image[core if core.sum() >= 4 else piece], axis=0), ground)
    cover = np.clip((image - ground) @ line / float(line @ line), 0, 1) * ndimage.binary_dilation(piece)
    rows, columns = (np.flatnonzero(piece.any(axis)) for axis in (1, 0))
    # The ends of the shape lie within the rims' pixels by as much as those are covered.
    top, bottom = _ends(cover.max(1), rows)
    left, right = _ends(cover.max(0), columns)
    found = _stretched(cover, left, right, top, bottom)
    kind = max(KINDS, key=lambda name: _overlap(found, _template(name)))
    x0, x1, y0, y1 = extent(kind)
    radius = ((right - left) / (x1 - x0) + (bottom - top) / (y1 - y0)) / 2
    x = (left + right) / 2 - radius * (x0 + x1) / 2
    y = (top + bottom) / 2 - radius * (y0 + y1) / 2
    return Thing(colour, kind, "", x / edge, y / edge, radius / edge)


def _ends(profile: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Where a piece begins and ends in pixels, given the largest cover of each row, and the rows that belong to it."""
    first, last = int(inside[0]), int(inside[-1])
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first + 1 - float(profile[first] + before), last + float(profile[last] + after)


@cache
def extent(kind: str) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a shape around its centre, in radii."""
    axis = np.linspace(-_REACH, _REACH, 1001, dtype=np.float32)
    inside = KINDS[kind](axis[None], axis[:, None]) <= 0
    rows, columns = (np.flatnonzero(inside.any(which)) for which in (1, 0))
    return float(axis[columns[0]]), float(axis[columns[-1]]), float(axis[rows[0]]), float(axis[rows[-1]])


@cache
def _template(kind: str) -> np.ndarray:
    """Which of _TEMPLATE² points, spread over the shape's own extent, it covers; float32."""
    x0, x1, y0, y1 = extent(kind)
    steps = (np.arange(_TEMPLATE, dtype=np.float32) + 0.5) / _TEMPLATE
    covered = KINDS[kind]((x0 + steps * (x1 - x0))[None], (y0 + steps * (y1 - y0))[:, None]) <= 0
    return covered.astype(np.float32)


def _stretched(cover: np.ndarray, left: float, right: float, top: float, bottom: float) -> np.ndarray:
    """What is covered at _TEMPLATE² points spread over a box, whose ends are in pixels."""
    from scipy import ndimage

    steps = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE
    # Pixel i covers i to i + 1, so that its value stands at i + 0.5.
    rows, columns = np.meshgrid(
        top + steps * (bottom - top) - 0.5, left + steps * (right - left) - 0.5, indexing="ij"
    )
    return np.asarray(ndimage.map_coordinates(cover, [rows, columns], order=1, mode="constant"))


def _overlap(found: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union of two covers."""
    return float(np.minimum(found, wanted).sum() / np.maximum(found, wanted).sum().clip(1e-6))
