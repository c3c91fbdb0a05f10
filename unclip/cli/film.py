"""`unclip interpolate` and `unclip textdiff`: pictures frame by frame."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from unclip.cli import options as opt
from unclip.cli.animation import Animate, Animations, Fps
from unclip.cli.draw import Job, Setting, produce
from unclip.cli.groups import Drawing, Sampling, Upsampling
from unclip.cli.manipulate import Refinements, Steps
from unclip.cli.output import PictureWriter
from unclip.cli.progress import Bars
from unclip.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.latents import Latents
    from unclip.pipeline import UnCLIP

Frames = Annotated[int, typer.Option(help="Pictures from one end to the next, both included.")]
Grid = Annotated[
    bool, typer.Option("--grid", help="Also write all frames as one sheet.", rich_help_panel="What is written")
]


def interpolate(
    ends: Annotated[
        list[str] | None,
        typer.Argument(metavar="A B [C …]", help="An existing file is a picture, anything else a prompt."),
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="One more end, a picture; repeatable.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="One more end, a prompt.")] = None,
    frames: Frames = 9,
    noise: Annotated[
        str,
        typer.Option(
            metavar="inverted|fixed",
            help="inverted: x_T moves from one picture's own to the next one's; fixed: one drawn for all.",
        ),
    ] = "inverted",
    loop: Annotated[bool, typer.Option("--loop", help="Go on to the first end again.")] = False,
    animate: Animate = None,
    fps: Fps = 8.0,
    steps: Steps = 25,
    refinements: Refinements = 1,
    seed: opt.Seed = 0,
    size: opt.Size = None,
    grid: Grid = False,
    *,
    options: Sampling,
    drawing: Drawing,
) -> None:
    """Draw the way from one picture or prompt to the next: unclip interpolate cat.png dog.png --frames 9

    z_i and x_T move along great circles (unCLIP, section 3.2), so that the ends are the pictures themselves. A prompt
    stands for what `unclip sample` draws of it with this seed.
    """
    from unclip.geometry import path

    known, names = read_ends([*(ends or [])], image or [], prompt or [])
    if noise not in ("inverted", "fixed"):
        raise UsageError(f"--noise is {noise!r}, expected 'inverted' or 'fixed'")
    count = len(path(len(known), frames, loop))
    sampling = options.given(size=size)
    own: dict[str, Any] = {"frames": frames, "loop": loop, "noise": noise, "steps": steps, "refinements": refinements}
    writer, films = drawing.writer(count), Animations(animate, fps, drawing.overwrite)
    shown = {**sampling, **own, "ends": names}
    setting = Setting(drawing, shown, grid=grid, command="interpolate")
    system = setting.load()

    def latents(bars: Bars) -> Latents:
        return system.between(known, seed=seed, progress=bars, **own, **sampling)

    label = " to ".join(Path(name).stem for name in names)
    _film(label, count, seed, latents, sampling, system, setting, writer, films)


def textdiff(
    image: Annotated[Path, typer.Argument(help="The picture to change.")],
    target: Annotated[str, typer.Option("--to", help="What it shall show.")],
    base: Annotated[str, typer.Option("--from", help="What it shows (default: the empty caption).")] = "",
    max_theta: Annotated[
        float, typer.Option(help="How far to go: 1 is all the way to the text; the paper goes to 0.25 … 0.5.")
    ] = 0.5,
    frames: Annotated[int, typer.Option(help="Pictures from θ = 0, the picture itself, to the end.")] = 9,
    animate: Animate = None,
    fps: Fps = 8.0,
    steps: Steps = 25,
    refinements: Refinements = 1,
    seed: opt.Seed = 0,
    size: opt.Size = None,
    grid: Grid = False,
    *,
    options: Upsampling,
    drawing: Drawing,
) -> None:
    """Change a picture by the difference of two captions: unclip textdiff cat.png --from cat --to 'a wild tiger'

    Its embedding turns towards norm(z_to − z_from) by a share θ of the way; its noise x_T stays (unCLIP, section 3.3).
    """
    from unclip.data.images import load_image
    from unclip.geometry import linear_schedule

    if not 0 < max_theta <= 1:
        raise UsageError(f"--max-theta is {max_theta:g}, expected above 0 and at most 1 (the paper: 0.25 … 0.5)")
    if not target.strip():
        raise UsageError("--to is empty; say what the picture shall show")
    thetas = linear_schedule(max_theta, frames)
    picture = load_image(image)
    writer, films = drawing.writer(frames), Animations(animate, fps, drawing.overwrite)
    sampling = options.given(size=size)
    own: dict[str, Any] = {"max_theta": max_theta, "frames": frames, "steps": steps, "refinements": refinements}
    shown = {**sampling, **own, "from": base, "to": target}
    setting = Setting(drawing, shown, grid=grid, command="textdiff")
    system = setting.load()

    def latents(bars: Bars) -> Latents:
        return system.toward(picture, target, base=base, progress=bars, **own)

    extra = [{"image": str(image), "theta": round(theta, 6)} for theta in thetas]
    _film(f"{image.stem} {target}", frames, seed, latents, sampling, system, setting, writer, films, extra)


def read_ends(ends: list[str], images: list[Path], prompts: list[str]) -> tuple[list[Any], list[str]]:
    """Ends as UnCLIP.between takes them, and their names. UsageError: fewer than two, an empty one, a picture's file
    that is not there.
    """
    from unclip.data.images import load_image
    from unclip.manipulation import Prompt

    if not all(text.strip() for text in (*ends, *prompts)):
        raise UsageError("an end is empty; name a picture's file or a prompt")
    named: list[Path | str] = [opt.picture_named(end) or end for end in ends]
    named += [*images, *prompts]
    if len(named) < 2:
        raise UsageError(f"an interpolation goes between 2 or more pictures or prompts, got {len(named)}")
    known = [load_image(end) if isinstance(end, Path) else Prompt(end) for end in named]
    return known, [end.name if isinstance(end, Path) else end for end in named]


def _film(
    label: str,
    count: int,
    seed: int,
    make: Any,
    sampling: dict[str, Any],
    system: UnCLIP,
    setting: Setting,
    writer: PictureWriter,
    films: Animations,
    extra: Sequence[dict[str, Any]] = (),
) -> None:
    """Draw the frames of latents that `make` makes, write them, and the moving pictures of them."""
    digits = len(str(count - 1))
    known = [{"frame": i, **(extra[i] if extra else {})} for i in range(count)]
    jobs = [Job(f"{label} frame {i:0{digits}d}", seed, extra=known[i]) for i in range(count)]
    found: list[Latents] = []
    frames: list[Image] = []

    def draw(batch: Sequence[Job], bars: Bars) -> list[Image]:
        from unclip.upscaling import Timings

        system.timings = Timings()
        if not found:
            found.append(make(bars))
        first = batch[0].extra["frame"]
        part = found[0][first : first + len(batch)]
        pictures = cast("list[Image]", system.frames_of(part, seed=seed, progress=bars, **sampling))
        if films.files:
            frames.extend(pictures)
        return pictures

    produce(jobs, draw, system, setting, writer)
    for file in films.save(frames) if films.files else []:
        print(file, file=sys.stderr if setting.drawing.json_lines else sys.stdout)
