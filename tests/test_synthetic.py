"""The synthetic scenes: deterministic, the same picture at every resolution, and true to their captions."""

from __future__ import annotations

import numpy as np
import pytest

from unclip.data.synthetic import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, render, scene


def _one(kind: str, radius: float = 0.3) -> Scene:
    return Scene((Shape("blue", kind, "large", 0.5, 0.5, radius),), "white", "")


def _cover(kind: str, size: int = 400, radius: float = 0.3) -> float:
    """Area of the shape in units of radius², from how far pixels moved from white to the shape's colour."""
    picture = render(_one(kind, radius), size).astype(np.float64)
    moved = (255 - picture[..., 0]) / (255 - COLOURS["blue"][0])
    return float(moved.sum() / (size * radius) ** 2)


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("circle", np.pi),
        ("square", 1.64**2),
        ("diamond", 1.4**2),
        ("cross", 2 * 1.9 * 0.6 - 0.6**2),
        ("ring", np.pi * (1 - 0.56**2)),
        ("triangle", 3 * np.sqrt(3) / 4 * 1.08**2),
        ("star", 10 * 0.5 * 1.0 * 0.45 * np.sin(np.pi / 5)),
    ],
)
def test_area_is_the_closed_form(kind: str, area: float) -> None:
    assert _cover(kind) == pytest.approx(area, rel=2e-3)


@pytest.mark.parametrize("factor", [4, 16])
def test_same_scene_at_every_resolution(factor: int) -> None:
    for index in range(12):
        drawn = scene(index, max_objects=3)
        small = render(drawn, 64).astype(np.float64)
        large = render(drawn, 64 * factor).astype(np.float64)
        averaged = large.reshape(64, factor, 64, factor, 3).mean((1, 3))
        difference = np.abs(averaged - small)
        assert difference.mean() < 0.4  # grey levels of 255
        assert difference.max() < 70  # the tip of a star inside one pixel


def test_edges_are_crisp_at_any_resolution() -> None:
    for size in (64, 256, 1024):
        row = render(_one("square"), size)[size // 2, :, 0]
        edge = (row != 255) & (row != COLOURS["blue"][0])
        assert edge.sum() <= 4  # at most two soft pixels on each side


def test_scenes_are_deterministic_and_differ() -> None:
    assert scene(5, seed=1) == scene(5, seed=1)
    assert scene(5, seed=1) != scene(5, seed=2)
    assert len({scene(index).caption for index in range(300)}) > 200
    assert np.array_equal(render(scene(3), 64), render(scene(3), 64))


def test_caption_states_what_is_drawn() -> None:
    for index in range(200):
        drawn = scene(index, max_objects=3)
        for shape in drawn.objects:
            assert f"{shape.size} {shape.colour} {shape.kind}" in drawn.caption
            assert shape.x - shape.radius >= 0 and shape.x + shape.radius <= 1
            assert shape.y - shape.radius >= 0 and shape.y + shape.radius <= 1
        assert drawn.caption.endswith(f"{drawn.background} background")
        assert drawn.background not in {shape.colour for shape in drawn.objects}
        assert len({shape.colour for shape in drawn.objects}) == len(drawn.objects)
        xs, ys = [s.x for s in drawn.objects], [s.y for s in drawn.objects]
        if "left of" in drawn.caption:
            assert xs == sorted(set(xs))
        if " above " in drawn.caption:
            assert ys == sorted(set(ys))
        picture = render(drawn, 64)
        assert tuple(picture[0, 0]) == BACKGROUNDS[drawn.background]


def test_number_of_objects_is_bounded() -> None:
    for most in (1, 2, 3):
        assert {len(scene(index, max_objects=most).objects) for index in range(60)} == set(range(1, most + 1))
    with pytest.raises(ValueError, match=r"max_objects must lie in 1\.\.3, got 4"):
        scene(0, max_objects=4)


def test_every_kind_and_colour_appears() -> None:
    shapes = [shape for index in range(300) for shape in scene(index).objects]
    assert {shape.kind for shape in shapes} == set(KINDS)
    assert {shape.colour for shape in shapes} == set(COLOURS)


def test_captions_read_well() -> None:
    left = Shape("red", "circle", "small", 0.25, 0.5, 0.1)
    captions = {scene(index).caption for index in range(400)}
    assert left.phrase == "a small red circle"
    assert any(" left of a " in caption for caption in captions)
    assert any(caption.startswith("a large ") and " on the right on a" in caption for caption in captions)
    assert not any("a orange" in caption for caption in captions)
