"""`unclip fit-pca`: the principal components of a data set's CLIP image embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unclip.cli import options as opt
from unclip.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from unclip.clip import FrozenCLIP
    from unclip.config import DataConfig

_BATCH = 64


def fit_pca(
    data: Annotated[str, typer.Option(help="Images, as a run's data.source names them.")],
    model: Annotated[str, typer.Option(metavar="DIR|NAME|HUB-ID", help="The model whose CLIP embeds them.")],
    out: Annotated[
        Path | None, typer.Option(help="A folder for the PCA alone (default: the model's, which then names it).")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="How many images.")] = 4096,
    split: Annotated[str, typer.Option(help="The data's split.")] = "train",
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the data without downloading all.")] = False,
    image_column: Annotated[str | None, typer.Option(help="The data's column of images.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="The data's column of captions.")] = None,
    changes: opt.DataChanges = None,
    seed: opt.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images embedded together.")] = _BATCH,
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure the principal components of CLIP's image embeddings on data, for `unclip pca` (unCLIP, section 4).

    They become the part `pca` of the model's folder. A model that is not yours to change takes --out, and `unclip
    bundle --pca` puts such a folder into a new model. Where the data are fewer than --samples, some count more than
    once.
    """
    from unclip.bundle import MANIFEST, PCA, check_part_free, name_part, read_manifest, resolve_model
    from unclip.clip import FrozenCLIP
    from unclip.components import fit_components
    from unclip.inputs import resolve_device

    folder = resolve_model(model)
    parts = read_manifest(folder)["parts"]
    for needed in ("clip", "decoder"):
        if needed not in parts:
            raise UsageError(f"{folder / MANIFEST} names no {needed!r}; it has {', '.join(parts)}")
    if out is None and not (Path(model).expanduser() / MANIFEST).is_file():
        raise UsageError(f"the model {model!r} is not a folder of yours to change; add --out FOLDER")
    target = folder / parts.get(PCA, PCA) if out is None else out
    check_part_free(target, PCA, overwrite)
    place = resolve_device(device)
    source = {
        "source": data,
        "split": split,
        "streaming": streaming,
        "image_column": image_column,
        "caption_column": caption_column,
    }
    from decoder import read_decoder_config

    length = read_decoder_config(folder / parts["decoder"]).embedding_length
    clip = FrozenCLIP.load(str(folder / parts["clip"]), device=place)
    embeddings = _embed(clip, opt.data_config(source, clip.image_size, changes), samples, batch_size, seed, length)
    label = data if not Path(data).exists() else Path(data).absolute().name
    found = fit_components(embeddings, embedding_length=length, data=label)
    found.save(target)
    if out is None and PCA not in parts:
        name_part(folder, PCA, target.name)
    print(target)


def _embed(
    clip: FrozenCLIP, data: DataConfig, samples: int, batch_size: int, seed: int, length: Literal["unit", "raw"]
) -> Tensor:
    """The first samples' image embeddings (N, E), on the CPU."""
    import torch

    from unclip.data import build_batches

    batches = build_batches(data, batch_size=min(batch_size, samples), seed=seed)
    rows: list[Tensor] = []
    while sum(map(len, rows)) < samples:
        pixels = next(batches)["image"].to(clip.device)
        rows.append(clip.encode_image(pixels, unit_length=length == "unit").cpu())
    return torch.cat(rows)[:samples]
