"""`unclip reconstruct` and `unclip variations`: pictures as latents, and others from the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from unclip.cli import options as opt
from unclip.cli.draw import Job, Setting, produce
from unclip.cli.groups import Decoding, Drawing, Series, Upsampling
from unclip.cli.output import PictureWriter, bare_name, check_free, check_writable, write_atomically
from unclip.cli.progress import Bars
from unclip.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.latents import Latents
    from unclip.pipeline import UnCLIP

_SAMPLING = "How it samples (default: the model's own)"
_FRAMES = "How the picture is inverted"

Steps = Annotated[
    Any,
    typer.Option(
        "--steps",
        parser=opt.steps_option,
        metavar=opt.STEPS,
        help="Timesteps of the inversion and of the way back (default: 100).",
        rich_help_panel=_FRAMES,
    ),
]
Refinements = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="More passes for each step of the inversion, which make it exact (default: 1).",
        rich_help_panel=_FRAMES,
    ),
]

def reconstruct(
    image: Annotated[Path, typer.Argument(help="The picture to encode and to draw again.")],
    latents: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Also write the latents (z_i, x_T) there.")
    ] = None,
    steps: Steps = None,
    refinements: Refinements = None,
    seed: opt.Seed = 0,
    size: opt.Size = None,
    *,
    options: Upsampling,
    drawing: Drawing,
) -> None:
    """Encode a picture as (z_i, x_T) and draw it again from them; says how near it comes (unCLIP, section 3).

    z_i is CLIP's embedding, x_T the noise that inverting the decoder by DDIM finds. The peak signal-to-noise ratio is
    taken at the decoder's own size, with the whole range from black to white as the peak.
    """
    from unclip.data.images import load_image

    picture = load_image(image)
    writer = drawing.writer(1)
    if latents is not None:
        if latents.suffix.lower() != ".safetensors":
            raise UsageError(f"--latents {latents} is no .safetensors file")
        check_free(latents, drawing.overwrite)
        check_writable(latents.parent)
    sampling = options.given(size=size)
    own = _inversion(steps, refinements)
    shown = {**sampling, **own}
    setting = Setting(drawing, shown, command="reconstruct")
    system = setting.load()
    extra: dict[str, Any] = {"image": str(image)}
    job = Job(f"{image.stem} reconstructed", seed, extra=extra)

    def draw(_: Sequence[Job], bars: Bars) -> list[Image]:
        from unclip.data.images import to_pil

        trip = system.round_trip(picture, seed=seed, progress=bars, **own, **sampling)
        edge = system.decoder.config.image_size
        extra.update(psnr=round(trip.psnr, 3), psnr_size=edge, timesteps=list(trip.latents.timesteps))
        if latents is not None:
            data = trip.latents.to_bytes()
            write_atomically(latents, lambda stream: _write(stream, data), replace=drawing.overwrite)
            extra["latents"] = str(latents)
        return [to_pil(trip.image[0])]

    produce([job], draw, system, setting, writer)
    if not drawing.json_lines:
        if latents is not None:
            print(latents)
        print(f"PSNR {extra['psnr']:.1f} dB at {extra['psnr_size']} px")


def variations(
    image: Annotated[Path | None, typer.Argument(help="The picture to vary; not with --latents.")] = None,
    latents: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Latents that `unclip reconstruct` wrote, instead of a picture."),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            metavar="0…1",
            help="Start from the picture's own noise, x_T, and draw so much more: 0 gives the picture back, 1 forgets "
            "x_T. Default: fresh noise, or 1 with --latents.",
        ),
    ] = None,
    eta_sheet: Annotated[
        list[float] | None,
        typer.Option(metavar="ETA ETA …", help="One sheet, a row for each eta, --num-images columns."),
    ] = None,
    steps: Steps = None,
    refinements: Refinements = None,
    size: opt.Size = None,
    *,
    options: Decoding,
    drawing: Series,
) -> None:
    """Draw pictures that share an image's CLIP embedding (unCLIP, section 3.1)."""
    if (image is None) == (latents is None):
        raise UsageError("name the picture to vary, or its latents with --latents; one of the two")
    for value in [*(eta_sheet or []), *([] if eta is None else [eta])]:
        if not 0 <= value <= 1:
            raise UsageError(f"eta is {value:g}, expected 0 (the picture itself) to 1 (x_T forgotten)")
    if eta is not None and eta_sheet:
        raise UsageError("--eta and --eta-sheet exclude each other; the sheet names its own etas")
    if latents is not None and (steps, refinements) != (None, None):
        raise UsageError("--steps and --refinements are of an inversion, and --latents come from one; leave them out")
    if eta is None and not eta_sheet and (steps, refinements) != (None, None):
        raise UsageError("--steps and --refinements are of the inversion, which --eta and --eta-sheet alone ask for")
    if eta_sheet and drawing.grid:
        raise UsageError("--grid is of single pictures, and --eta-sheet is one sheet already; leave one of them out")
    source = cast(Path, image or latents)
    start = _start(image, latents)
    etas: list[Any] = list(eta_sheet or []) or ([1.0] if eta is None and latents is not None else [eta])
    writer = drawing.writer(1 if eta_sheet else drawing.num_images)
    jobs = [
        Job(f"{source.stem} variation", drawing.seed + i, extra={"image": str(source), **opt.given(eta=one)})
        for one in etas
        for i in range(drawing.num_images)
    ]
    sampling = options.given(size=size)
    own = _inversion(steps, refinements)
    shown = {**sampling, **(own if etas != [None] and latents is None else {}), **opt.given(eta=eta)}
    setting = Setting.of("variations", drawing, shown)
    system = setting.load()
    encoded: list[Latents] = []

    def draw(batch: Sequence[Job], bars: Bars) -> list[Image]:
        one = {**sampling, **opt.given(eta=batch[0].extra.get("eta"))}
        origin: Any = start
        if "eta" in one:
            if not encoded:
                encoded.append(start if latents is not None else system.encode(start, progress=bars, **own))
            origin = encoded[0]
        return system.variations(origin, num_images=len(batch), seed=batch[0].seed, progress=bars, **one)

    if not eta_sheet:
        produce(jobs, draw, system, setting, writer)
        return
    _eta_sheet(etas, jobs, draw, system, setting, writer, source)


