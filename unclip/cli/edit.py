"""The commands that edit a picture: inpaint, outpaint, edit."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.draw import Job, Setting, produce
from unclip.cli.groups import Sampling, Series
from unclip.cli.output import PictureWriter
from unclip.cli.progress import Bars
from unclip.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = "What it shows"
_WHERE = "Where it is painted"
_SAMPLING = "How it samples (default: the model's own)"


class Crop(str, Enum):
    """The square that the model works on."""

    fit = "fit"
    whole = "whole"
    mask = "mask"


class Channel(str, Enum):
    """What of a mask file counts."""

    brightness = "brightness"
    alpha = "alpha"


def size_option(text: str) -> tuple[int, int]:
    """'1536x1024' as (width, height)."""
    width, _, height = text.lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise typer.BadParameter(f"{text!r} is no size; expected WIDTHxHEIGHT in pixels, such as 1536x1024")
    return int(width), int(height)


Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture, of any size and aspect ratio.")]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What the picture shows (default: what CLIP sees in it).",
        rich_help_panel=_SHOWN,
    ),
]
KeepEmbedding = Annotated[
    float | None,
    typer.Option(
        help="How much of the picture's own CLIP embedding is kept: 0 the prompt's alone, 1 the picture's alone.",
        rich_help_panel=_SHOWN,
    ),
]
JumpLength = Annotated[
    int | None,
    typer.Option(min=1, help="RePaint: levels gone back up at once (default: 3).", rich_help_panel=_SAMPLING),
]
Resamplings = Annotated[
    int | None,
    typer.Option(min=1, help="RePaint: times each stretch is sampled (default: 3).", rich_help_panel=_SAMPLING),
]
Size = Annotated[
    int | None,
    typer.Option(
        parser=opt.pixels,
        metavar="64|256|1024",
        help="Edge that the square is painted at (default: the smallest that it fits into, or the largest).",
        rich_help_panel=_SAMPLING,
    ),
]


def inpaint(
    image: Picture,
    mask: Annotated[
        Path, typer.Option(help="A picture of the same size: white = repaint, black = keep, grey = blend.")
    ],
    prompts: Prompt = None,
    keep_embedding: KeepEmbedding = None,
    invert_mask: Annotated[
        bool, typer.Option("--invert-mask", help="The mask is the other way round.", rich_help_panel=_WHERE)
    ] = False,
    mask_channel: Annotated[
        Channel,
        typer.Option(help="alpha: what is transparent in the mask is repainted.", rich_help_panel=_WHERE),
    ] = Channel.brightness,
    dilate: Annotated[int, typer.Option(help="Grow the mask by so many pixels.", rich_help_panel=_WHERE)] = 0,
    feather: Annotated[
        int, typer.Option(help="Soften its edge over so many pixels, inwards.", rich_help_panel=_WHERE)
    ] = 0,
    crop: Annotated[
        Crop,
        typer.Option(
            help="The square that the model sees: fit, the picture's shorter edge; whole, the longer; mask, around it.",
            rich_help_panel=_WHERE,
        ),
    ] = Crop.fit,
    context: Annotated[
        float | None,
        typer.Option(help="With --crop mask: margin, in edges of the mask (0.5).", rich_help_panel=_WHERE),
    ] = None,
    size: Size = None,
    jump_length: JumpLength = None,
    resamplings: Resamplings = None,
    *,
    options: Sampling,
    drawing: Series,
) -> None:
    """Paint a part of a picture anew: white in the mask = repaint, black = keep, grey = blend.

    What the mask keeps stays as it is, to the bit. The model's decoder does it, if it was trained to, else RePaint.
    """
    from unclip.data.images import load_image
    from unclip.frames import frame_around
    from unclip.masks import check_mask, mask_box, read_mask
    from unclip.masks import dilate as grown
    from unclip.masks import feather as softened

    picture = load_image(image)
    painted = check_mask(read_mask(mask, mask_channel.value, invert_mask), *picture.size)
    painted = check_mask(softened(grown(painted, dilate), feather), *picture.size)
    frame_around(mask_box(painted), *picture.size, crop.value, context)  # before the model is loaded
    prompt = _check_shown(prompts, keep_embedding)
    sampling = options.given(size=size)
    own = {**opt.given(keep_embedding=keep_embedding, context=context), "crop": crop.value}
    way = opt.given(jump_length=jump_length, resamplings=resamplings)
    shown = {**sampling, **own, **way, "dilate": dilate, "feather": feather}
    setting = Setting.of("inpaint", drawing, shown)
    writer = drawing.writer(drawing.num_images)
    jobs = _jobs(image, "inpainted", prompt, drawing.seed, drawing.num_images, {"mask": str(mask)})
    _run("inpaint", jobs, writer, (picture, painted, prompt), {**sampling, **own}, way, setting)


def outpaint(
    image: Picture,
    left: Annotated[int, typer.Option(min=0, help="Pixels to add.", rich_help_panel=_WHERE)] = 0,
    right: Annotated[int, typer.Option(min=0, help="Pixels to add.", rich_help_panel=_WHERE)] = 0,
    top: Annotated[int, typer.Option(min=0, help="Pixels to add.", rich_help_panel=_WHERE)] = 0,
    bottom: Annotated[int, typer.Option(min=0, help="Pixels to add.", rich_help_panel=_WHERE)] = 0,
    to: Annotated[
        Any,
        typer.Option(
            parser=size_option,
            metavar="WIDTHxHEIGHT",
            help="The size of the whole instead, the picture in its middle.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    frame: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Edge of the squares that are painted (default: the whole, up to the model's largest size or the "
            "picture's shorter edge).",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Share of a square that reaches into what is there.", rich_help_panel=_WHERE)
    ] = 0.5,
    prompts: Prompt = None,
    keep_embedding: KeepEmbedding = None,
    size: Size = None,
    jump_length: JumpLength = None,
    resamplings: Resamplings = None,
    *,
    options: Sampling,
    drawing: Series,
) -> None:
    """Continue a picture beyond its edges, square by square; the picture itself stays as it is, to the bit."""
    from unclip.data.images import load_image
    from unclip.frames import margins, plan_frames

    picture = load_image(image)
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    margins(*picture.size, (left, top, right, bottom), to)  # before the model is loaded
    plan_frames(1, 1, (0, 0, 1, 1), 1, overlap)
    prompt = _check_shown(prompts, keep_embedding)
    sampling = options.given(size=size)
    own = {**opt.given(keep_embedding=keep_embedding, frame=frame, to=to), **sides, "overlap": overlap}
    way = opt.given(jump_length=jump_length, resamplings=resamplings)
    shown = {**sampling, **own, **way}
    setting = Setting.of("outpaint", drawing, shown)
    writer = drawing.writer(drawing.num_images)
    jobs = _jobs(image, "outpainted", prompt, drawing.seed, drawing.num_images)
    _run("outpaint", jobs, writer, (picture, prompt), {**sampling, **own}, way, setting)


def edit(
    image: Picture,
    prompts: Prompt = None,
    strength: Annotated[
        float,
        typer.Option(
            help="How much is forgotten: 0 nothing, 1 everything, as `sample`.", rich_help_panel=_SHOWN
        ),
    ] = 0.6,
    keep_embedding: KeepEmbedding = None,
    size: opt.Size = None,
    *,
    options: Sampling,
    drawing: Series,
) -> None:
    """Draw a picture anew for a prompt, from itself with noise (SDEdit).

    The decoder works on the central square at its own resolution, which is 64 px in the paper's system and the bundled
    model.
    """
    from unclip.data.images import load_image
    from unclip.diffusion.samplers.editing import check_strength

    picture = load_image(image)
    check_strength(strength)
    prompt = _check_shown(prompts, keep_embedding)
    sampling = options.given(size=size, keep_embedding=keep_embedding)
    sampling["strength"] = strength
    setting = Setting.of("edit", drawing, sampling)
    writer = drawing.writer(drawing.num_images)
    jobs = _jobs(image, "edited", prompt, drawing.seed, drawing.num_images, {"strength": strength})
    _run("edit", jobs, writer, (picture, prompt), sampling, {}, setting)


def _check_shown(prompts: Sequence[str] | None, keep_embedding: float | None) -> str | None:
    """The prompt, if one was given. UsageError: several, an empty one, or more of the picture kept than all of it."""
    from unclip.editing import check_kept

    if prompts and len(prompts) > 1:
        raise UsageError(f"{len(prompts)} prompts are given for one picture; name one")
    prompt = prompts[0] if prompts else None
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty; say what the picture shows, or leave it out")
    check_kept(prompt, keep_embedding)
    return prompt


def _jobs(
    image: Path, done: str, prompt: str | None, seed: int, count: int, extra: dict[str, Any] | None = None
) -> list[Job]:
    more = {"image": str(image), **(extra or {})}
    return [Job(f"{image.stem} {done}", seed + i, prompt=prompt, extra=more) for i in range(count)]


def _run(
    method: str,
    jobs: Sequence[Job],
    writer: PictureWriter,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    way: dict[str, int],
    setting: Setting,
) -> None:
    """Load the model, and write what its method draws, batch by batch."""
    system = setting.load()
    if way:
        from unclip.editing import Resampling

        options = {**options, "resampling": Resampling(**way)}

    def draw(batch: Sequence[Job], bars: Bars) -> list[Image]:
        call = getattr(system, method)
        return call(*arguments, num_images=len(batch), seed=batch[0].seed, progress=bars, **options)  # type: ignore[no-any-return]

    produce(jobs, draw, system, setting, writer)
