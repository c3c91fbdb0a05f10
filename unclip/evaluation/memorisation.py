"""Does a model repeat its training pictures? Each sample's nearest training picture, against how near pictures come
that it never saw.

unCLIP's authors looked for memorisation by eye; here held-out pictures of the same kind are the measure, since pictures
of one kind lie close to one another whether they are copied or not. Where everything was trained on, the training
pictures are measured against each other, each left out in its turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.data.lettering import labelled_sheet
from unclip.errors import UsageError
from unclip.evaluation.dataset import EvaluationData, describe
from unclip.evaluation.drawing import THUMBNAIL, SampleFeatures, Source
from unclip.evaluation.features import Arrays, Extractor
from unclip.evaluation.gallery import to_picture
from unclip.evaluation.measuring import Told, nobody
from unclip.evaluation.metrics import mean_and_error, nearest, need_eval
from unclip.evaluation.pieces import Share, begin
from unclip.evaluation.real import RealFeatures, default_cache
from unclip.evaluation.report import Figure, Report, Section, made_with, plot

PERCENTILE = 1.0
"""Of the baseline's distances; what lies below it is counted as suspiciously close."""
SPACES = {"clip": "CLIP features", "pixels": "pixels"}
_PAIRS = 16
_QUANTILES = (1, 5, 25, 50, 75, 95)
HELD_OUT, EACH_OTHER = "held-out pictures", "training pictures among themselves"


@dataclass(frozen=True)
class Distances:
    """In one space: of each sample, and of each picture of the baseline, the distance to the nearest training picture,
    and of samples its index.
    """

    samples: Tensor
    nearest: Tensor
    baseline: Tensor

    @property
    def threshold(self) -> float:
        """The baseline's first percentile."""
        return float(torch.quantile(self.baseline, PERCENTILE / 100))

    @property
    def share(self) -> float:
        """Of the samples those that lie closer than that; without memorisation about a hundredth."""
        return float((self.samples < self.threshold).double().mean())


def distances(samples: Tensor, train: Tensor, held_out: Tensor | None) -> Distances:
    """Euclidean ones between features (N, D), in float64; without `held_out` the baseline is each training picture's
    distance to the nearest other one. UsageError: there is too little to compare.
    """
    for name, features in (("samples", samples), ("training pictures", train), (HELD_OUT, held_out)):
        if features is not None and not len(features):
            raise UsageError(f"there are no {name} to compare")
    if held_out is None and len(train) < 2:
        raise UsageError("there is one training picture, and none to compare it with; name others with --held-out")
    baseline = nearest(train, train, others=True) if held_out is None else nearest(held_out, train)
    found, place = nearest(samples, train)
    return Distances(found, place, baseline[0])


def without_copies(seen: Arrays) -> Arrays:
    """The first of all training pictures that are the same in every pixel of 32×32: a copy would be its own nearest."""
    first: dict[bytes, int] = {}
    for place, small in enumerate(seen["small"]):
        first.setdefault(small.tobytes(), place)
    kept = np.fromiter(first.values(), np.int64)
    return {name: values[kept] for name, values in seen.items()}


def space(arrays: Arrays, name: str) -> Tensor:
    """Features of one of SPACES: CLIP's of unit length, or pictures of 32×32 in [0, 1], whose distance is the root mean
    square over all values.
    """
    if name == "clip":
        return torch.from_numpy(arrays["clip"]).double()
    small = torch.from_numpy(arrays["small"]).flatten(1).double() / 255
    return small / small.shape[1] ** 0.5


