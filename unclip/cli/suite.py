"""The commands that judge what is drawn for known prompts: suite, prior-metrics, pairs, tally."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options as opt
from unclip.cli.groups import BATCH, Sampling
from unclip.cli.output import check_writable
from unclip.cli.progress import Bars, hush_datasets
from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from unclip.config import DataConfig
    from unclip.evaluation.dataset import EvaluationData
    from unclip.evaluation.report import Report
    from unclip.evaluation.suites import Checker, Suite
    from unclip.evaluation.trained import Trained
    from unclip.pipeline import UnCLIP

_DATA = "The data"
_LARGEST = 256

Split = Annotated[str, typer.Option(help="The data's split.", rich_help_panel=_DATA)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of a run's data section.", rich_help_panel=_DATA),
]
Report_ = Annotated[Path, typer.Option("--out", help="The folder for the report; new or empty.")]
JsonReport = Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")]
Size = Annotated[
    int | None,
    typer.Option(parser=opt.pixels, metavar="64|256|1024", help="Edge in pixels (default: the largest up to 256)."),
]
Seed = Annotated[int, typer.Option(min=0, max=opt.LARGEST_SEED, help="Where the seeds begin.")]


@dataclass(frozen=True)
class Asked:
    """What the commands that draw prompts share."""

    size: Size = None
    seed: Seed = 0
    batch_size: opt.BatchSize = BATCH
    device: opt.Device = "auto"
    dtype: opt.Precision = opt.Dtype.float32
    quiet: opt.Quiet = False


def suite(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="general, scenes, emoji, or a YAML file.")],
    model: opt.Model = "emoji",
    adapter: opt.Adapter = None,
    out: Report_ = Path("suite"),
    categories: Annotated[
        list[str] | None, typer.Option("--categories", metavar="NAME …", help="These alone (default: all).")
    ] = None,
    num_images: opt.NumImages = 1,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="emoji: the pictures among which the nearest is looked for. scenes: 'synthetic', what the model was "
            "trained on, to tell combinations trained on from others.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    split: Split = "train",
    changes: Changes = None,
    json_lines: JsonReport = False,
    *,
    sampling: Sampling,
    asked: Asked,
) -> None:
    """Draw a suite of prompts, a sheet a category, and check the pictures where the truth is known.

    scenes: colours, shapes, sizes, number and places of drawn shapes are found in the pixels. emoji: the nearest
    picture of --data, in CLIP's features and in pixels, must be the one asked for. general: sheets to look at.
    Picture k of every prompt is drawn with seed + k. Writes report.json, report.md, report.html and the sheets.
    """
    from unclip.evaluation import suites

    wanted = suites.chosen(suites.load_suite(name), categories or [])
    _check_empty(out)
    if data is not None:
        hush_datasets(asked.quiet)
    trained = _trained(wanted, data, split, changes)
    if wanted.check == "identity" and data is None:
        raise UsageError(f"the suite {name!r} looks for the nearest picture of a data set; name it with --data SOURCE")
    if wanted.check == "none" and data is not None:
        raise UsageError(f"--data is for suites that check pictures, and {name!r} does not; leave it out")
    options = sampling.given()
    if wanted.check == "scenes":
        suites.SceneCheck(wanted)  # its prompts are read before the model is loaded
    system, size = _system(model, asked, adapter)
    system.check_options(**options, size=size)
    checker = _checker(wanted, system, data, split, changes, size)
    with Bars(asked.quiet) as bars:
        results = suites.run(
            system, wanted, checker, num_images=num_images, seed=asked.seed, batch_size=asked.batch_size,
            options={**options, "size": size}, told=lambda done, total: bars("pictures", done, total),
        )  # fmt: skip
    about = {"model": system.name, "size": size, "seed": asked.seed, "options": options, "check": wanted.check}
    if data is not None:
        about["data"] = data
    aspects = checker.aspects if checker is not None else ()
    report = suites.summarise(wanted, results, aspects, trained, about, system.device)
    _write(report, out, json_lines)


def prior_metrics(
    data: Annotated[str, typer.Option(help="Captioned images held out of training, as data.source names them.")],
    model: opt.Model = "emoji",
    out: Report_ = Path("prior-metrics"),
    samples: Annotated[
        int | None, typer.Option(min=2, help="How many (default: all).", rich_help_panel=_DATA)
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The training images, whose mean is the best constant vector (default: the measured ones'). --set "
            "holds for them too, less what is held out.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    train_split: Annotated[str, typer.Option(help="Of --train.", rich_help_panel=_DATA)] = "train",
    split: Split = "train",
    changes: Changes = None,
    prior_guidance: opt.PriorGuidance = None,
    prior_steps: opt.PriorSteps = None,
    seed: Annotated[int, typer.Option(min=0, max=opt.LARGEST_SEED, help="Sample i is drawn with seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Drawn together; changes no figure.")] = 32,
    device: opt.Device = "auto",
    json_lines: JsonReport = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure a prior on captions it has not seen, beside what is had without one, with bootstrap intervals.

    cos(prediction, real), cos(text, real), cos(text, prediction), with unrelated captions, and squared distances. Of a
    run with data.holdout measure --set holdout=… --set part=validation. Writes report.json, report.md and report.html.
    """
    from prior import PriorStage
    from unclip.bundle import read_manifest, resolve_model
    from unclip.clip import FrozenCLIP
    from unclip.evaluation.features import Extractor
    from unclip.evaluation.prior_metrics import measure
    from unclip.inputs import resolve_device

    _check_empty(out)
    hush_datasets(quiet)
    folder = resolve_model(model)
    parts = read_manifest(folder)["parts"]
    if "prior" not in parts:
        raise UsageError(f"{folder} has no prior to measure; it has {', '.join(parts)}")
    config = _config(data, split, changes)
    place = resolve_device(device)
    clip = FrozenCLIP.load(str(folder / parts["clip"]), device=place)
    stage = PriorStage.load(folder / parts["prior"], place)
    options = opt.given(guidance=prior_guidance, steps=prior_steps)
    stage.check_options(steps=prior_steps)
    others = None
    if train is not None:
        kept = {"source": train, "split": train_split, "part": "train"} | ({} if train == data else {"holdout": 0.0})
        others = _open(config.model_copy(update=kept), clip.image_size)
    report = measure(
        _open(config, clip.image_size, samples), Extractor(clip, str(folder / parts["clip"])), stage,
        seed=seed, batch_size=batch_size, train=others, options=options,
    )  # fmt: skip
    report.about["model"] = model
    _write(report, out, json_lines)


