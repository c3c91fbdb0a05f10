"""How a figure changes with the way a model samples: over guidance scales, steps and samplers, and with or without the
prior. Each point is kept when it is done, so that a sweep goes on where it was killed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.data.images import make_grid
from unclip.data.lettering import labelled_sheet
from unclip.diffusion import SAMPLERS
from unclip.diffusion.samplers import ddpm_large
from unclip.errors import UnclipError, UsageError
from unclip.evaluation.dataset import EvaluationData, describe
from unclip.evaluation.drawing import Drawn, SampleFeatures
from unclip.evaluation.features import Arrays, Extractor
from unclip.evaluation.figures import figures_of
from unclip.evaluation.gallery import to_picture
from unclip.evaluation.measuring import Told, nobody
from unclip.evaluation.metrics import need_eval
from unclip.evaluation.pieces import Share, begin
from unclip.evaluation.real import RealFeatures, default_cache
from unclip.evaluation.report import Figure, Report, Section, made_with, number, plot
from unclip.probing import CONDITIONINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
STEPS = (10, 20, 50, 100, 1000)
ETAS: tuple[float | str, ...] = (0.0, 0.2, 0.5, 1.0, "hat")
"""Of DDIM's table 1; "hat" is its σ̂."""
_MEASURED = ("frechet", "kernel", "inception", "precision", "clip")
_SHOWN = 8


@dataclass(frozen=True)
class Point:
    """One way to sample: what it is called in a row of the table, its line in the plot and its place on that."""

    name: str
    line: str
    x: float
    options: dict[str, Any] = field(default_factory=dict)
    conditioning: Any = "prior"

    @property
    def folder(self) -> str:
        plain = self.name.replace("σ̂", "hat").replace("η", "eta").replace(" = ", "-")
        return re.sub(r"[^\w.]+", "-", plain)


@dataclass(frozen=True)
class Sweep:
    """Its points, and how they are drawn: over a scale of numbers, or side by side."""

    title: str
    axis: str
    points: list[Point]
    logarithmic: bool = False
    note: str = ""


def guidance_sweep(scales: Sequence[float] = SCALES, *, prior: bool = False) -> Sweep:
    """Over the decoder's guidance scale (unCLIP, Figure 11), or the prior's. UsageError: none, twice, or negative."""
    _check_distinct("guidance scales", scales)
    option, stage = ("prior_guidance", "prior") if prior else ("guidance", "decoder")
    points = [Point(f"{option} {scale:g}", stage, scale, {option: scale}) for scale in scales]
    return Sweep(f"guidance scale of the {stage}", "guidance scale", points, note="unCLIP, Figure 11")


def steps_sweep(
    steps: Sequence[int] = STEPS,
    etas: Sequence[float | str] = ETAS,
    samplers: Sequence[str] = ("ddim", "ddpm", "plms", "pndm", "dpmpp_2m", "unipc"),
) -> Sweep:
    """Over the number of the decoder's steps: of the sampler ddim a line for each eta (DDIM, table 1), "hat" being its
    larger variance σ̂, of each other sampler one. UsageError: unknown samplers or etas, none, or twice.
    """
    _check_distinct("numbers of steps", steps)
    _check_distinct("samplers", samplers)
    for name in samplers:
        if name not in SAMPLERS:
            raise UsageError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    lines: list[tuple[str, dict[str, Any]]] = []
    for sampler in samplers:
        if sampler != "ddim":
            lines.append((sampler, {"sampler": sampler}))
            continue
        _check_distinct("etas", etas)
        lines += [(f"ddim η = {_eta(eta)}", _with_eta(eta)) for eta in etas]
    points = [
        Point(f"{name}, {count} steps", name, count, {**options, "decoder_steps": count})
        for name, options in lines
        for count in steps
    ]
    note = "DDIM, table 1; σ̂ is its larger variance"
    return Sweep("the decoder's steps", "steps", points, logarithmic=True, note=note)


def prior_sweep() -> Sweep:
    """The caption alone, CLIP's text embedding in place of an image's, and the prior (unCLIP, Figure 8 and §5.1)."""
    points = [Point(way, way, place, {}, way) for place, way in enumerate(CONDITIONINGS)]
    return Sweep("what the decoder is conditioned on", "", points, note="unCLIP, Figure 8 and §5.1")


