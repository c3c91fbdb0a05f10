"""The figures of one set of pictures against another, with what real pictures get in the place of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from unclip.evaluation import metrics as m
from unclip.evaluation.drawing import RECONSTRUCTION_STEPS
from unclip.evaluation.features import Arrays, Extractor, Lpips
from unclip.evaluation.report import Figure

METRICS = ("frechet", "kernel", "inception", "precision", "clip", "retrieval", "diversity", "reconstruction")
"""What can be asked for, in the order of the report."""
KS = (1, 5, 10)


def figures_of(
    extractor: Extractor,
    drawn: Arrays,
    real: Arrays,
    each: int,
    wanted: Sequence[str] = METRICS,
    lpips: Lpips | None = None,
    fitted: Callable[[Tensor], dict[str, Tensor]] = m.gaussian,
    *,
    references: bool = True,
) -> list[Figure]:
    """All figures but those of reconstructions. `references`: what real pictures get, too."""
    names, found = extractor.names, list[Figure]()
    samples, truth = extractor.compared(drawn), extractor.compared(real)
    note = names.note()
    halves = _halves(truth) if references and len(truth) >= 8 else None
    if "frechet" in wanted:
        value = m.frechet_of(m.gaussian(samples), fitted(truth))
        few = len(samples) <= samples.shape[1]
        more = f"; {len(samples)} samples of {samples.shape[1]} features, too few to fit a Gaussian well" if few else ""
        other = None if halves is None else m.frechet_distance(*halves)
        found.append(Figure("frechet", names.frechet, value, "lower", None, other, note + more))
    if "kernel" in wanted:
        value, deviation = m.kernel_distance(samples, truth)
        other = None if halves is None else m.kernel_distance(*halves)[0]
        found.append(Figure("kernel", names.kernel, value, "lower", deviation, other, f"{note}; ± over subsets"))
    if "inception" in wanted and "logits" in drawn:
        value, deviation = m.inception_score(torch.from_numpy(drawn["logits"]))
        theirs = torch.from_numpy(subset(real, len(drawn["logits"]))["logits"])
        other = m.inception_score(theirs)[0] if references else None
        found.append(Figure("inception", "Inception Score", value, "higher", deviation, other, "± over splits"))
    if "precision" in wanted:
        both = m.precision_recall(samples, truth)
        others = (None, None) if halves is None else m.precision_recall(*halves)
        for key, value, reference in zip(("precision", "recall"), both, others, strict=True):
            note = f"3 neighbours, {names.network}"
            found.append(Figure(key, key.capitalize(), value, "higher", None, reference, note))
    if "clip" in wanted:
        found += _clip_figures(extractor, drawn, real, each, references)
    if "retrieval" in wanted:
        own = retrieved(drawn, each)
        others_at = retrieved(subset(real, len(drawn["number"])), 1) if references else {}
        for k, value in own.items():
            note = f"among {len(set(drawn['caption'].tolist()))} captions"
            found.append(Figure(f"r_at_{k}", f"R@{k}", value, "higher", None, others_at.get(k), note))
    if "diversity" in wanted and len(drawn.get("diversity", ())):
        value, error = m.mean_and_error(torch.from_numpy(drawn["diversity"]))
        by = f"LPIPS ({lpips.net})" if lpips is not None else "1 − cosine of CLIP's features; no LPIPS"
        found.append(Figure("diversity", "Diversity", value, "higher", error, None, f"{each} pictures a caption, {by}"))
    return found


def clip_cosines(arrays: Arrays, each: int, shift: int = 0) -> Tensor:
    """Cosines (N·K,) of pictures and their own captions, or with a shift those of other samples."""
    texts = np.roll(arrays["texts"], shift, axis=0).repeat(each, axis=0)
    return torch.from_numpy((arrays["clip"].astype(np.float64) * texts).sum(1))


def retrieved(arrays: Arrays, each: int, ks: Sequence[int] = KS) -> dict[int, float]:
    """R@k of pictures among their set's captions."""
    captions = np.repeat(arrays["caption"], each).tolist()
    texts = torch.from_numpy(arrays["texts"].repeat(each, axis=0))
    return m.retrieval(torch.from_numpy(arrays["clip"]), captions, texts, ks)


def _clip_figures(
    extractor: Extractor, drawn: Arrays, real: Arrays, each: int, references: bool
) -> list[Figure]:
    """CLIP score as torchmetrics defines it, 100·max(cosine, 0) (Hessel et al. 2021 without their factor 2.5)."""

    def score(arrays: Arrays, each: int, shift: int = 0) -> tuple[float, float]:
        per_caption = (100 * clip_cosines(arrays, each, shift).clamp(min=0)).reshape(-1, each).mean(1)
        return m.mean_and_error(per_caption)

    value, error = score(drawn, each)
    reference = score(real, 1)[0] if references else None
    note = f"by {extractor.clip_label}, own caption"
    found = [Figure("clip_score", "CLIP score", value, "higher", error, reference, note)]
    if len(drawn["number"]) > 1:
        value, error = score(drawn, each, 1)
        reference = score(real, 1, 1)[0] if references and len(real["number"]) > 1 else None
        found.append(Figure("clip_score_other", "CLIP score, other caption", value, "", error, reference, "a baseline"))
    return found


def reconstruction_figures(again: Arrays) -> list[Figure]:
    note = f"{len(again['psnr'])} real pictures to (z_i, x_T) and back, {RECONSTRUCTION_STEPS} steps, decoder's size"
    psnr = m.mean_and_error(torch.from_numpy(again["psnr"]))
    ssim = m.mean_and_error(torch.from_numpy(again["ssim"]))
    return [
        Figure("psnr", "Reconstruction PSNR, dB", psnr[0], "higher", psnr[1], None, note),
        Figure("ssim", "Reconstruction SSIM", ssim[0], "higher", ssim[1], None, note),
    ]


def subset(arrays: Arrays, count: int) -> Arrays:
    """So many of a set, the same whenever it is."""
    order = np.random.default_rng(0).permutation(len(arrays["number"]))[:count]
    return {name: array[order] for name, array in arrays.items()}


def _halves(features: Tensor) -> tuple[Tensor, Tensor]:
    """Two random halves of a set, the same whenever it is."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(features)))
    middle = len(features) // 2
    return features[order[:middle]], features[order[middle:]]
