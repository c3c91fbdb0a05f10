"""The commands of the upsamplers alone: upscale, restore."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.groups import Adapted
from unclip.cli.output import bare_name
from unclip.cli.progress import Bars

_SAMPLING = "How it samples (default: the model's own)"

Size = Annotated[
    int | None,
    typer.Option(
        parser=opt.pixels, metavar="256|1024", help="Longer edge in pixels (default: the model's largest)."
    ),
]
Start = Annotated[
    int | None,
    typer.Option(
        "--from",
        min=1,
        metavar="64|256",
        help="Reduce pictures to this edge first (default: the highest stage's that they fill).",
        rich_help_panel=_SAMPLING,
    ),
]
Steps = Annotated[
    Any,
    typer.Option(
        parser=opt.steps_option, metavar=opt.STEPS, help="Steps of each stage.", rich_help_panel=_SAMPLING
    ),
]
NoiseLevel = Annotated[
    int | None,
    typer.Option(
        min=0, help="Noise on the input, for models trained with noise augmentation.", rich_help_panel=_SAMPLING
    ),
]


@dataclass(frozen=True)
class Stages:
    """How the upsamplers run."""

    start: Start = None
    steps: Steps = None
    noise_level: NoiseLevel = None
    memory_limit: opt.MemoryLimit = None


@dataclass(frozen=True)
class Alone(Adapted):
    seed: Annotated[int, typer.Option(min=0, max=opt.LARGEST_SEED, help="The noise, the same for all.")] = 0


def upscale(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="The pictures, in any aspect ratio.")],
    size: Size = None,
    *,
    options: Stages,
    place: Alone,
) -> None:
    """Upscale pictures with a model's upsamplers, nothing cropped.

    A picture is first reduced to the input of the highest stage that it fills (256 px for 256 to 1024), its longer
    edge counting, and drawn anew from there. The bundled model has seen emoji only: photos need a model of your own.
    """
    _run("upscale", images, size, opt.given(**vars(options)), place)


def restore(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="The pictures, in any aspect ratio.")],
    *,
    options: Stages,
    place: Alone,
) -> None:
    """Draw pictures anew at their own size with a model's upsamplers, rid of JPEG's blocks, noise and blur.

    A picture is reduced to the input of the highest stage below its size and drawn from there. What goes away is what
    the upsamplers were trained to undo. The bundled model has seen emoji only: photos need a model of your own.
    """
    _run("restore", images, None, opt.given(**vars(options)), place)


def _run(command: str, images: list[Path], size: int | None, options: dict[str, Any], place: Alone) -> None:
    """Load the upsamplers, and write what the method called `command` makes of each picture."""
    from unclip.data.images import load_image
    from unclip.upscaling import Upscaler

    pictures = [load_image(image) for image in images]
    writer = place.writer(len(pictures))
    system = Upscaler.from_pretrained(
        place.model, device=place.device, dtype=place.torch_dtype, size=size, adapters=place.adapter or ()
    )
    method: Callable[..., list[Any]] = system.restore if command == "restore" else partial(system.upscale, size=size)
    with Bars(place.quiet) as bars:
        for number, (source, picture) in enumerate(zip(images, pictures, strict=True)):
            bars.batch(number + 1, len(pictures))
            result = method(picture, seed=place.seed, progress=bars, **options)[0]
            bars.close()
            text = _metadata(command, source, system.name, result.size, options, place)
            label = "restored" if command == "restore" else max(result.size)
            path = writer.save(result, f"{source.stem} {label}", place.seed, text)
            seconds = {stage: round(s, 4) for stage, s in system.timings.seconds.items()}
            body = {
                "path": str(path),
                "image": str(source),
                "seed": place.seed,
                "width": result.width,
                "height": result.height,
                "model": system.name,
                "seconds": seconds,
            }
            print(json.dumps(body) if place.json_lines else path, flush=True)


def _metadata(
    command: str, source: Path, name: str, size: tuple[int, int], options: dict[str, Any], place: Alone
) -> dict[str, str]:
    """What the PNG itself says about how it came to be; no paths, since pictures travel."""
    from unclip import __version__

    text = {
        "command": command,
        "image": bare_name(source),
        "seed": str(place.seed),
        "model": name,
        "size": f"{size[0]}x{size[1]}",
        "unclip": __version__,
        "dtype": place.dtype.value,
        **place.told(),
    }
    return {**text, "options": json.dumps(options)} if options else text