def sweep(
    asked: Sweep,
    drawn: Drawn,
    prompts: EvaluationData,
    real: EvaluationData,
    extractor: Extractor,
    out: Path,
    *,
    size: int,
    cache: Path | None = None,
    share: Share | None = None,
    told: Told = nobody,
) -> Report | None:
    """Do this process's share of every point and, where all are done then, write the report to `out`, with sweep.png;
    None where others are at work. Entered again, it goes on; more points may be added.

    Raises UnclipError: `out` was begun with other settings or data, an option that the model cannot follow.
    """
    need_eval()
    share = Share() if share is None else share
    sources = [_at(drawn, point) for point in asked.points]  # refuses what cannot be drawn before anything is written
    network = {"network": extractor.identity, "size": size}
    where = {**describe(prompts.config), "limit": prompts.limit}
    cache = cache or default_cache()
    begin(out, {"kind": asked.title, "source": drawn.identity, "prompts": where, **network}, prompts.config, cache)
    truth = RealFeatures(real, extractor, size, cache, out)
    truth.make(share, lambda number: told("real pictures", number))
    points = []
    for point, source in zip(asked.points, sources, strict=True):
        samples = SampleFeatures(prompts, source, extractor, out / "points" / point.folder)
        samples.make(share, lambda number, name=point.name: told(name, number))  # type: ignore[misc]
        points.append(samples)
    if not (truth.complete and all(samples.complete for samples in points)):
        return None
    arrays = truth.load()
    results = [samples.load() for samples in points]
    fitted = truth.gaussian
    found = [
        figures_of(extractor, one, arrays, drawn.num_images, _MEASURED, None, fitted, references=False)
        for one in results
    ]
    report = _report(asked, drawn, extractor, size, found, results, len(arrays["number"]), real)
    report.write(out)
    return report


def _report(
    asked: Sweep,
    drawn: Drawn,
    extractor: Extractor,
    size: int,
    found: list[list[Figure]],
    results: list[Arrays],
    count: int,
    real: EvaluationData,
) -> Report:
    about = {
        "pictures": drawn.system.name,
        "after": asked.note,
        "prompts": f"{len(results[0]['number'])} captions, {drawn.num_images} of each",
        "real pictures": f"{count} of {real.config.source}",
        "size": f"{size} px",
        "compared by": f"{extractor.names.network}; captions by {extractor.clip_label}",
        "settings": drawn.identity,
        "made with": made_with(extractor.clip.device),
    }
    names = [figure.label for figure in found[0]]
    rows = [
        [point.name, *(number(figure.value) for figure in figures)]
        for point, figures in zip(asked.points, found, strict=True)
    ]
    shown = [figure for figure in found[0] if figure.key != "clip_score_other"]
    picture = plot(len(shown), lambda axes: _draw(axes, asked, found, [figure.key for figure in shown]))
    values = {
        "points": [
            {"name": point.name, "line": point.line, asked.axis or "place": point.x}
            | {figure.key: figure.value for figure in figures}
            for point, figures in zip(asked.points, found, strict=True)
        ]
    }
    sheet = _sheet(asked, results)
    labels = ", ".join(figure.label for figure in shown)
    alt = f"A row of pictures for each of {', '.join(point.name for point in asked.points)}."
    text = f"{extractor.names.frechet} and {extractor.names.kernel} are {extractor.names.note()}."
    sections = [
        Section("Curves", text, picture=("sweep", picture), alt=f"{labels} by {asked.title}, whose numbers follow."),
        *_tables(asked, found),
        Section("Points", "", ([asked.axis or "condition", *names], rows)),
        Section("Pictures", "The first prompts, from the same noise.", None, ("pictures", sheet), alt=alt),
    ]
    return Report(f"{drawn.system.name} by {asked.title}", about, [], sections, values)