def measure_memorisation(
    source: Source,
    prompts: EvaluationData,
    train: EvaluationData,
    held_out: EvaluationData | None,
    extractor: Extractor,
    out: Path,
    *,
    size: int,
    cache: Path | None = None,
    share: Share | None = None,
    told: Told = nobody,
) -> Report | None:
    """Do this process's share and, where all is done then, write the report to `out`, with distances.png and the
    closest pairs; None where others are at work. `extractor` is one with `small`.

    `prompts` should be captions of the training pictures: those are what a model can repeat. Without `held_out` the
    training pictures are compared with each other, copies left aside. Raises UnclipError: `out` was begun with other
    settings, a package is missing.
    """
    need_eval()
    share = Share() if share is None else share
    about_data = {"train": describe(train.config), "held out": None if held_out is None else describe(held_out.config)}
    where = {**describe(prompts.config), "limit": prompts.limit}
    settings = {"source": source.identity, "prompts": where, "network": extractor.identity, "size": size, **about_data}
    place = cache or default_cache()
    begin(out, {"kind": "memorisation", **settings}, prompts.config, place)
    known = RealFeatures(train, extractor, size, place, out)
    unknown = None if held_out is None else RealFeatures(held_out, extractor, size, place, out)
    samples = SampleFeatures(prompts, source, extractor, out / "pieces")
    known.make(share, lambda number: told("training pictures", number))
    if unknown is not None:
        unknown.make(share, lambda number: told(HELD_OUT, number))
    samples.make(share, lambda number: told("samples", number))
    if not (known.complete and (unknown is None or unknown.complete) and samples.complete):
        return None
    drawn, seen, unseen = samples.load(), known.load(), None if unknown is None else unknown.load()
    if not len(drawn.get("number", ())):
        raise UsageError(f"there is no sample to compare: {prompts.tally.report()}")
    total = len(seen["number"])
    if unseen is None:
        seen = without_copies(seen)
    found = {
        name: distances(space(drawn, name), space(seen, name), None if unseen is None else space(unseen, name))
        for name in SPACES
    }
    copies = total - len(seen["number"]) if unseen is None else _shared(found)
    other = EACH_OTHER if unseen is None else HELD_OUT
    compared = "none"
    if held_out is not None and unseen is not None:
        compared = f"{len(unseen['number'])} of {held_out.config.source}"
    about = {
        "pictures": source.identity.get("model", {}).get("name") or prompts.config.source,
        "samples": f"{len(drawn['clip'])} of {len(drawn['number'])} captions of {prompts.config.source}",
        "training pictures": f"{total} of {train.config.source}",
        HELD_OUT: compared,
        "size": f"{size} px",
        "compared by": f"{extractor.clip_label}; pixels of 32×32",
        "settings": source.identity,
        "made with": made_with(extractor.clip.device),
    }
    figures = [figure for name, one in found.items() for figure in _figures(name, one, other)]
    values = {"closest": [_pair(index, found, drawn, seen) for index in _closest(found["clip"])]}
    sections = [
        Section("Distances", _text(copies, other),
                picture=("distances", plot(2, lambda axes: _draw(axes, found, other), columns=2))),
        _quantiles(found, other),
        _pairs(found, drawn, seen, train, source.num_images),
    ]  # fmt: skip
    report = Report(f"Memorisation of {about['pictures']}", about, figures, sections, values)
    report.write(out)
    return report


def _figures(name: str, one: Distances, other: str) -> list[Figure]:
    label, count = SPACES[name], len(one.samples)
    error = (max(one.share * (1 - one.share), 0.0) / count) ** 0.5
    note = f"{PERCENTILE:g} % would be where nothing is copied; threshold {one.threshold:.4g}"
    mean, spread = mean_and_error(one.samples)
    reference = mean_and_error(one.baseline)[0]
    return [
        Figure(f"share_{name}", f"Closer than the baseline's 1st percentile, {label}, %", 100 * one.share, "lower",
               100 * error, PERCENTILE, note),
        Figure(f"distance_{name}", f"Distance to the nearest training picture, {label}", mean, "", spread, reference,
               f"real: of {other}"),
    ]  # fmt: skip


def _shared(found: dict[str, Distances]) -> int:
    """Zero distances of held-out pictures: they are in the training data too."""
    return int((found["pixels"].baseline == 0).sum())


