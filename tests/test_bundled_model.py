"""The model that comes with the package: whole, small, at work offline, and drawing what it is asked for."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps

import unclip
from unclip import UnCLIP
from unclip.bundle import BUNDLED, read_manifest, resolve_model

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
EDGE, COLUMNS = 32, 8
# Unlike each other in colour or shape; eleven of the twelve must be recognised.
ASKED = (
    "pizza", "red apple", "banana", "watermelon", "broccoli", "rainbow",
    "sunflower", "penguin", "frog", "basketball", "balloon", "soccer ball",
)  # fmt: skip
ENOUGH = 11
BLUE, PINK, GREY, GREEN = (60, 115, 220), (252, 165, 200), (160, 160, 160), (70, 165, 85)
# Prompt -> its background, and what stands there from left to right; five of the six must be right. In training no red
# apple was on blue.
SCENES: dict[str, tuple[tuple[int, int, int], list[str]]] = {
    "two red apples side by side on a blue background": (BLUE, ["red apple", "red apple"]),
    "two frogs side by side on a pink background": (PINK, ["frog", "frog"]),
    "a balloon right of a frog on a pink background": (PINK, ["frog", "balloon"]),
    "three bananas in a row on a grey background": (GREY, ["banana"] * 3),
    "a cactus right of a sunflower on a blue background": (BLUE, ["sunflower", "cactus"]),
    "a mushroom left of a soccer ball on a green background": (GREEN, ["mushroom", "soccer ball"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = resolve_model(BUNDLED)
    assert folder.is_relative_to(Path(unclip.__file__).parent)
    return folder


@pytest.fixture(scope="module")
def references() -> dict[str, np.ndarray]:
    """Name -> thumbnail (32, 32, 3), floats in [0, 255]."""
    with Image.open(DATA / "emoji_thumbnails.png") as picture:
        sheet = np.asarray(picture.convert("RGB")).astype(float)
    names = (DATA / "emoji_thumbnails.txt").read_text(encoding="utf-8").split("\n")[:-1]
    cells = {}
    for index, name in enumerate(names):
        top, left = index // COLUMNS * EDGE, index % COLUMNS * EDGE
        cells[name] = sheet[top : top + EDGE, left : left + EDGE]
    return cells


def nearest(image: Image.Image, references: dict[str, np.ndarray]) -> str:
    """The name of the thumbnail with the least mean squared error."""
    small = np.asarray(image.resize((EDGE, EDGE), Image.Resampling.BOX)).astype(float)
    return min(references, key=lambda name: float(((references[name] - small) ** 2).mean()))


def test_the_references_are_whole(references: dict[str, np.ndarray]) -> None:
    assert len(references) == 40 and set(ASKED) <= set(references)
    for name, cell in references.items():
        assert nearest(Image.fromarray(cell.astype(np.uint8)), references) == name


def test_the_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    known = manifest["example_prompts"]
    assert list(manifest["parts"]) == ["clip", "prior", "decoder", "upsampler_256", "upsampler_1024", "pca"]
    assert len(known) >= 300 and len(set(known)) == len(known)
    assert "pizza" in known
    assert set(ASKED) <= set(known)


def test_it_is_small_and_holds_no_pickle(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    assert sum(sizes.values()) <= 46e6, sizes
    assert max(sizes.values()) <= 16 * 2**20, sizes
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".gz", ".md"}


def test_it_draws_offline(folder: Path, references: dict[str, np.ndarray], tmp_path: Path) -> None:
    """As a process with an empty home and the Hub switched off."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "unclip", "sample", "--prompt", "pizza", "--size", "64", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert (record["width"], record["prompt"]) == (64, "pizza")
    with Image.open(tmp_path / record["path"]) as image:
        assert nearest(image.convert("RGB"), references) == "pizza"


def test_it_draws_what_it_is_asked_for(folder: Path, references: dict[str, np.ndarray]) -> None:
    model = UnCLIP.from_pretrained(device="cpu", size=64)
    images = model.sample(ASKED, size=64)
    drawn = {name: nearest(image, references) for name, image in zip(ASKED, images, strict=True)}
    right = [name for name, seen in drawn.items() if name == seen]
    assert len(right) >= ENOUGH, drawn


