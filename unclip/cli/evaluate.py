"""`unclip eval`, `unclip sweep` and `unclip memorisation`: how good a model's pictures are, measured on data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.groups import BATCH, Sampling
from unclip.cli.output import check_writable
from unclip.cli.progress import hush_datasets
from unclip.errors import UsageError

if TYPE_CHECKING:
    from unclip.config import DataConfig
    from unclip.evaluation.dataset import EvaluationData
    from unclip.evaluation.drawing import Drawn
    from unclip.evaluation.features import Extractor
    from unclip.evaluation.report import Report

_LARGEST = 256
_DATA = "The data"
_NETWORKS = "What pictures are compared by"


class Features(str, Enum):
    """Whose features distances are measured in."""

    clip = "clip"
    inception = "inception"


class SweepKind(str, Enum):
    """What a sweep varies."""

    guidance = "guidance"
    steps = "steps"
    prior = "prior"


Data = Annotated[
    str, typer.Option(help="Captioned images, as a run's data.source names them.", rich_help_panel=_DATA)
]


@dataclass(frozen=True)
class Measuring:
    """What all measuring commands share."""

    model: opt.Model = "emoji"
    out: Annotated[Path, typer.Option(help="The folder for the report; entered again, it is gone on with.")] = Path(
        "evaluation"
    )
    split: Annotated[str, typer.Option(help="The data's split.", rich_help_panel=_DATA)] = "train"
    streaming: Annotated[bool, typer.Option("--streaming", help="Read shard by shard.", rich_help_panel=_DATA)] = False
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of a run's data section.", rich_help_panel=_DATA),
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Captions, or all if there are fewer.", rich_help_panel=_DATA)] = (
        1000
    )
    real: Annotated[
        int | None, typer.Option(min=1, help="Real pictures (default: all).", rich_help_panel=_DATA)
    ] = None
    num_images: opt.NumImages = 1
    seed: Annotated[
        int, typer.Option(min=0, max=opt.LARGEST_SEED, help="Picture k of caption i: seed + i·num-images + k.")
    ] = 0
    size: Annotated[
        int | None,
        typer.Option(parser=opt.pixels, metavar="64|256|1024", help="Edge in pixels (default: the largest up to 256)."),
    ] = None
    batch_size: opt.BatchSize = BATCH
    adapter: opt.Adapter = None
    device: opt.Device = "auto"
    dtype: opt.Precision = opt.Dtype.float32
    features: Annotated[
        Features,
        typer.Option(help="clip gives FD-CLIP and KD-CLIP, inception FID and KID.", rich_help_panel=_NETWORKS),
    ] = Features.clip
    inception: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Inception's weights (default: torch's cache).", rich_help_panel=_NETWORKS),
    ] = None
    clip: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another CLIP than the model's own.", rich_help_panel=_NETWORKS),
    ] = None
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where features of real pictures are kept.", rich_help_panel=_NETWORKS),
    ] = None
    json_lines: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False
    quiet: opt.Quiet = False
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None  # the launcher passes it


def eval_(
    data: Data,
    pictures: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Measure these captioned images in the place of what the model draws."),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME …", help="Which figures (default: all that can be had)."),
    ] = None,
    reconstructions: Annotated[
        int, typer.Option(min=0, help="Real pictures that are encoded and drawn again; 0 for none.")
    ] = 32,
    lpips: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="LPIPS's backbone (default: AlexNet in torch's cache).", rich_help_panel=_NETWORKS
        ),
    ] = None,
    guidance_text: opt.GuidanceText = None,
    *,
    sampling: Sampling,
    asked: Measuring,
) -> None:
    """Measure how good a model's pictures are (FID and its kin, CLIP score, R@k, diversity, reconstruction).

    Draws a picture for each of --prompts captions of the data and compares them with the real ones. Without Inception
    weights the model's own CLIP compares them, and the figures are called FD-CLIP and KD-CLIP. Writes report.json,
    report.md and report.html. Started by torchrun or deepspeed the processes share the work.
    """
    from unclip.evaluation.drawing import Read
    from unclip.evaluation.features import Lpips
    from unclip.evaluation.figures import METRICS
    from unclip.evaluation.measuring import Evaluation, evaluate

    config = _data(data, asked)
    ready = _Ready(asked, config, sampling.given(guidance_text=guidance_text), drawing=pictures is None)
    source: Any = ready.drawn
    prompts = ready.prompts
    if pictures is not None:
        if asked.num_images > 1:
            raise UsageError("--num-images is of captions that are drawn; with --pictures each picture counts once")
        if given := sampling.given(guidance_text=guidance_text):
            raise UsageError(f"{next(iter(given))} is of what the model draws; leave it out with --pictures")
        prompts = _open(_data(pictures, asked), asked.prompts, ready.size)
        source = Read(prompts, ready.size)
    found = Lpips.find(lpips, ready.extractor.clip.device) if asked.num_images > 1 else None
    evaluation = Evaluation(
        source,
        prompts,
        ready.real,
        ready.extractor,
        ready.size,
        lpips=found,
        system=None if ready.drawn is None else ready.drawn.system,
        reconstructions=reconstructions,
        metrics=metrics or METRICS,
        seed=asked.seed,
    )
    with _Told(asked.quiet) as told:
        report = evaluate(evaluation, asked.out, cache=asked.cache, share=ready.share, told=told)
    _tell(report, asked)


eval_.__name__ = "eval"


def sweep(
    kind: Annotated[SweepKind, typer.Argument(help="What is varied.")],
    data: Data,
    scales: Annotated[
        list[float] | None,
        typer.Option(metavar="S …", help="guidance: the scales (default: 1 1.25 1.5 2 3 4 6)."),
    ] = None,
    of_prior: Annotated[bool, typer.Option("--of-prior", help="guidance: the prior's, not the decoder's.")] = False,
    steps: Annotated[
        list[int] | None,
        typer.Option(metavar="N …", help="steps: the decoder's steps (default: 10 20 50 100 1000)."),
    ] = None,
    etas: Annotated[
        list[str] | None,
        typer.Option(metavar="ETA …", help="steps: of ddim; hat is DDIM's σ̂ (default: 0 0.2 0.5 1 hat)."),
    ] = None,
    samplers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME …", help="steps: which (default: ddim ddpm plms pndm dpmpp_2m unipc)."),
    ] = None,
    guidance_text: opt.GuidanceText = None,
    *,
    sampling: Sampling,
    asked: Measuring,
) -> None:
    """Measure a model over guidance scales, over steps and samplers, or with and without its prior.

    guidance: unCLIP's Figure 11. steps: DDIM's table 1 and the other samplers. prior: unCLIP's Figure 8. All points
    draw the same captions from the same noise. Writes sweep.png and the report; points are kept as they are done.
    """
    from unclip.evaluation import sweeps

    chosen: dict[str, dict[str, Any]] = {
        "guidance": {"--scales": scales, "--of-prior": of_prior or None},
        "steps": {"--steps": steps, "--etas": etas, "--samplers": samplers},
        "prior": {},
    }
    for other, given in chosen.items():
        for name, value in given.items():
            if other != kind.value and value is not None:
                raise UsageError(f"{name} is of `unclip sweep {other}`; leave it out, or sweep over that")
    if kind is SweepKind.guidance:
        wanted = sweeps.guidance_sweep(scales or sweeps.SCALES, prior=of_prior)
    elif kind is SweepKind.steps:
        parsed = [_eta(text) for text in etas] if etas else sweeps.ETAS
        named = {} if samplers is None else {"samplers": samplers}
        wanted = sweeps.steps_sweep(steps or sweeps.STEPS, parsed, **named)
    else:
        wanted = sweeps.prior_sweep()
    ready = _Ready(asked, _data(data, asked), sampling.given(guidance_text=guidance_text))
    assert ready.drawn is not None
    with _Told(asked.quiet) as told:
        report = sweeps.sweep(
            wanted, ready.drawn, ready.prompts, ready.real, ready.extractor, asked.out,
            size=ready.size, cache=asked.cache, share=ready.share, told=told,
        )  # fmt: skip
    _tell(report, asked)


def memorisation(
    data: Data,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Images of the same kind that were not trained on (default: what --set holdout=… keeps back; else "
            "training pictures are compared with each other).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    guidance_text: opt.GuidanceText = None,
    *,
    sampling: Sampling,
    asked: Measuring,
) -> None:
    """Measure whether a model repeats its training pictures: --data is what it was trained on.

    Each sample's nearest training picture, by CLIP's features and by pixels, against how near pictures come that
    were not trained on or, where there are none, how near training pictures lie to one another. Writes the report,
    the distances and a sheet of the closest pairs.
    """
    from unclip.evaluation import measure_memorisation

    if asked.features is Features.inception:
        raise UsageError("memorisation is measured by CLIP's features and pixels; leave --features out")
    config = _data(data, asked)
    other = None
    if held_out is not None:
        other = config.model_copy(update={"source": held_out, "holdout": 0.0, "part": "train"})
    elif config.holdout:
        config = config.model_copy(update={"part": "train"})
        other = config.model_copy(update={"part": "validation"})
    ready = _Ready(asked, config, sampling.given(guidance_text=guidance_text), small=True)
    assert ready.drawn is not None
    with _Told(asked.quiet) as told:
        report = measure_memorisation(
            ready.drawn, ready.prompts, ready.real, None if other is None else _open(other, None, ready.size),
            ready.extractor, asked.out, size=ready.size, cache=asked.cache, share=ready.share, told=told,
        )  # fmt: skip
    _tell(report, asked)


class _Ready:
    """Model, data and networks, loaded in the order in which something may be wrong with them."""

    def __init__(
        self, asked: Measuring, config: DataConfig, options: dict[str, Any],
        *, drawing: bool = True, small: bool = False,
    ) -> None:  # fmt: skip
        from unclip.bundle import read_manifest, resolve_model
        from unclip.evaluation.features import Extractor, Inception
        from unclip.evaluation.metrics import need_eval
        from unclip.evaluation.pieces import Share
        from unclip.evaluation.real import default_cache
        from unclip.parts import bundle_sizes

        need_eval()
        check_writable(asked.out)
        if not (cache := asked.cache or default_cache()).is_dir():  # one that holds all features need not be writable
            check_writable(cache)
        hush_datasets(asked.quiet)
        if asked.inception is not None and asked.features is not Features.inception:
            raise UsageError("--inception names weights that --features clip does not use; add --features inception")
        folder = resolve_model(asked.model)
        parts = read_manifest(folder)["parts"]
        self.share = Share.current()
        self.size = asked.size or _default_size(bundle_sizes(folder, parts) if "decoder" in parts else ())
        place = opt.own_device(asked.device)
        self.prompts = _open(config, asked.prompts, self.size)
        self.real = _open(config, asked.real, self.size)
        inception = Inception(asked.inception, place) if asked.features is Features.inception else None
        self.drawn: Drawn | None = None
        if drawing:
            self.drawn = _drawn(asked, folder, self.size, place, options)
        name = asked.clip or str(folder / parts["clip"])
        self.extractor: Extractor = Extractor(self._clip(name, asked.clip is None, place), name, inception, small=small)

    def _clip(self, name: str, own: bool, place: Any) -> Any:
        from unclip.clip import FrozenCLIP

        if own and self.drawn is not None:
            return self.drawn.system.clip
        return FrozenCLIP.load(name, device=place)


def _drawn(asked: Measuring, folder: Path, size: int, place: Any, options: dict[str, Any]) -> Drawn:
    import torch

    from unclip.evaluation.drawing import Drawn
    from unclip.pipeline import UnCLIP

    system = UnCLIP.from_pretrained(
        folder, device=place, dtype=getattr(torch, asked.dtype.value), size=size, adapters=asked.adapter or ()
    )
    system.check_options(**options, size=size)
    return Drawn(system, {**options, "size": size}, asked.num_images, asked.seed, asked.batch_size)


def _default_size(sizes: tuple[int, ...]) -> int:
    return max((edge for edge in sizes if edge <= _LARGEST), default=sizes[0] if sizes else _LARGEST)


def _data(source: str, asked: Measuring) -> DataConfig:
    from unclip.config import DataConfig, load_overrides

    body = {"source": source, "split": asked.split, "streaming": asked.streaming}
    return load_overrides(DataConfig, body, asked.changes or [], origin="the data")


def _open(config: DataConfig, limit: int | None, size: int) -> EvaluationData:
    from unclip.evaluation.dataset import EvaluationData

    return EvaluationData(config.model_copy(update={"image_size": size}), limit)


def _eta(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _tell(report: Report | None, asked: Measuring) -> None:
    """Where the report is, and its figures; where other processes are still at work, that."""
    from unclip.evaluation.report import number

    if report is None:
        print("this process is done; the last one writes the report", file=sys.stderr)
        return
    if asked.json_lines:
        print(report.json(), end="")
        return
    for figure in report.figures:
        reference = "" if figure.reference is None else f" (real pictures: {number(figure.reference)})"
        print(f"{figure.label}: {number(figure.value, figure.error)}{reference}")
    print(asked.out / "report.html")


class _Told:
    """Counts the pieces of each kind of work that are done, on stderr where that is a terminal."""

    def __init__(self, quiet: bool) -> None:
        self._silent = quiet or not sys.stderr.isatty()
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, stage: str, _number: int) -> None:
        if self._silent:
            return
        if stage != self._stage:
            self._close()
            from tqdm import tqdm

            self._stage, self._bar = stage, tqdm(desc=stage, unit=" pieces", file=sys.stderr, leave=False)
        if self._bar is not None:
            self._bar.update()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