def pairs(
    a: Annotated[str, typer.Option("--a", metavar="NAME|DIR|HUB-ID", help="The one model.")] = "emoji",
    b: Annotated[
        str | None, typer.Option("--b", metavar="NAME|DIR|HUB-ID", help="The other (default: the same).")
    ] = None,
    set_a: Annotated[
        list[str] | None, typer.Option("--set-a", metavar="KEY=VALUE", help="How A samples, such as guidance=3.")
    ] = None,
    set_b: Annotated[list[str] | None, typer.Option("--set-b", metavar="KEY=VALUE", help="How B samples.")] = None,
    name: Annotated[
        str | None, typer.Option("--suite", metavar="NAME|FILE", help="The prompts of a suite (default: general).")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts of a text file, one a line.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the sheets; new or empty.")] = Path("pairs"),
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Which side is which (default: OUT-key.json, beside it).")
    ] = None,
    *,
    asked: Asked,
) -> None:
    """Make sheets of two models, or two settings of one, side by side, for voters who must not know which is which.

    Pair i is drawn by both with seed + i; the sides are drawn from the seed too. Voters fill in the folder's votes.csv,
    and `unclip tally` counts. Keep the key from them.
    """
    from unclip.evaluation import suites
    from unclip.evaluation.pairs import VOTES, Side, check, make

    place = key or out.with_name(f"{out.name}-key.json")
    check(out, place)
    check_writable(out)
    check_writable(place.parent)
    if name is not None and prompts_file is not None:
        raise UsageError("both --suite and --prompts-file name what is drawn; expected one of them")
    several = suites.load_suite(name or "general").prompts if prompts_file is None else opt.read_prompts(prompts_file)
    settings = [_settings("--set-a", set_a), _settings("--set-b", set_b)]
    if b is None and settings[0] == settings[1]:
        raise UsageError("A and B are the same model with the same settings; name another with --b or --set-b")
    size = asked.size
    if size is None:
        size = min(_default_size(one) for one in (a, b or a))
    first, _ = _system(a, asked, None, size)
    second = first if b is None else _system(b, asked, None, size)[0]
    named = [a, b or a]
    each = []
    for letter, system, options in zip(named, (first, second), settings, strict=True):
        system.check_options(**options, size=size)
        each.append(Side(letter, system, options))
    with Bars(asked.quiet) as bars:
        make(
            each[0], each[1], several, out, place, size=size, seed=asked.seed, batch_size=asked.batch_size,
            told=lambda done, total: bars("pairs", done, total),
        )  # fmt: skip
    print(out / VOTES)
    print(place)