def _text(copies: int, other: str) -> str:
    text = (
        f"How far samples, and {other}, lie from the nearest training picture. Samples that heap up left of the dashed "
        "line, the baseline's first percentile, are closer than pictures of this kind are by chance."
    )
    if copies and other == HELD_OUT:
        text += f" {copies} held-out pictures are training pictures themselves, which makes the baseline too lenient."
    elif copies:
        text += f" {copies} training pictures are copies of others, and left aside."
    return text


def _draw(axes: list[Any], found: dict[str, Distances], other: str) -> None:
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        top = float(max(one.samples.max(), one.baseline.max())) * 1.02 + 1e-9
        bins = np.linspace(0, top, 50)
        axis.hist(one.baseline.numpy(), bins, density=True, alpha=0.5, color="C7", label=other)
        axis.hist(one.samples.numpy(), bins, density=True, alpha=0.6, color="C0", label="samples")
        axis.axvline(one.threshold, color="black", linestyle="--", linewidth=1, label="the baseline's 1st percentile")
        axis.set_title(f"to the nearest training picture, {SPACES[name]}", fontsize=10)
        axis.set_xlabel("distance", fontsize=8)
        axis.legend(fontsize=7)


def _quantiles(found: dict[str, Distances], other: str) -> Section:
    points = torch.tensor(_QUANTILES, dtype=torch.float64) / 100
    rows = [
        [f"{who}, {SPACES[name]}", *torch.quantile(values, points).tolist()]
        for name, one in found.items()
        for who, values in (("samples", one.samples), (other, one.baseline))
    ]
    return Section("Percentiles of the distances", "", (["", *(f"{q} %" for q in _QUANTILES)], rows))


def _closest(one: Distances) -> list[int]:
    return [int(index) for index in one.samples.argsort(stable=True)[:_PAIRS]]


def _pair(index: int, found: dict[str, Distances], drawn: Arrays, seen: Arrays) -> dict[str, Any]:
    each = len(drawn["clip"]) // len(drawn["number"])
    body: dict[str, Any] = {"sample": index, "caption": str(drawn["caption"][index // each])}
    for name, one in found.items():
        place = int(one.nearest[index])
        body[name] = {
            "distance": float(one.samples[index]),
            "training": int(seen["number"][place]),
            "training_caption": str(seen["caption"][place]),
        }
    return body


def _pairs(
    found: dict[str, Distances], drawn: Arrays, seen: Arrays, train: EvaluationData, each: int
) -> Section:
    """The samples closest to a training picture by CLIP, each with its nearest by CLIP and by pixels."""
    chosen = _closest(found["clip"])
    numbers = {name: [int(seen["number"][int(one.nearest[i])]) for i in chosen] for name, one in found.items()}
    fetched = list(train.fetch(number for several in numbers.values() for number in several).values())
    kept, pixels = train.pixels(fetched, THUMBNAIL)
    pictures = {sample.number: to_picture(p.numpy()) for sample, p in zip(kept, pixels, strict=True)}
    rows: list[list[Any]] = []
    labels = []
    for place, index in enumerate(chosen):
        caption = str(drawn["caption"][index // each])
        labels.append(caption if len(caption) < 28 else f"{caption[:26]}…")
        row: list[Any] = [to_picture(drawn["picture"][index])]
        for name, one in found.items():
            row += [pictures.get(numbers[name][place]), f"{float(one.samples[index]):.3f}"]
        rows.append(row)
    heads = ["sample", "nearest\nby CLIP", "", "nearest\nby pixels", ""]
    alt = f"Rows of a sample and its nearest training pictures: {'; '.join(labels)}."
    text = "The samples closest to a training picture by CLIP's features, with that picture, and the nearest by pixels."
    return Section("Closest pairs", text, picture=("closest", labelled_sheet(rows, labels, heads)), alt=alt)
