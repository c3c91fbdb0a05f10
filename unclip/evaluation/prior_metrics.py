"""How well a prior predicts image embeddings of captions that it has not seen, beside what is had without one.

The figures are those by which LAION's priors were judged: cosines of predicted, real and text embeddings, and squared
distances. All of them belong on data held out of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prior import PriorStage
from unclip.errors import UnclipError
from unclip.evaluation.bootstrap import Interval, mean_interval, pair_interval
from unclip.evaluation.dataset import PIECE, EvaluationData, describe
from unclip.evaluation.features import Extractor
from unclip.evaluation.report import Figure, Report, Section, made_with
from unclip.inputs import check_seeds

NEAR = 0.01  # cos(text, prediction) belongs within so much of cos(text, real); twice that above suggests over-fitting


@dataclass(frozen=True)
class Embeddings:
    """Of N samples: unit vectors (N, E) of the picture, of the caption and of what the prior makes of the caption."""

    real: Tensor
    text: Tensor
    prediction: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


def embeddings(
    data: EvaluationData,
    extractor: Extractor,
    prior: PriorStage,
    *,
    seed: int = 0,
    batch_size: int = PIECE,
    options: Mapping[str, Any] | None = None,
) -> Embeddings:
    """Every sample's features, stored or the CLIP's, and prediction i drawn with seed + i, whatever the batch.

    `options` go to PriorStage.sample; of several captions the first counts. UnclipError: fewer than 2 samples can be
    used, or they are stored embeddings of another CLIP.
    """
    clip = extractor.clip
    samples, pictures = [], []
    for _, piece in data.pieces():
        kept, found = extractor.real(data, piece, clip.image_size)
        samples += kept
        if kept:
            pictures.append(torch.from_numpy(found["clip"]).float())
    if len(samples) < 2:
        raise UnclipError(f"{data.config.source} has {len(samples)} samples to measure a prior on; expected 2 or more")
    texts, drawn = [], []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        text = clip.encode_text([sample.caption for sample in part])
        seeds = check_seeds([seed + sample.number for sample in part], len(part))
        texts.append(text.embedding.cpu())
        drawn.append(prior.sample(text, seeds, **(options or {})).float().cpu())
    real, text_, prediction = (F.normalize(torch.cat(parts), dim=1) for parts in (pictures, texts, drawn))
    return Embeddings(real, text_, prediction, tuple(sample.caption for sample in samples))


def figures(found: Embeddings, *, train_mean: Tensor | None = None, seed: int = 0) -> dict[str, Interval]:
    """Means over the samples with 95 % bootstrap intervals, by name:

    - `cos_prediction_real`, and in its place `cos_text_real` of the text's embedding, `cos_constant_real` of the best
      constant vector, and `cos_other_real` of another sample's picture;
    - `cos_text_prediction`, and how far it lies above `cos_text_real` (`excess`), from the same resamples;
    - `cos_prediction_unrelated`: with the text of samples that have another caption; `cos_real_unrelated`: the
      pictures' own cosine with such texts;
    - `gain`: `cos_prediction_real` above the best of the three baselines' means, sample by sample;
    - `squared_error`: |prediction − real|², of unit vectors; in the place of the prediction `squared_error_text`.

    The best constant is the direction of the mean of `train_mean`'s data if that is given, else of the real embeddings
    themselves, which flatters that baseline.
    """
    r, t, p = (x.double().numpy() for x in (found.real, found.text, found.prediction))
    constant = r.mean(0) if train_mean is None else train_mean.double().numpy()
    constant = constant / np.linalg.norm(constant)
    own = {
        "cos_prediction_real": (p * r).sum(1),
        "cos_text_real": (t * r).sum(1),
        "cos_constant_real": r @ constant,
        "cos_text_prediction": (t * p).sum(1),
        "squared_error": ((p - r) ** 2).sum(1),
        "squared_error_text": ((t - r) ** 2).sum(1),
    }
    told = {name: mean_interval(values, seed=seed) for name, values in own.items()}
    told["excess"] = mean_interval(own["cos_text_prediction"] - own["cos_text_real"], seed=seed)
    best = max(("cos_text_real", "cos_constant_real"), key=lambda name: told[name].value)
    told["gain"] = mean_interval(own["cos_prediction_real"] - own[best], seed=seed)
    label = np.unique(np.asarray(found.captions), return_inverse=True)[1]
    unrelated = label[:, None] != label
    if unrelated.any():
        for name, cosines in (
            ("cos_prediction_unrelated", p @ t.T), ("cos_real_unrelated", r @ t.T), ("cos_other_real", r @ r.T),
        ):  # fmt: skip
            told[name] = pair_interval(cosines, unrelated, seed=seed)
    return told


_LABELS: dict[str, tuple[str, Any, str]] = {
    "cos_prediction_real": ("cos(prediction, real)", "higher", "what a prior is for; LAION's reached 0.75"),
    "cos_text_real": ("cos(text, real)", "", "baseline: the text's embedding in the prediction's place"),
    "cos_constant_real": ("cos(best constant, real)", "", "baseline: one vector for all captions"),
    "cos_other_real": ("cos(another picture, real)", "", "baseline: a picture with another caption"),
    "gain": ("gain over the best baseline", "higher", "of text and constant; 0 is a prior that adds nothing"),
    "cos_text_prediction": ("cos(text, prediction)", "", f"belongs within {NEAR} of cos(text, real)"),
    "excess": ("cos(text, prediction) − cos(text, real)", "", f"above {2 * NEAR} suggests over-fitting"),
    "cos_prediction_unrelated": ("cos(prediction, unrelated text)", "lower", "below 0.1 for OpenAI's CLIPs"),
    "cos_real_unrelated": ("cos(real, unrelated text)", "", "baseline: what the CLIP itself leaves between unrelated"),
    "squared_error": ("|prediction − real|²", "lower", "of unit vectors"),
    "squared_error_text": ("|text − real|²", "", "baseline"),
}


def measure(
    data: EvaluationData,
    extractor: Extractor,
    prior: PriorStage,
    *,
    seed: int = 0,
    batch_size: int = PIECE,
    train: EvaluationData | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """The report of `figures`. `train`: data that the best constant is taken from, and not the measured samples."""
    found = embeddings(data, extractor, prior, seed=seed, batch_size=batch_size, options=options)
    mean = None if train is None else _mean(train, extractor)
    told = figures(found, train_mean=mean, seed=seed)
    about = {
        "data": describe(data.config),
        "samples": len(found),
        "different captions": len(set(found.captions)),
        "seed": seed,
        "options": dict(options or {}),
        "best constant of": "the measured samples" if train is None else describe(train.config),
        "intervals": "95 %, bootstrap over samples",
        **made_with(extractor.clip.device),
    }
    if skipped := data.tally.report():
        about["left out"] = skipped
    # Rounded to what does not depend on how a batch's sums were ordered.
    rounded = {name: Interval(*(round(x, 5) for x in vars(told[name]).values())) for name in _LABELS if name in told}
    report = Report("Prior metrics", about)
    report.figures = [
        Figure(name, _LABELS[name][0], one.value, _LABELS[name][1], note=_LABELS[name][2])
        for name, one in rounded.items()
    ]
    rows = [[_LABELS[name][0], *(f"{x:.4f}" for x in vars(one).values())] for name, one in rounded.items()]
    report.sections = [Section("Intervals", _verdict(rounded), (["figure", "mean", "low", "high"], rows))]
    report.values = {"intervals": {name: vars(one) for name, one in rounded.items()}}
    return report


def _mean(train: EvaluationData, extractor: Extractor) -> Tensor:
    """Mean image embedding (E,) of a data set."""
    total, count = torch.zeros(extractor.clip.embedding_dim, dtype=torch.float64), 0
    for _, piece in train.pieces():
        kept, found = extractor.real(train, piece, extractor.clip.image_size)
        if kept:
            total += torch.from_numpy(found["clip"]).double().sum(0)
            count += len(kept)
    if not count:
        raise UnclipError(f"{train.config.source} has no sample to take the best constant of")
    return total / count


def _verdict(told: Mapping[str, Interval]) -> str:
    """What the intervals allow to be said."""
    gain, excess = told["gain"], told["excess"]
    if gain.low > 0:
        use = "The prior predicts better than the best baseline does."
    elif gain.high < 0:
        use = "The prior predicts worse than the best baseline does."
    else:
        use = "Whether the prior predicts better than the best baseline cannot be told from so many samples."
    if excess.low > 2 * NEAR:
        return f"{use} Its predictions lie nearer to their captions than pictures do, which suggests over-fitting."
    if excess.high < -2 * NEAR:
        return f"{use} Its predictions lie farther from their captions than pictures do: it heeds them too little."
    if excess.low > NEAR or excess.high < -NEAR:
        way = "nearer to" if excess.value > 0 else "farther from"
        return f"{use} Its predictions lie a little {way} their captions than pictures do."
    return f"{use} Its predictions lie about as near to their captions as pictures do."