def pieces(image: Image.Image, background: tuple[int, int, int]) -> list[Image.Image]:
    """What stands on a background from left to right, cut out and laid on white; nothing is above anything else."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    drawn = np.abs(pixels - background).max(axis=2) > 70
    columns = [*np.flatnonzero(drawn.sum(axis=0) > 2), 10**6]
    starts = [index for index, (a, b) in enumerate(zip([-9, *columns], columns, strict=False)) if b - a > 2]
    found = []
    for first, last in pairwise(starts):
        left, right = columns[first], columns[last - 1] + 1
        rows = np.flatnonzero(drawn[:, left:right].any(axis=1))
        top, edge = rows[0], max(right - left, rows[-1] + 1 - rows[0])
        cut = Image.new("RGB", (edge, edge), "white")
        box = (left, top, right, rows[-1] + 1)
        mask = Image.fromarray((drawn * 255).astype(np.uint8)).crop(box)
        cut.paste(image.convert("RGB").crop(box), ((edge - mask.width) // 2, (edge - mask.height) // 2), mask)
        found.append(cut)
    return found


def test_the_pieces_of_a_picture_are_found(references: dict[str, np.ndarray]) -> None:
    for background, names in SCENES.values():
        picture = Image.new("RGB", (32 * 4, 64), background)
        for place, name in enumerate(names):
            thing = Image.fromarray(references[name].astype(np.uint8))
            mask = Image.fromarray(((references[name].min(axis=2) < 250) * 255).astype(np.uint8))
            picture.paste(thing, (2 + 42 * place, 16), mask)
        assert [nearest(piece, references) for piece in pieces(picture, background)] == names


def test_it_draws_scenes(folder: Path, references: dict[str, np.ndarray]) -> None:
    model = UnCLIP.from_pretrained(device="cpu", size=64)
    drawn = {}
    for (prompt, (background, _)), image in zip(SCENES.items(), model.sample(list(SCENES), size=64), strict=True):
        rim = np.median(np.asarray(image.convert("RGB"))[[0, -1]].reshape(-1, 3), axis=0)
        assert np.abs(rim - background).max() < 25, prompt
        drawn[prompt] = [nearest(piece, references) for piece in pieces(image, background)]
    assert sum(drawn[prompt] == names for prompt, (_, names) in SCENES.items()) >= len(SCENES) - 1, drawn


def line_drawing(image: Image.Image) -> Image.Image:
    """Black lines on white where a channel changes by more than a tenth."""
    edges = [channel.filter(ImageFilter.FIND_EDGES) for channel in image.split()]
    strongest = ImageChops.lighter(ImageChops.lighter(edges[0], edges[1]), edges[2])
    lines = strongest.point(lambda value: min(255, 4 * max(0, value - 25))).filter(ImageFilter.MaxFilter(5))
    return ImageOps.expand(ImageOps.invert(ImageOps.crop(lines, 8)), 8, "white").convert("RGB")


# How a picture is shown in another way, and how many of the twelve things must be known again.
ELSEWHERE: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "turned": (lambda image: image.rotate(20, Image.Resampling.BICUBIC, fillcolor="white"), 11),
    "blurred": (lambda image: image.filter(ImageFilter.GaussianBlur(5)), 11),
    "other colours": (lambda image: Image.merge("RGB", image.split()[::-1]), 11),
    "line drawing": (line_drawing, 8),
}


def test_variations_of_pictures_from_elsewhere_are_of_the_same_thing(
    folder: Path, references: dict[str, np.ndarray]
) -> None:
    model = UnCLIP.from_pretrained(device="cpu", size=256)
    shown = [ImageOps.expand(image, 24, "white") for image in model.sample(ASKED, size=256)]
    for style, (change, enough) in ELSEWHERE.items():
        embeddings = model.embed_image([change(image) for image in shown])
        images = model.decode(embeddings, size=64)
        drawn = {name: nearest(image, references) for name, image in zip(ASKED, images, strict=True)}
        assert sum(name == seen for name, seen in drawn.items()) >= enough, (style, drawn)


def test_it_makes_1024_px(folder: Path, references: dict[str, np.ndarray]) -> None:
    model = UnCLIP.from_pretrained(device="cpu")
    assert model.sizes == (64, 256, 1024)
    small, large = (model.sample("pizza", size=size, output="tensor") for size in (64, 1024))
    assert large.shape == (1, 3, 1024, 1024)
    shrunk = torch.nn.functional.interpolate(large, (64, 64), mode="area")
    assert float((shrunk - small).abs().mean()) < 0.1  # the upsamplers keep what the decoder drew


def test_the_docstring_examples_run(folder: Path) -> None:
    runner = doctest.DocTestRunner()
    found = [test for test in doctest.DocTestFinder().find(UnCLIP, "UnCLIP") if test.examples]
    for test in found:
        runner.run(test)
    assert found and runner.failures == 0 and runner.tries >= 5
