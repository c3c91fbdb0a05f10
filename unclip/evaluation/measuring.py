"""`unclip eval`: one model, or one folder of pictures, measured against a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.errors import UsageError
from unclip.evaluation.dataset import EvaluationData, describe
from unclip.evaluation.drawing import RECONSTRUCTION_STEPS, SampleFeatures, Source, reconstruct_pieces
from unclip.evaluation.features import Arrays, Extractor, Lpips
from unclip.evaluation.figures import METRICS, figures_of, reconstruction_figures
from unclip.evaluation.gallery import gallery, reconstructions, score_plots
from unclip.evaluation.metrics import need_eval
from unclip.evaluation.pieces import Pieces, Share, begin
from unclip.evaluation.real import RealFeatures, default_cache
from unclip.evaluation.report import Report, made_with

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

Told = Callable[[str, int], None]
"""Hears the kind of work and the number of the piece that is done."""


def nobody(_stage: str, _number: int) -> None:
    return None


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how. `source` gives the pictures for the samples of `prompts`; `real` is what they are
    compared with. `system` is for reconstructions alone.
    """

    source: Source
    prompts: EvaluationData
    real: EvaluationData
    extractor: Extractor
    size: int
    lpips: Lpips | None = None
    system: UnCLIP | None = None
    reconstructions: int = 32
    reconstruction_steps: int = RECONSTRUCTION_STEPS
    metrics: Sequence[str] = METRICS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What makes these results, for the folder they are kept in."""
        return {
            "source": self.source.identity,
            "prompts": {**describe(self.prompts.config), "limit": self.prompts.limit},
            "network": self.extractor.identity,
            "lpips": None if self.lpips is None else self.lpips.identity,
            "size": self.size,
            "reconstructions": [self.reconstructions, self.reconstruction_steps] if self.reconstructing else None,
        }

    @property
    def reconstructing(self) -> bool:
        there = self.prompts.has_pictures and self.system is not None
        return there and self.reconstructions > 0 and "reconstruction" in self.metrics


def evaluate(
    asked: Evaluation, out: Path, *, cache: Path | None = None, share: Share | None = None, told: Told = nobody
) -> Report | None:
    """Do this process's share and, where all is done then, write the report to `out`; None where others are at work.

    Entered again, it goes on. Raises UnclipError: `out` was begun with other settings or data, a package is missing.
    """
    need_eval()
    share = Share() if share is None else share
    cache = cache or default_cache()
    begin(out, asked.settings, asked.prompts.config, cache)
    real = RealFeatures(asked.real, asked.extractor, asked.size, cache, out)
    samples = SampleFeatures(asked.prompts, asked.source, asked.extractor, out / "pieces", asked.lpips)
    real.make(share, lambda number: told("real pictures", number))
    samples.make(share, lambda number: told("samples", number))
    again, count = Pieces(out / "pieces", "reconstructions"), 0
    if asked.reconstructing:
        assert asked.system is not None
        how = {"steps": asked.reconstruction_steps, "seed": asked.seed}
        count = reconstruct_pieces(asked.system, asked.prompts, asked.reconstructions, again, share, **how)
    if not (real.complete and samples.complete and again.complete(count)):
        return None
    report = _report(asked, samples.load(), real, again.load(count) if count else {})
    report.write(out)
    return report


def _report(asked: Evaluation, drawn: Arrays, real: RealFeatures, again: Arrays) -> Report:
    arrays = real.load()
    if not len(drawn.get("number", ())):
        raise UsageError(f"there is no picture to measure: {asked.prompts.tally.report()}")
    each = asked.source.num_images
    about = {
        "pictures": asked.source.identity.get("model", {}).get("name") or asked.prompts.config.source,
        "prompts": f"{len(drawn['number'])} captions, {each} picture{'s' if each > 1 else ''} of each",
        "real pictures": f"{len(arrays['number'])} of {asked.real.config.source} ({_part(asked.real)})",
        "size": f"{asked.size} px",
        "compared by": asked.extractor.names.network,
        "captions compared by": asked.extractor.clip_label,
        "settings": asked.source.identity,
        "made with": made_with(asked.extractor.clip.device),
    }
    if real.unreadable:
        about["skipped"] = f"real pictures that could not be read: {real.unreadable}"
    figures = figures_of(asked.extractor, drawn, arrays, each, asked.metrics, asked.lpips, real.gaussian)
    values: dict[str, Any] = {}
    sections = score_plots(asked.extractor, drawn, arrays, each, real.gaussian, values, asked.metrics)
    if again and len(again["psnr"]):
        figures += reconstruction_figures(again, asked.reconstruction_steps)
        sections.append(reconstructions(again))
    same = asked.real.config == asked.prompts.config and asked.prompts.has_pictures
    sections += gallery(drawn, asked.prompts if same else None, each)
    title = f"Evaluation of {about['pictures']}"
    return Report(title, about, figures, sections, values)


def _part(data: EvaluationData) -> str:
    config = data.config
    held = f", {config.part} part with holdout {config.holdout:g}" if config.holdout else ""
    return f"split {config.split}{held}"