def tally(
    votes: Annotated[list[Path], typer.Argument(help="Filled-in votes.csv, one a voter.")],
    key: Annotated[Path, typer.Option(help="The key that `unclip pairs` wrote.")],
    out: Annotated[Path | None, typer.Option(help="A folder for the report (default: none is written).")] = None,
    json_lines: JsonReport = False,
) -> None:
    """Count the votes of `unclip pairs`: shares with confidence intervals, and a sign test.

    A tie counts half for each. The interval is Wilson's of one voter's votes; of several it resamples voters and pairs.
    """
    from unclip.evaluation.pairs import count, read_key, report

    if out is not None:
        _check_empty(out)
    found = read_key(key)
    result = report(found, count(found, votes), len(votes))
    if out is not None:
        result.write(out)
    if json_lines:
        print(result.json(), end="")
        return
    print(result.markdown(), end="")


# ---- shared ------------------------------------------------------------------------------------------------


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnclipError(f"--out {out} is there already; name a folder that is new or empty")
    check_writable(out)


def _default_size(model: str) -> int:
    from unclip.bundle import read_manifest, resolve_model
    from unclip.parts import bundle_sizes

    folder = resolve_model(model)
    parts = read_manifest(folder)["parts"]
    sizes = bundle_sizes(folder, parts) if "decoder" in parts else ()
    return max((edge for edge in sizes if edge <= _LARGEST), default=sizes[0] if sizes else _LARGEST)


def _system(model: str, asked: Asked, adapter: list[str] | None, size: int | None = None) -> tuple[UnCLIP, int]:
    """The model up to the size asked for, and that size."""
    import torch

    from unclip.pipeline import UnCLIP

    wanted = size or asked.size or _default_size(model)
    system = UnCLIP.from_pretrained(
        model, device=asked.device, dtype=getattr(torch, asked.dtype.value), size=wanted, adapters=adapter or ()
    )
    return system, wanted


def _config(source: str, split: str, changes: list[str] | None) -> DataConfig:
    from unclip.config import DataConfig, load_overrides

    return load_overrides(DataConfig, {"source": source, "split": split}, changes or [], origin="the data")


def _open(config: DataConfig, size: int, limit: int | None = None) -> EvaluationData:
    from unclip.evaluation.dataset import EvaluationData

    return EvaluationData(config.model_copy(update={"image_size": size}), limit)


def _trained(wanted: Suite, data: str | None, split: str, changes: list[str] | None) -> Trained | None:
    """What of drawn shapes was trained on; None where that is not asked."""
    if wanted.check != "scenes" or data is None:
        return None
    from unclip.evaluation.trained import Trained

    config = _config(data, split, changes)
    if config.source != "synthetic" or config.split != "train" or config.part != "train":
        raise UsageError(
            f"--data is {data!r}, split {config.split!r}; of drawn shapes only what was trained on can be named: "
            "--data synthetic --set synthetic.size=… --set synthetic.max_objects=…"
        )
    return Trained.read(config)


def _checker(
    wanted: Suite, system: UnCLIP, data: str | None, split: str, changes: list[str] | None, size: int
) -> Checker | None:
    if wanted.check == "none":
        return None
    if wanted.check == "scenes":
        from unclip.evaluation.suites import SceneCheck

        return SceneCheck(wanted)
    from unclip.evaluation.identity import Gallery

    assert data is not None
    gallery = Gallery(_open(_config(data, split, changes), size), system.clip)
    gallery.expect(wanted)
    return gallery


def _settings(option: str, given: list[str] | None) -> dict[str, Any]:
    """Fields of SampleOptions from KEY=VALUE."""
    import yaml

    from unclip.inputs import SampleOptions

    options: dict[str, Any] = {}
    for one in given or []:
        key, separator, value = one.partition("=")
        if not separator or key not in SampleOptions.__dataclass_fields__ or key == "size":
            known = ", ".join(name for name in SampleOptions.__dataclass_fields__ if name != "size")
            raise UsageError(f"{option} {one!r} is not of the form KEY=VALUE with one of {known}")
        options[key] = yaml.safe_load(value)
    return options


def _write(report: Report, out: Path, json_lines: bool) -> None:
    """The report into its folder; its figures, or all of it, on stdout."""
    from unclip.evaluation.report import number

    report.write(out)
    if json_lines:
        print(report.json(), end="")
        return
    for figure in report.figures:
        print(f"{figure.label}: {number(figure.value)} {f'({figure.note})' if figure.note else ''}".rstrip())
    print(out / "report.html")
