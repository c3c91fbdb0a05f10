"""Does a model repeat its training pictures? Each sample's nearest training picture, against how near pictures come
that it never saw.

unCLIP's authors looked for memorisation by eye; here held-out pictures of the same kind are the measure, since pictures
of one kind lie close to one another whether they are copied or not.
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
"""Of the held-out pictures' distances; what lies below it is counted as suspiciously close."""
SPACES = {"clip": "CLIP features", "pixels": "pixels"}
_PAIRS = 16
_QUANTILES = (1, 5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Distances:
    """In one space: of each sample, and of each held-out picture, the distance to the nearest training picture, and of
    samples its index.
    """

    samples: Tensor
    nearest: Tensor
    held_out: Tensor

    @property
    def threshold(self) -> float:
        """The baseline's first percentile."""
        return float(torch.quantile(self.held_out, PERCENTILE / 100))

    @property
    def share(self) -> float:
        """Of the samples those that lie closer than that; without memorisation about a hundredth."""
        return float((self.samples < self.threshold).double().mean())


def distances(samples: Tensor, train: Tensor, held_out: Tensor) -> Distances:
    """Euclidean ones between features (N, D), in float64. UsageError: one of the three is empty."""
    for name, features in (("samples", samples), ("training pictures", train), ("held-out pictures", held_out)):
        if not len(features):
            raise UsageError(f"there are no {name} to compare")
    found, place = nearest(samples, train)
    return Distances(found, place, nearest(held_out, train)[0])


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
    held_out: EvaluationData,
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

    `prompts` should be captions of the training pictures: those are what a model can repeat. Raises UnclipError: `out`
    was begun with other settings, a package is missing.
    """
    need_eval()
    share = Share() if share is None else share
    about_data = {"train": describe(train.config), "held out": describe(held_out.config)}
    where = {**describe(prompts.config), "limit": prompts.limit}
    settings = {"source": source.identity, "prompts": where, "network": extractor.identity, "size": size, **about_data}
    begin(out, {"kind": "memorisation", **settings})
    place = cache or default_cache()
    known, unknown = RealFeatures(train, extractor, size, place), RealFeatures(held_out, extractor, size, place)
    samples = SampleFeatures(prompts, source, extractor, out / "pieces")
    known.make(share, lambda number: told("training pictures", number))
    unknown.make(share, lambda number: told("held-out pictures", number))
    samples.make(share, lambda number: told("samples", number))
    if not (known.complete and unknown.complete and samples.complete):
        return None
    drawn, seen, unseen = samples.load(), known.load(), unknown.load()
    if not len(drawn.get("number", ())):
        raise UsageError(f"there is no sample to compare: {prompts.tally.report()}")
    found = {name: distances(space(drawn, name), space(seen, name), space(unseen, name)) for name in SPACES}
    same = _shared(found)
    about = {
        "pictures": source.identity.get("model", {}).get("name") or prompts.config.source,
        "samples": f"{len(drawn['clip'])} of {len(drawn['number'])} captions of {prompts.config.source}",
        "training pictures": f"{len(seen['number'])} of {train.config.source}",
        "held-out pictures": f"{len(unseen['number'])} of {held_out.config.source}",
        "size": f"{size} px",
        "compared by": f"{extractor.clip_label}; pixels of 32×32",
        "settings": source.identity,
        "made with": made_with(extractor.clip.device),
    }
    figures = [figure for name, one in found.items() for figure in _figures(name, one)]
    values = {"closest": [_pair(index, found, drawn, seen) for index in _closest(found["clip"])]}
    sections = [
        Section("Distances", _text(same), picture=("distances", plot(2, lambda axes: _draw(axes, found), columns=2))),
        _quantiles(found),
        _pairs(found, drawn, seen, train, source.num_images),
    ]
    report = Report(f"Memorisation of {about['pictures']}", about, figures, sections, values)
    report.write(out)
    return report


def _figures(name: str, one: Distances) -> list[Figure]:
    label, count = SPACES[name], len(one.samples)
    error = (max(one.share * (1 - one.share), 0.0) / count) ** 0.5
    note = f"{PERCENTILE:g} % would be where nothing is copied; threshold {one.threshold:.4g}"
    mean, spread = mean_and_error(one.samples)
    reference = mean_and_error(one.held_out)[0]
    return [
        Figure(f"share_{name}", f"Closer than the baseline's 1st percentile, {label}, %", 100 * one.share, "lower",
               100 * error, PERCENTILE, note),
        Figure(f"distance_{name}", f"Distance to the nearest training picture, {label}", mean, "", spread, reference,
               "real: of held-out pictures"),
    ]  # fmt: skip


def _shared(found: dict[str, Distances]) -> int:
    """Zero distances of held-out pictures: they are in the training data too."""
    return int((found["pixels"].held_out == 0).sum())


def _text(same: int) -> str:
    text = (
        "How far samples and held-out pictures lie from their nearest training picture. Samples that heap up left of "
        "the dashed line, the held-out pictures' first percentile, are closer than pictures of this kind are by chance."
    )
    if same:
        text += f" {same} held-out pictures are training pictures themselves, which makes the baseline too lenient."
    return text


def _draw(axes: list[Any], found: dict[str, Distances]) -> None:
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        top = float(max(one.samples.max(), one.held_out.max())) * 1.02 + 1e-9
        bins = np.linspace(0, top, 50)
        axis.hist(one.held_out.numpy(), bins, density=True, alpha=0.5, color="C7", label="held-out pictures")
        axis.hist(one.samples.numpy(), bins, density=True, alpha=0.6, color="C0", label="samples")
        axis.axvline(one.threshold, color="black", linestyle="--", linewidth=1, label="1st percentile held out")
        axis.set_title(f"to the nearest training picture, {SPACES[name]}", fontsize=10)
        axis.set_xlabel("distance", fontsize=8)
        axis.legend(fontsize=7)


def _quantiles(found: dict[str, Distances]) -> Section:
    points = torch.tensor(_QUANTILES, dtype=torch.float64) / 100
    rows = [
        [f"{who}, {SPACES[name]}", *torch.quantile(values, points).tolist()]
        for name, one in found.items()
        for who, values in (("samples", one.samples), ("held-out pictures", one.held_out))
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
