"""`unclip embed`: CLIP embeddings of a few pictures, or everything a training run needs of a whole data set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.output import check_free, check_writable, write_atomically
from unclip.cli.progress import hush_datasets
from unclip.errors import UsageError

if TYPE_CHECKING:
    from unclip.config import DataConfig

_BATCH = 32
_DATASET = "A whole data set (--dataset)"
_Model = Annotated[
    str | None,
    typer.Option(metavar="NAME|DIR|HUB-ID", help="The model whose CLIP it is (default: emoji, the bundled one)."),
]
_Rows = Annotated[
    int | None, typer.Option(min=1, help="Samples a shard (default: 8192).", rich_help_panel=_DATASET)
]


def embed(
    images: Annotated[list[Path] | None, typer.Argument(help="Pictures.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The .npy file to write; with --dataset the folder.", show_default=False)
    ] = None,
    model: _Model = None,
    clip: Annotated[
        str | None, typer.Option(help="A CLIP by itself, as a run's `clip` names it, in the place of --model.")
    ] = None,
    raw_length: Annotated[
        bool,
        typer.Option(
            "--raw-length",
            help="Leave pictures' embeddings as long as the CLIP makes them; Karlo's decoder reads these.",
        ),
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "--data",
            metavar="SOURCE",
            help="Captioned images, as a run's data.source names them.",
            rich_help_panel=_DATASET,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The data's split (default: train).", rich_help_panel=_DATASET)
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read shard by shard.", rich_help_panel=_DATASET)
    ] = False,
    pixels: Annotated[
        int | None,
        typer.Option(min=8, max=2048, help="Keep pictures of this edge, for a decoder.", rich_help_panel=_DATASET),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=8, max=2048, help="Edge the CLIP sees (default: its own).", rich_help_panel=_DATASET),
    ] = None,
    rows: _Rows = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images embedded together (default: 64).", rich_help_panel=_DATASET)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of a run's data section.", rich_help_panel=_DATASET),
    ] = None,
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # the launcher passes it
) -> None:
    """Write CLIP embeddings.

    Of pictures: a .npy file, float32 (N, E), of unit length unless --raw-length is given, in the order given; `unclip
    decode` takes it.

    Of a data set (--dataset): a folder that data.source takes, from which a prior or a decoder trains without the CLIP.
    Started by torchrun or deepspeed the processes share the work. Entered again, it goes on where it was killed.
    """
    if (dataset is None) == (not images):
        raise UsageError("name either pictures or a data set (--dataset SOURCE)")
    if out is None:
        raise UsageError("name what to write: --out FILE.npy for pictures, --out FOLDER for a data set")
    if dataset is None:
        _refuse_of_data_sets(
            pixels=pixels, image_size=image_size, rows=rows, batch_size=batch_size, set=changes, split=split,
            streaming=streaming or None,
        )  # fmt: skip
    if model is not None and clip is not None:
        raise UsageError("--model and --clip both name a CLIP; give one of them")
    model = "emoji" if model is None else model
    if dataset is None:
        _embed_pictures(images or [], out, model, clip, device, overwrite, unit_length=not raw_length)
        return
    if raw_length:
        raise UsageError("--raw-length is for pictures; the embeddings of a data set are as the CLIP makes them anyway")
    from unclip.config import DataConfig, load_overrides

    if overwrite:
        raise UsageError("--overwrite is for pictures; a folder of embeddings is gone on with, or removed by hand")
    if out.suffix.lower() == ".npy":
        raise UsageError(f"--out {out} is a file; the embeddings of a data set are a folder")
    check_writable(out)
    body = {"source": dataset, "split": split or "train", "streaming": streaming}
    _embed_dataset(
        load_overrides(DataConfig, body, changes or [], origin="the data"),
        out, model, clip, device,
        rows=rows or 8192, batch_size=batch_size or 64, image_size=image_size, pixels=pixels,
    )  # fmt: skip


def _refuse_of_data_sets(**given: Any) -> None:
    """UsageError: an option that pictures alone have no use for."""
    for name, value in given.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is of a whole data set; add --dataset SOURCE, or leave it out")


def _embed_pictures(
    images: list[Path],
    out: Path,
    model: str,
    clip_name: str | None,
    device: str,
    overwrite: bool,
    *,
    unit_length: bool,
) -> None:
    if out.suffix.lower() != ".npy":
        raise UsageError(f"--out {out} is no .npy file")
    check_free(out, overwrite)
    check_writable(out.parent)
    import numpy as np

    from unclip.parts import image_pixels
    from unclip.stages import check_finite

    clip, _ = _load_clip(model, clip_name, device)
    rows = []
    for start in range(0, len(images), _BATCH):
        pixels = image_pixels(images[start : start + _BATCH], clip.image_size, clip.device)
        embedded = clip.encode_image(pixels, unit_length=unit_length)
        check_finite(embedded, "clip")
        rows.append(embedded.cpu().numpy())
    array = np.concatenate(rows).astype(np.float32)
    write_atomically(out, lambda stream: np.save(stream, array, allow_pickle=False), replace=overwrite)
    print(out)


def _embed_dataset(
    config: DataConfig, out: Path, model: str, clip_name: str | None, device: str, **options: Any
) -> None:
    if "image_size" in config.model_fields_set:
        raise UsageError(
            "--set image_size is of training; --image-size says at which edge the CLIP sees pictures, --pixels at "
            "which they are kept"
        )
    from unclip.precompute import embed_dataset

    hush_datasets(quiet=False)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    clip, name = _load_clip(model, clip_name, device)

    def told(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    progress = embed_dataset(config, name, clip, out, rank=rank, world_size=world_size, told=told, **options)
    skipped = progress.tally.report()
    if skipped:
        print(skipped, file=sys.stderr)
    whose = "" if world_size == 1 else f" by process {rank} of {world_size}"
    told(f"{progress.written} shards written{whose}, {progress.found} found, {progress.rows} samples")
    if rank == 0:
        print(out)


def _load_clip(model: str, clip_name: str | None, device: str) -> tuple[Any, str]:
    """The CLIP, and the name by which FrozenCLIP.load takes it."""
    place = opt.own_device(device)
    if clip_name is not None:
        from unclip.clip import FrozenCLIP

        return FrozenCLIP.load(clip_name, device=place), clip_name
    from unclip.bundle import read_manifest, resolve_model
    from unclip.parts import load_clip

    folder = resolve_model(model, parts=lambda _described: ["clip"])
    loaded = load_clip(model, place)
    return loaded, str(folder / read_manifest(folder)["parts"]["clip"])
