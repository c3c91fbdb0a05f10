"""`unclip mix`: pictures of a weighted mean of image embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli import options as opt
from unclip.cli.draw import Job, Setting, produce
from unclip.cli.groups import Sampling, Series
from unclip.cli.progress import Bars
from unclip.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


def mix(
    parts: Annotated[
        list[str],
        typer.Option(
            "--mix",
            metavar="IMAGE:WEIGHT|PROMPT:WEIGHT …",
            help="A picture's file or a prompt, and its weight (default: 1; negative moves away); repeatable.",
        ),
    ],
    spherical: Annotated[
        bool, typer.Option("--spherical", help="The mean along great circles, for weights of 0 or more.")
    ] = False,
    text_embedding: Annotated[
        bool, typer.Option("--text-embedding", help="CLIP's text embedding of prompts, without the prior.")
    ] = False,
    size: opt.Size = None,
    *,
    options: Sampling,
    drawing: Series,
) -> None:
    """Draw a weighted mixture of pictures and prompts: unclip mix --mix cat.png:0.6 snow:0.4

    A part that is a file is a picture, anything else a prompt, of which the prior makes an image embedding. The mean is
    linear and brought back to the length of an embedding, so that only the weights' ratios count.
    """
    from unclip.data.images import load_image

    pictures, prompts = read_parts(parts)
    images = [(load_image(file), weight) for file, weight in pictures]
    label = " ".join([*(file.stem for file, _ in pictures), *(text for text, _ in prompts)])
    recipe = {
        "mix": [*([file.name, weight] for file, weight in pictures), *([text, weight] for text, weight in prompts)],
        "mean": "spherical" if spherical else "linear",
        "text_embedding": text_embedding,
    }
    writer = drawing.writer(drawing.num_images)
    jobs = [Job(f"{label} mix", drawing.seed + i, extra=recipe) for i in range(drawing.num_images)]
    sampling = options.given(size=size)
    shown = {**sampling, **recipe}
    setting = Setting.of("mix", drawing, shown)
    system = setting.load()

    def draw(batch: Sequence[Job], bars: Bars) -> list[Image]:
        return system.mix(
            images,
            prompts,
            mean=recipe["mean"],
            text_embedding=text_embedding,
            num_images=len(batch),
            seed=batch[0].seed,
            progress=bars,
            **sampling,
        )

    produce(jobs, draw, system, setting, writer)


def read_parts(parts: Sequence[str]) -> tuple[list[tuple[Path, float]], list[tuple[str, float]]]:
    """'a.png:0.6', 'snow:0.4', … -> pictures and prompts with their weights.

    What stands behind the last colon is the weight where it is a number, else 1. UsageError: nothing before it, a
    weight that is not finite, one with a decimal comma, something else behind a picture's file, a picture's file that
    is not there.
    """
    pictures: list[tuple[Path, float]] = []
    prompts: list[tuple[str, float]] = []
    for part in parts:
        name, weight = _weighted(part)
        if not name.strip():
            raise UsageError(f"the part {part!r} of the mixture names nothing; expected IMAGE:WEIGHT or PROMPT:WEIGHT")
        if not isfinite(weight):
            raise UsageError(f"the weight of {name!r} is {weight}; expected a finite number")
        file = opt.picture_named(name)
        if file is not None:
            pictures.append((file, weight))
        else:
            prompts.append((name, weight))
    return pictures, prompts


def _weighted(part: str) -> tuple[str, float]:
    """What a part names, and its weight."""
    name, colon, tail = part.rpartition(":")
    if not colon:
        return part, 1.0
    try:
        return name, float(tail)
    except ValueError:
        if _is_number(tail.replace(",", ".", 1)) or opt.picture_named(name) is not None:
            raise UsageError(f"{tail!r} behind {name!r} is no weight; expected a number, such as {name}:0.5") from None
        return part, 1.0


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False
