"""Figures from features: each a plain function of tensors, through torch-fidelity and torchmetrics.

`samples` are always those of the model, `real` those of the data; float tensors (N, D) on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.errors import UnclipError, UsageError

NEIGHBOURHOOD = 3
SUBSETS = 100
_SUBSET = 1000
_BLOCK = 1024


def need_eval() -> None:
    """UnclipError unless the packages of the extra `eval` are installed."""
    missing = [name for name in ("torch_fidelity", "torchmetrics", "matplotlib") if not _is_there(name)]
    if missing:
        raise UnclipError(
            f"measuring needs the package {missing[0].replace('_', '-')}; install all it needs with: pip install "
            "'unclip[eval]'"
        )


def _is_there(package: str) -> bool:
    """Whether it is installed; importing it would take seconds."""
    from importlib.util import find_spec

    try:
        return find_spec(package) is not None
    except ValueError:  # it is in sys.modules without a specification
        return False


def frechet_distance(samples: Tensor, real: Tensor) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½) of Gaussians fitted to the two (Heusel et al. 2017, eq. 6), in float64.

    It is the FID if the features are those of the Inception network of 2015, and of them alone. It grows as there are
    fewer samples. UsageError: fewer than 2 of either.
    """
    return float(frechet_of(gaussian(samples), gaussian(real)))


def gaussian(features: Tensor) -> dict[str, Tensor]:
    """Mean "mu" (D,) and covariance "sigma" (D, D), unbiased, float64. UsageError: fewer than 2 features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    _check_count(features, 2, "a Gaussian needs")
    found = fid_features_to_statistics(features.double().cpu())
    return {name: torch.from_numpy(found[name]) for name in ("mu", "sigma")}


def frechet_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Fréchet distance of two results of `gaussian`."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [{name: value.double().numpy() for name, value in each.items()} for each in (one, other)]
    return max(0.0, float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]))


def kernel_distance(samples: Tensor, real: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x·y/D + 1)³, unbiased (Bińkowski et al. 2018, §4): mean and
    standard deviation over 100 subsets of 1,000, or of half of the smaller set where that is less.

    It is the KID if the features are Inception's. UsageError: fewer than 4 of either.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    for features in (samples, real):
        _check_count(features, 4, "the kernel distance needs")
    size = min(_SUBSET, len(samples) // 2, len(real) // 2)
    found = kid_features_to_metric(
        samples.double(), real.double(), kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)) from logits (N, C) (Salimans et al. 2016, §4): mean and deviation over `splits`."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    _check_count(logits, 2, "the Inception Score needs")
    found = isc_features_to_metric(logits, splits=min(splits, len(logits) // 2) or 1, rng_seed=seed)
    return float(found[KEY_METRIC_ISC_MEAN]), float(found[KEY_METRIC_ISC_STD])


def precision_recall(samples: Tensor, real: Tensor, neighbourhood: int = NEIGHBOURHOOD) -> tuple[float, float]:
    """Share of samples that lie among the real ones, and of real ones that lie among the samples, where a set's
    manifold is made of balls that reach to each one's k-th neighbour (Kynkäänniemi et al. 2019, §3).

    UsageError: no more than k of either.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    for features in (samples, real):
        _check_count(features, neighbourhood + 1, f"precision and recall with {neighbourhood} neighbours need")
    found = prc_features_to_metric(
        samples.double(), real.double(), prc_neighborhood=neighbourhood, save_cpu_ram=True, verbose=False
    )
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])


def retrieval(
    images: Tensor, captions: Sequence[str], texts: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """R@k: the share of images (N, E) whose own caption is among the k nearest of all different captions, by the cosine
    of CLIP's embeddings; `texts` (N, E) are those of the N captions. k above the number of captions is left out.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    first: dict[str, int] = {}
    for index, caption in enumerate(captions):
        first.setdefault(caption, index)
    place = {caption: number for number, caption in enumerate(first)}
    pool = F.normalize(texts[list(first.values())].double(), dim=-1)
    target = torch.tensor([place[caption] for caption in captions])
    queries = F.normalize(images.double(), dim=-1)
    if len(pool) < 2:
        return {}
    found: dict[int, float] = {}
    for k in ks:
        if k > len(pool) - 1:
            continue
        hits = 0.0
        for start in range(0, len(queries), _BLOCK):
            block = slice(start, start + _BLOCK)
            share = multiclass_accuracy(
                queries[block] @ pool.T, target[block], num_classes=len(pool), average="micro", top_k=k
            )
            hits += float(share) * len(target[block])
        found[k] = hits / len(queries)
    return found


def clip_diversity(images: Tensor) -> float:
    """Mean of 1 − cosine over all pairs of one caption's CLIP embeddings (K, E)."""
    unit = F.normalize(images.double(), dim=-1)
    pairs = list(combinations(range(len(unit)), 2))
    return float(sum(1 - unit[i] @ unit[j] for i, j in pairs) / len(pairs))


def structural_similarity(images: Tensor, truth: Tensor) -> Tensor:
    """SSIM (B,) of images (B, 3, H, W) in [-1, 1] (Wang et al. 2004), by torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(
        images.double(), truth.double(), data_range=(-1.0, 1.0), reduction="none"
    )
    return found.reshape(-1)  # type: ignore[union-attr]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean, and its standard error."""
    values = values.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return float(values.mean()), error


def nearest(queries: Tensor, pool: Tensor, block: int = _BLOCK, *, others: bool = False) -> tuple[Tensor, Tensor]:
    """For each query (Q, D) the Euclidean distance to the nearest of a pool (P, D), and its index; float64.

    With `others` the queries are the pool itself, and each one's own place in it does not count.
    """
    distances, indices = [], []
    pool = pool.double()
    for number, part in enumerate(queries.double().split(block)):
        best = torch.full((len(part),), torch.inf, dtype=torch.float64)
        place = torch.zeros(len(part), dtype=torch.int64)
        for start in range(0, len(pool), block):
            apart = torch.cdist(part, pool[start : start + block], compute_mode="donot_use_mm_for_euclid_dist")
            if others and start == number * block:
                apart.fill_diagonal_(torch.inf)
            found = apart.min(1)
            closer = found.values < best
            best = torch.where(closer, found.values, best)
            place = torch.where(closer, found.indices + start, place)
        distances.append(best)
        indices.append(place)
    return torch.cat(distances), torch.cat(indices)


def _check_count(features: Tensor, least: int, what: str) -> None:
    if len(features) < least:
        raise UsageError(f"{what} {least} pictures or more of each side, and there are {len(features)}")
