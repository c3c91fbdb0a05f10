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

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".tga", ".ico", ".jp2")


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
    token: opt.Token = None,
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
    jobs = [Job(f"{label} mix", drawing.seed + i, extra=recipe) for i in range(drawing.num_images)]
    writer = drawing.writer(len(jobs))
    sampling = options.given(size=size)
    shown = {**sampling, **recipe}
    setting = Setting.of(drawing, shown, tokens=token)
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
    weight that is not finite, a picture's file that is not there.
    """
    pictures: list[tuple[Path, float]] = []
    prompts: list[tuple[str, float]] = []
    for part in parts:
        name, colon, tail = part.rpartition(":")
        try:
            weight = float(tail) if colon else 1.0
        except ValueError:
            name, weight = part, 1.0
        if not colon:
            name = part
        if not name.strip():
            raise UsageError(f"the part {part!r} of the mixture names nothing; expected IMAGE:WEIGHT or PROMPT:WEIGHT")
        if not isfinite(weight):
            raise UsageError(f"the weight of {name!r} is {weight}; expected a finite number")
        file = Path(name).expanduser()
        if _is_file(file):
            pictures.append((file, weight))
        elif file.suffix.lower() in _IMAGES:
            raise UsageError(f"there is no image file at {name}; a prompt does not end in {file.suffix}")
        else:
            prompts.append((name, weight))
    return pictures, prompts


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a prompt too long for a file's name
        return False
