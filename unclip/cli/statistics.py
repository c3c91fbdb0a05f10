"""`unclip statistics`: what the sampler `analytic` needs to know of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unclip.cli import options as opt
from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from unclip.clip import FrozenCLIP
    from unclip.config import DataConfig, EpsilonStatistics

_BATCH = 64


def statistics(
    model: Annotated[Path, typer.Argument(help="A model folder, or the folder of a prior or decoder.")],
    data: Annotated[str, typer.Option(help="Captioned images, as a run's data.source names them.")],
    part: Annotated[
        Literal["prior", "decoder"], typer.Option(help="The part of a model folder to measure.")
    ] = "prior",
    clip: Annotated[
        str | None, typer.Option(help="The CLIP that a single part was trained with (default: the model folder's).")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many images.")] = 1024,
    steps: Annotated[
        Any,
        typer.Option(parser=opt.steps_option, metavar=opt.STEPS, help="Where it is measured (default: enough)."),
    ] = None,
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
    """Measure E||ε̂||² by timestep on data, for the sampler `analytic` (Analytic-DPM).

    It is written beside the part's weights as analytic.json. A prior whose configured sampler is analytic measures it
    by itself when its training ends.
    """
    from unclip.bundle import MANIFEST, STATISTICS, read_manifest, save_statistics
    from unclip.clip import FrozenCLIP
    from unclip.inputs import resolve_device

    if not model.is_dir():
        raise UnclipError(
            f"there is no folder {model}; statistics are kept beside a part's weights, so name a model's folder or a "
            "part's"
        )
    folder = model
    if (model / MANIFEST).is_file():
        parts = read_manifest(model)["parts"]
        if part not in parts:
            raise UsageError(f"{model} has no {part}; it has {', '.join(parts)}")
        folder = model / parts[part]
        clip = clip or str(model / parts["clip"])
    if clip is None:
        raise UsageError(f"{model} is no whole model, so its CLIP must be named: add --clip")
    if (folder / STATISTICS).exists() and not overwrite:
        raise UnclipError(f"{folder / STATISTICS} exists; pass --overwrite to measure again")
    place = resolve_device(device)
    source = {
        "source": data,
        "split": split,
        "streaming": streaming,
        "image_column": image_column,
        "caption_column": caption_column,
    }
    loaded = FrozenCLIP.load(clip, device=place)
    loaded.cuts.first_only = True
    data_of = partial(opt.data_config, source, changes=changes)
    measured = _measure(part, folder, loaded, data_of, samples, steps, seed, batch_size)
    save_statistics(folder, measured)
    print(folder / STATISTICS)


def _measure(
    part: str,
    folder: Path,
    clip: FrozenCLIP,
    data_of: Callable[[int], DataConfig],
    samples: int,
    steps: Any,
    seed: int,
    batch_size: int,
) -> EpsilonStatistics:
    """Load the part and run it over the data, whose section `data_of` gives for an edge in pixels."""
    from unclip.data import build_batches
    from unclip.training import EmbeddingMemo

    def batches(size: int) -> Any:
        return build_batches(data_of(size), batch_size=min(batch_size, samples), seed=seed)

    if part == "prior":
        from prior import PriorStage
        from prior.analytic import measure_statistics as measure_prior

        prior = PriorStage.load(folder, clip.device)
        memo = EmbeddingMemo(clip, 0, unit_length=prior.config.embedding_length == "unit")
        return measure_prior(prior, memo, batches(clip.image_size), samples, timesteps=steps, seed=seed)
    from decoder import CaptionEncoder, DecoderStage
    from decoder.analytic import measure_statistics as measure_decoder

    decoder = DecoderStage.load(folder, clip.device)
    config = decoder.config
    memo = EmbeddingMemo(
        clip, 0, unit_length=config.embedding_length == "unit", texts=CaptionEncoder(config, clip)
    )
    size = config.image_size
    return measure_decoder(decoder, memo, batches(size), samples, timesteps=steps, seed=seed)