def _inversion(steps: Any, refinements: int | None) -> dict[str, Any]:
    """How a picture is inverted."""
    return {"steps": 100 if steps is None else steps, "refinements": 1 if refinements is None else refinements}


def _start(image: Path | None, latents: Path | None) -> Any:
    """A picture, or the latents of one."""
    if image is not None:
        from unclip.data.images import load_image

        return load_image(image)
    from unclip.latents import Latents

    return Latents.load(cast(Path, latents))


def _eta_sheet(
    etas: Sequence[Any],
    jobs: Sequence[Job],
    draw: Any,
    system: UnCLIP,
    setting: Setting,
    writer: PictureWriter,
    source: Path,
) -> None:
    """One sheet with a row for each eta."""
    from unclip import __version__
    from unclip.data.lettering import labelled_sheet

    columns = len(jobs) // len(etas)
    rows = []
    with Bars(setting.drawing.quiet) as bars:
        for number in range(len(etas)):
            bars.batch(number + 1, len(etas))
            row: list[Image] = []
            for start in range(number * columns, (number + 1) * columns, setting.batch_size):
                row += draw(jobs[start : min(start + setting.batch_size, (number + 1) * columns)], bars)
            rows.append(row)
            bars.close()
    sheet = labelled_sheet(rows, [f"eta = {eta:g}" for eta in etas])
    seed = jobs[0].seed
    text = {
        "command": "variations",
        "image": bare_name(source),
        "etas": json.dumps(list(etas)),
        "seed": str(seed),
        "model": system.name,
        "unclip": __version__,
        "dtype": setting.drawing.dtype.value,
        "options": json.dumps({key: value for key, value in setting.options.items() if key != "size"}),
    }
    path = writer.save(sheet, f"{source.stem} eta", seed, text)
    body = {"path": str(path), "image": str(source), "etas": list(etas), "seed": seed, "model": system.name}
    print(json.dumps(body) if setting.drawing.json_lines else path, flush=True)


def _write(stream: Any, data: bytes) -> None:
    stream.write(data)
