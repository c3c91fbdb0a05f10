"""Is the subject there, and is the rest still what it was? Measures the runs of examples/personalise/train.sh.

    python examples/personalise/recover.py --runs runs/personalise [--sheet sheet.png]

Prints a table in Markdown: how far the pictures drawn of the subject are from those it was learned from (root mean
square to the nearest pose, in levels of 256), how like they are to CLIP, and how far pictures of the class and of other
things have moved from what the model drew before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from subject import pictures
from torch import Tensor

from unclip import UnCLIP
from unclip.data import to_pil
from unclip.data.lettering import labelled_sheet
from unclip.errors import UnclipError
from unclip.parts import image_pixels

SIZE, IMAGES = 64, 8
CLASS, OTHERS = ("red apple", "green apple"), ("pizza", "fox", "sunflower", "basketball")


@dataclass(frozen=True)
class Way:
    """A way to have the subject: what is loaded, and what is asked for; without a prompt its pictures' variations."""

    name: str
    prompt: str | None
    adapters: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


WAYS = (
    Way("before", "zorb apple"),
    Way("variations of the pictures", None),
    Way("textual inversion", "<zorb>", tokens=("token",)),
    Way("DreamBooth, without preservation", "zorb apple", ("prior_alone", "decoder_alone")),
    Way("DreamBooth", "zorb apple", ("prior", "decoder")),
    Way("the word, and DreamBooth's decoder", "<zorb>", ("decoder",), ("token",)),
)


@dataclass(frozen=True)
class Found:
    """Figures of a way, and its pictures (B, 3, S, S): of the subject, the class and other things."""

    distance: float
    cosine: float
    class_moved: float
    others_moved: float
    drawn: tuple[Tensor, Tensor, Tensor]


def recover(runs: Path, name: str = "emoji") -> dict[str, Found]:
    """Draw by every way, from the same seeds."""
    wanted = image_pixels(pictures(), SIZE)
    plain = UnCLIP.from_pretrained(name, size=SIZE)
    target = plain.embed_image(pictures())
    draw = partial(_draw, seed=1000)
    before = [draw(plain, prompts) for prompts in (CLASS, OTHERS)]
    found = {}
    for way in WAYS:
        model = UnCLIP.from_pretrained(
            name,
            size=SIZE,
            adapters=[runs / folder / "adapter" for folder in way.adapters],
            tokens=[runs / folder / "token.safetensors" for folder in way.tokens],
        )
        if way.prompt is None:
            drawn = torch.cat([model.variations(one, seed=1, output="tensor") for one in pictures()])
        else:
            drawn = model.sample(way.prompt, num_images=IMAGES, seed=1, output="tensor")
        after = [draw(model, prompts) for prompts in (CLASS, OTHERS)]
        moved = [_levels(one, other).mean() for one, other in zip(after, before, strict=True)]
        nearest = torch.stack([_levels(drawn, one) for one in wanted]).min(0).values
        cosine = (plain.embed_image(drawn) @ target.T).max(1).values
        found[way.name] = Found(
            float(nearest.mean()), float(cosine.mean()), float(moved[0]), float(moved[1]), (drawn, after[0], after[1])
        )
    return found


def table(found: Mapping[str, Found]) -> str:
    """In Markdown."""
    lines = ["| | distance | cosine | class moved by | others moved by |", "|---|---|---|---|---|"]
    for name, one in found.items():
        figures = (f"{one.distance:.1f}", f"{one.cosine:.2f}", f"{one.class_moved:.1f}", f"{one.others_moved:.1f}")
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def sheet(found: Mapping[str, Found], cell: int = 72) -> Image.Image:
    """The subject's pictures, and a row for each way: three of the subject, the class, two others."""

    def small(images: Any) -> list[Image.Image]:
        drawn = [to_pil(image) for image in images] if isinstance(images, Tensor) else images
        return [image.resize((cell, cell), Image.Resampling.LANCZOS) for image in drawn]

    blank = Image.new("RGB", (cell, cell), "white")
    rows: list[Any] = [[*small(pictures()), blank, blank]]
    for one in found.values():
        subject, kind, others = one.drawn
        rows.append([*small(subject[:3]), *small(kind), *small(others[:2])])
    names = ["five pictures", *(name.replace(", ", ",\n").replace(" of the ", "\nof the ") for name in found)]
    return labelled_sheet(rows, names, ["subject", "", "", *CLASS, *OTHERS[:2]])


def _draw(model: UnCLIP, prompts: tuple[str, ...], seed: int) -> Tensor:
    return model.sample(prompts, seed=seed, output="tensor")


def _levels(one: Tensor, other: Tensor) -> Tensor:
    return 127.5 * (one - other).square().mean((1, 2, 3)).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/personalise"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--sheet", type=Path, help="write a sheet of the pictures drawn")
    given = parser.parse_args()
    try:
        found = recover(given.runs, given.model)
    except UnclipError as error:
        print(f"recover.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(table(found))
    if given.sheet is not None:
        sheet(found).save(given.sheet)


if __name__ == "__main__":
    main()
