"""The commands convert and export: other people's checkpoints, in and out."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli import options as opt
from unclip.cli.progress import Bars
from unclip.errors import UsageError


class Stored(str, Enum):
    """Type of the stored weights."""

    source = "source"
    float16 = "float16"
    float32 = "float32"


class Target(str, Enum):
    """What a bundle is exported to."""

    diffusers = "diffusers"
    diffusers_variations = "diffusers-variations"


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC…",
            help="A folder or Hub id with somebody else's unCLIP: Karlo in diffusers' layout, or its .ckpt files. "
            "Several belong together, as a text-to-image and an image-variations folder do. Or a single stage: a "
            ".pth of DALLE2-pytorch, such as LAION's, or the folder of a Kandinsky prior.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    clip: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="A CLIP as open_clip has it, in the place of the checkpoint's own."),
    ] = None,
    upsampler_1024: Annotated[
        Path | None, typer.Option("--upsampler-1024", metavar="PART", help="A trained 256 → 1024 px stage to add.")
    ] = None,
    dtype: Annotated[Stored, typer.Option(help="Type of the stored weights.")] = Stored.source,
    revision: Annotated[str | None, typer.Option(help="Of the Hub's repository: a branch, tag or commit.")] = None,
    written_by: Annotated[
        str | None,
        typer.Option(metavar="1.6.5", help="The release of DALLE2-pytorch that wrote a file, where it tells none."),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(metavar="JSON", help="The configuration of such a file, where none lies beside it.")
    ] = None,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make a model folder of somebody else's checkpoint (see docs/interop.md).

    `unclip sample --model SRC` does the same when SRC is first named, and keeps the result in the cache. Of a single
    stage a part is made, which `unclip bundle` joins with others.
    """
    import torch

    from unclip.hub import CHECKPOINT, fetch, parse_name
    from unclip.interop.detect import convert as convert_folders
    from unclip.interop.karlo import ConvertOptions, check_free

    folders = []
    for source in sources:
        folder = Path(source).expanduser()
        hub = None if folder.exists() else parse_name(source, revision)
        folders.append(folder if hub is None else fetch(hub, CHECKPOINT))
    if len(folders) == 1 and _single_stage(folders[0], out, clip, written_by, settings, overwrite):
        print(out)
        return
    if written_by is not None or settings is not None:
        raise UsageError("--written-by and --settings are for files of DALLE2-pytorch, and SRC is none; leave them out")
    kind = None if dtype is Stored.source else getattr(torch, dtype.value)
    check_free(out, overwrite)
    with Bars(quiet) as bars:
        convert_folders(folders, out, ConvertOptions(clip, upsampler_1024, kind, overwrite), bars)
    print(out)


def _single_stage(
    source: Path, out: Path, clip: str | None, written_by: str | None, settings: Path | None, overwrite: bool
) -> bool:
    """Convert a checkpoint that holds one stage; False where the source is none."""
    if source.is_file() or (source.is_dir() and any(file.suffix == ".pth" for file in source.iterdir())):
        from unclip.interop.dalle2_parts import convert_dalle2

        convert_dalle2(source, out, settings, written_by, overwrite=overwrite)
        return True
    from unclip.interop.kandinsky import convert_kandinsky, is_kandinsky_prior

    if is_kandinsky_prior(source):
        convert_kandinsky(source, out, clip, overwrite)
        return True
    return False


def export(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The model: a folder or a Hub id.")],
    to: Annotated[
        Target, typer.Option("--to", help="diffusers' UnCLIPPipeline, or its UnCLIPImageVariationPipeline.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    part: Annotated[
        list[str] | None,
        typer.Option(metavar="prior|decoder|upsampler_256|clip", help="This part alone; repeatable."),
    ] = None,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a model of Karlo's shape as diffusers 0.37.1 loads it; its single networks load in every release.

    diffusers stores no steps and no guidance: it draws with 25 steps, 25 and 7, at guidance 4 and 8, unless told.
    """
    from unclip.interop.export import VARIATIONS, export_diffusers

    pipeline = VARIATIONS if to is Target.diffusers_variations else None
    with Bars(quiet) as bars:
        left = export_diffusers(
            bundle, out, pipeline=pipeline, parts=part or (), overwrite=overwrite, progress=bars
        )
    for what in left:
        print(f"unclip: left out: {what}", file=sys.stderr)
    print(out)
