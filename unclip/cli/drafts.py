"""`unclip drafts`: pairs of a picture and of the decoder's own drawing of it, to train an upsampler on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.output import check_writable
from unclip.cli.progress import Bars
from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from unclip.config import DataConfig
    from unclip.pipeline import UnCLIP


def drafts(
    data: Annotated[str, typer.Option(help="Captioned images, as a run's data.source names them.")],
    out: Annotated[Path, typer.Option(help="The folder to write: new or empty.")],
    model: opt.Model = "emoji",
    samples: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 4096,
    size: Annotated[int, typer.Option(min=8, max=2048, help="Edge of the pictures, pixels.")] = 256,
    low_size: Annotated[int, typer.Option(min=8, max=1024, help="Edge of the drawings, pixels.")] = 64,
    from_image: Annotated[
        bool, typer.Option("--from-image", help="Draw from the picture's own CLIP embedding, not from its caption.")
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=255,
            help="Leave out drawings that differ by more from the picture, reduced to their size: "
            "root of the mean squared difference, in levels of 256.",
        ),
    ] = None,
    changes: opt.DataChanges = None,
    seed: opt.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 16,
    device: opt.Device = "auto",
    dtype: opt.Precision = opt.Dtype.float32,
) -> None:
    """Write pairs for an upsampler: pictures of a data set, and what the model draws for their captions.

    An upsampler that is trained on them (data.source=FOLDER, data.low_column=draft) learns to mend what this decoder
    gets wrong. It pays off where drawings lie close to the pictures: in a small set that the decoder knows well.
    Where the data are fewer than --samples, some are drawn more than once, with other captions and other noise.
    A drawing of something else teaches nothing but blur: --max-error leaves such pairs out. Each pair's error stands in
    metadata.jsonl.
    """
    import torch

    from unclip.pipeline import UnCLIP

    if size % low_size or size == low_size:
        raise UsageError(f"--size {size} is not a multiple (2 or more) of --low-size {low_size}")
    if out.is_dir() and any(out.iterdir()):
        raise UnclipError(f"{out} is not empty; name a folder that is new or empty")
    check_writable(out)
    config = opt.data_config({"source": data}, size, changes)
    if set(config.changes) - {"crop_size"}:
        raise UsageError(
            "the pictures are drawn as they are; leave horizontal_flip, augment and restyle out of --set, and set "
            "horizontal_flip for the upsampler's run, which mirrors both of a pair"
        )
    system = UnCLIP.from_pretrained(
        model, device=opt.own_device(device), dtype=getattr(torch, dtype.value), size=low_size
    )
    system.check_options(size=low_size)
    with Bars(quiet=False) as bars:
        kept = _write(system, config, out, samples, low_size, from_image, max_error, seed, batch_size, bars)
    if kept < samples:
        print(f"{kept} of {samples} pairs kept; the others differ by more than {max_error:g} levels", file=sys.stderr)
    print(out)


def _write(
    system: UnCLIP,
    config: DataConfig,
    out: Path,
    samples: int,
    low_size: int,
    from_image: bool,
    max_error: float | None,
    seed: int,
    batch_size: int,
    bars: Bars,
) -> int:
    """The folder of data.source's layout: images/, drafts/ and metadata.jsonl, whole or not at all. How many pairs."""
    from unclip.bundle import replacing
    from unclip.data import build_batches, to_pil

    batches, kept = build_batches(config, batch_size=min(batch_size, samples), seed=seed), 0
    try:
        with replacing(out) as folder:
            for name in ("images", "drafts"):
                (folder / name).mkdir()
            with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
                for done in range(0, samples, batch_size):
                    batch: dict[str, Any] = dict(next(batches))
                    if "image" not in batch:
                        raise UsageError(f"{config.source!r} holds embeddings without pictures; name pictures")
                    count = min(batch_size, samples - done)
                    drawn = _draw(system, batch, count, low_size, from_image, seed + done)
                    errors = _errors(batch["image"][:count], drawn)
                    for i in range(count):
                        if max_error is not None and errors[i] > max_error:
                            continue
                        kept += 1
                        file = f"{done + i:06d}.png"
                        to_pil(batch["image"][i]).save(folder / "images" / file)
                        to_pil(drawn[i]).save(folder / "drafts" / file)
                        line: dict[str, Any] = {"file_name": f"images/{file}", "draft": f"drafts/{file}"}
                        line |= {"caption": batch["caption"][i], "error": round(errors[i], 2)}
                        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                    bars("drafts", done + count, samples)
            if not kept:
                raise UnclipError(
                    f"none of {samples} drawings is within --max-error {max_error:g} of its picture; "
                    "allow more, or name a model that draws these pictures"
                )
    except OSError as error:
        raise UnclipError(f"cannot write {out}: {error.strerror or error}") from error
    return kept


def _errors(pictures: Tensor, drawn: Tensor) -> list[float]:
    """Root mean square difference of each drawing from its picture reduced by area, in levels of 256."""
    from torch.nn.functional import interpolate

    small = interpolate(pictures, drawn.shape[-2:], mode="area")
    return ((small - drawn.cpu()).square().mean((1, 2, 3)).sqrt() * 127.5).tolist()


def _draw(system: UnCLIP, batch: dict[str, Any], count: int, size: int, from_image: bool, seed: int) -> Any:
    """What the model draws for the first `count` samples, (count, 3, size, size) in [-1, 1]; i with `seed` + i."""
    from unclip.data import to_pil

    seeds = [seed + i for i in range(count)]
    if from_image:
        embeddings = system.embed_image([to_pil(image) for image in batch["image"][:count]])
        return system.decode(embeddings, seed=seeds, size=size, output="tensor")
    return system.sample(batch["caption"][:count], seed=seeds, size=size, output="tensor")
