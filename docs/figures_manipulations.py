"""The figures of docs/manipulations.md, drawn with the bundled model and fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from unclip.data.images import to_pil
from unclip.data.lettering import labelled_sheet

if TYPE_CHECKING:
    from unclip import Latents, UnCLIP

CELL, COLOURS, STEPS = 96, 200, 25
APPLE, PIZZA, BALL, STRAWBERRY = range(4)
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@cache
def model() -> UnCLIP:
    from unclip import UnCLIP

    return UnCLIP.from_pretrained(device="cpu", size=64)


@cache
def pictures() -> list[Image.Image]:
    """Four that the model was trained on: red apple, pizza, basketball, strawberry."""
    with Image.open(Path(__file__).parents[1] / "tests" / "data" / "emoji_64.png") as sheet:
        return [sheet.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(4)]


@cache
def latents() -> Latents:
    return model().encode(pictures(), steps=STEPS)


def cells(images: list[Image.Image] | Tensor) -> list[Image.Image]:
    drawn = [to_pil(image) for image in images] if isinstance(images, Tensor) else images
    return [image.resize((CELL, CELL), Image.Resampling.LANCZOS) for image in drawn]


def packed(sheet: Image.Image) -> Image.Image:
    """With a palette, which halves the file."""
    return sheet.quantize(COLOURS, dither=Image.Dither.NONE)


def reconstruction() -> Image.Image:
    """Pictures, what their latents give back, and what ending on the decoder's last x̂_0 would."""
    from unclip.diffusion import SeededNoise, ddim

    known, stage = latents(), model().decoder
    assert known.noise is not None
    with torch.inference_mode():
        steps = stage.process.steps(known.timesteps)
        last = ddim(stage.conditional(known.embedding), known.noise, steps, SeededNoise([0] * 4)).clamp(-1, 1)
    rows = [cells(pictures()), cells(model().reconstruct(known)), cells(last)]
    return packed(labelled_sheet(rows, ["picture", "from (z_i, x_T)", "its last x_0"]))


def eta() -> Image.Image:
    rows = []
    for row in (APPLE, PIZZA, BALL):
        one = latents()[row : row + 1]
        rows.append([cells(model().variations(one, eta=value, seed=1))[0] for value in ETAS])
    return packed(labelled_sheet(rows, None, [f"eta = {value:g}" for value in ETAS]))


def interpolation() -> Image.Image:
    from unclip import Prompt

    apple, pizza, ball = (latents()[i : i + 1] for i in (APPLE, PIZZA, BALL))
    rows = [
        cells(model().interpolate([apple, pizza], frames=7)),
        cells(model().interpolate([pictures()[APPLE], pictures()[PIZZA]], frames=7, noise="fixed")),
        cells(model().interpolate([ball, Prompt("fox")], frames=7)),
    ]
    return packed(labelled_sheet(rows, ["inverted", "fixed", "to 'fox'"]))


def text_diffs() -> Image.Image:
    asked = ((APPLE, "red apple", "green apple"), (BALL, "basketball", "soccer ball"), (STRAWBERRY, "", "grapes"))
    rows = [
        cells(model().text_diff(latents()[row : row + 1], text, base=base, max_theta=0.5, frames=6))
        for row, base, text in asked
    ]
    thetas = [f"theta {0.1 * i:.1f}" for i in range(6)]
    return packed(labelled_sheet(rows, [text for _, _, text in asked], thetas))


FIGURES: dict[str, Callable[[], Image.Image | None]] = {
    "manipulations_reconstruction": reconstruction,
    "manipulations_eta": eta,
    "manipulations_interpolation": interpolation,
    "manipulations_textdiff": text_diffs,
}
