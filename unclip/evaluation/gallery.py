"""The plots and pictures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.data.images import make_grid
from unclip.evaluation import metrics as m
from unclip.evaluation.dataset import EvaluationData
from unclip.evaluation.drawing import THUMBNAIL
from unclip.evaluation.features import Arrays, Extractor
from unclip.evaluation.figures import METRICS, clip_cosines, retrieved, subset
from unclip.evaluation.report import Cell, Section, plot

_SHOWN = 48
_EXTREMES = 8
_KS = (1, 2, 3, 5, 10, 20, 50)


def score_plots(
    extractor: Extractor,
    drawn: Arrays,
    real: Arrays,
    each: int,
    fitted: Callable[[Tensor], dict[str, Tensor]],
    values: dict[str, Any],
    wanted: Sequence[str] = METRICS,
) -> list[Section]:
    """How the CLIP scores are spread, R@k by k, and the Fréchet distance by the number of samples, which it depends on.
    The curves go into `values` too.
    """
    spread = {"samples": clip_cosines(drawn, each), "real pictures": clip_cosines(real, 1)}
    if len(drawn["number"]) > 1:
        spread["samples, another caption"] = clip_cosines(drawn, each, 1)
    as_many, recalls = subset(real, len(drawn["number"])), dict[str, dict[int, float]]()
    if "retrieval" in wanted:
        recalls = {"samples": retrieved(drawn, each, _KS), "real pictures": retrieved(as_many, 1, _KS)}
    counts, distances = by_count(extractor.compared(drawn), fitted(extractor.compared(real)))
    values["curves"] = {
        "retrieval": {name: {str(k): value for k, value in found.items()} for name, found in recalls.items()},
        "frechet_by_count": {str(count): value for count, value in zip(counts, distances, strict=True)},
    }
    names = extractor.names

    def draw(axes: list[Any]) -> None:
        low = min(float(one.min()) for one in spread.values())
        high = max(float(one.max()) for one in spread.values())
        bins = np.linspace(low - 1e-3, high + 1e-3, 40)
        for name, cosines in spread.items():
            axes[0].hist(cosines.numpy(), bins, density=True, alpha=0.5, label=name)
        axes[0].set(title="cosine of picture and caption", xlabel="cosine", ylabel="density")
        axes[0].legend(fontsize=7)
        axes[1].plot(counts, distances, marker="o", markersize=3)
        axes[1].set(title=f"{names.frechet} by number of samples", xlabel="samples")
        axes[1].set_ylim(bottom=0)
        for name, found in recalls.items():
            axes[2].plot(list(found), list(found.values()), marker="o", markersize=3, label=name)
            axes[2].set(title="R@k", xlabel="k", ylim=(0, 1.03))
            axes[2].legend(fontsize=7)

    text = (
        f"{names.frechet} is {names.note()}. A Fréchet distance falls as the samples become more, so that figures are "
        "comparable for equal numbers alone."
    )
    told = ["cosine of picture and caption", f"{names.frechet} by number of samples", *(["R@k"] if recalls else [])]
    alt = f"Plots: {'; '.join(told)}. Their numbers stand in report.json."
    return [Section("Curves", text, picture=("curves", plot(len(told), draw)), alt=alt)]


def by_count(samples: Tensor, real: dict[str, Tensor]) -> tuple[list[int], list[float]]:
    """The Fréchet distance of an eighth, a quarter, a half and all of the samples."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(samples)))
    counts = [count for part in (8, 4, 2, 1) if (count := len(samples) // part) >= 2]
    return counts, [m.frechet_of(m.gaussian(samples[order[:count]]), real) for count in counts]


def gallery(drawn: Arrays, truth: EvaluationData | None, each: int) -> list[Section]:
    """The first samples beside the real pictures of their captions, and those that CLIP finds closest to and farthest
    from their captions.
    """
    cosines = clip_cosines(drawn, each).reshape(-1, each)
    pictures = drawn["picture"].reshape(len(cosines), each, *drawn["picture"].shape[1:])

    def cell(i: int, before: list[Image.Image]) -> Cell:
        shown = [*before, *map(to_picture, pictures[i])]
        names = ["real picture"] * len(before) + ["sample"] * each
        return Cell(shown, f"{drawn['caption'][i]} · {float(cosines[i].mean()):.3f}", names)

    real: dict[int, Image.Image] = {}
    if truth is not None:
        kept, pixels = truth.pixels(truth.first(_SHOWN), THUMBNAIL)
        real = {sample.number: to_picture(p.numpy()) for sample, p in zip(kept, pixels, strict=True)}
    shown = range(min(_SHOWN, len(cosines)))
    numbers = drawn["number"].tolist()
    cells = [cell(i, [real[numbers[i]]] if numbers[i] in real else []) for i in shown]
    what = "At the left of each the real picture of the caption. " if real else ""
    grid = make_grid([p for one in cells for p in one.pictures], 2 * (each + (1 if real else 0)) * 3)
    sections = [
        Section("Samples", f"{what}The number is the cosine of picture and caption.", None, ("samples", grid), cells)
    ]
    if len(cosines) > 2 * _EXTREMES:
        order = cosines.mean(1).argsort(descending=True).tolist()
        for title, chosen in (("Closest to their captions", order[:_EXTREMES]),
                              ("Farthest from their captions", order[-_EXTREMES:][::-1])):  # fmt: skip
            sections.append(Section(title, cells=[cell(i, []) for i in chosen]))
    return sections


def reconstructions(again: Arrays) -> Section:
    """Real pictures and what the decoder makes of their latents."""
    rows = zip(again["truth"], again["again"], again["psnr"], again["ssim"], strict=True)
    names = ("real picture", "drawn again")
    cells = [
        Cell([to_picture(a), to_picture(b)], f"{psnr:.1f} dB · SSIM {ssim:.3f}", names) for a, b, psnr, ssim in rows
    ]
    grid = make_grid([picture for cell in cells for picture in cell.pictures], 8)
    text = "Each real picture, and beside it what the decoder draws from its embedding and the noise of the inversion."
    return Section("Reconstructions", text, None, ("reconstructions", grid), cells)


def to_picture(pixels: np.ndarray) -> Image.Image:
    """uint8 (3, H, W) -> picture."""
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