def _tables(asked: Sweep, found: list[list[Figure]]) -> list[Section]:
    """Of several lines a table of the Fréchet distance and one of the CLIP score, laid out as DDIM's table 1: a row a
    line, a column a place on the axis.
    """
    lines = list(dict.fromkeys(point.line for point in asked.points))
    places = sorted({point.x for point in asked.points})
    if not asked.axis or len(lines) < 2 or len(places) < 2:
        return []
    sections = []
    for key in ("frechet", "clip_score"):
        chosen = {
            (point.line, point.x): next(figure for figure in figures if figure.key == key)
            for point, figures in zip(asked.points, found, strict=True)
        }
        label = next(iter(chosen.values())).label
        told = {place: number(figure.value) for place, figure in chosen.items()}
        rows = [[line, *(told.get((line, x), "") for x in places)] for line in lines]
        sections.append(Section(f"{label} by {asked.axis}", "", ([asked.axis, *(f"{x:g}" for x in places)], rows)))
    return sections


def _draw(axes: list[Axes], asked: Sweep, found: list[list[Figure]], keys: list[str]) -> None:
    lines = list(dict.fromkeys(point.line for point in asked.points))
    for axis, key in zip(axes, keys, strict=True):
        values = [next(figure for figure in figures if figure.key == key) for figures in found]
        axis.set_title(values[0].label + {"lower": " ↓", "higher": " ↑", "": ""}[values[0].better], fontsize=10)
        if not asked.axis:
            axis.bar([point.name for point in asked.points], [one.value for one in values], color="C0")
            axis.tick_params(axis="x", labelsize=8)
            continue
        for line in lines:
            pairs = sorted(
                (point.x, one.value) for point, one in zip(asked.points, values, strict=True) if point.line == line
            )
            axis.plot(*zip(*pairs, strict=True), marker="o", markersize=3, linewidth=1.2, label=line)
        axis.set_xlabel(asked.axis, fontsize=8)
        if asked.logarithmic:
            axis.set_xscale("log")
            ticks = sorted({point.x for point in asked.points})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
    if asked.axis and len(lines) > 1:
        axes[0].legend(fontsize=6)


def _sheet(asked: Sweep, results: list[Arrays]) -> Image:
    """A row for each point, a column for each of the first prompts."""
    rows = []
    for arrays in results:
        each = len(arrays["picture"]) // len(arrays["number"])
        rows.append([to_picture(picture) for picture in arrays["picture"][: _SHOWN * each : each]])
    if len(rows) > 1:
        return labelled_sheet(rows, [point.name for point in asked.points])
    return make_grid(rows[0], _SHOWN)


def _at(drawn: Drawn, point: Point) -> Drawn:
    """The source of one point. UsageError, UnclipError: what the model cannot follow, before anything is drawn."""
    taken = [name for name in point.options if name in drawn.options]
    if taken:
        raise UsageError(f"{taken[0]} is what the sweep varies; leave it out")
    system = drawn.system
    if point.conditioning == "prior" and system.prior is None:
        raise UnclipError("this model has no prior, so it cannot start from a prompt; a sweep needs one")
    if point.options.get("sampler") == "analytic" and system.decoder.process.statistics is None:
        raise UnclipError("the sampler analytic needs statistics of the decoder; measure them with `unclip statistics`")
    options = {**drawn.options, **point.options}
    system.check_options(**options)
    return replace(drawn, options=options, conditioning=point.conditioning)


def _with_eta(eta: float | str) -> dict[str, Any]:
    if eta == "hat":
        return {"sampler": ddpm_large}
    if isinstance(eta, str) or not 0 <= eta <= 1:
        raise UsageError(f"the eta {eta!r} is unknown; expected numbers from 0 to 1, or hat for DDIM's σ̂")
    return {"sampler": "ddim", "eta": eta}


def _eta(eta: float | str) -> str:
    return "σ̂" if eta == "hat" else f"{eta:g}" if isinstance(eta, (int, float)) else str(eta)


def _check_distinct(what: str, values: Sequence[Any]) -> None:
    if not values:
        raise UsageError(f"there are no {what} to sweep over; name some")
    twice = [value for value in values if list(values).count(value) > 1]
    if twice:
        raise UsageError(f"of the {what} to sweep over {twice[0]} is named twice; name each once")
