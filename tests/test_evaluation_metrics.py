"""Figures from features: closed forms, and the libraries' own calls."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unclip.errors import UnclipError, UsageError
from unclip.evaluation import metrics as m
from unclip.evaluation.memorisation import distances, without_copies
from unclip.geometry import peak_signal_to_noise


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(count: int, mean: list[float], deviation: list[float], seed: int = 0) -> Tensor:
    """Features whose sample mean and unbiased covariance are these to rounding."""
    x = noise(count, len(mean), seed=seed)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return whitened * torch.tensor(deviation, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


class Flat(nn.Module):
    """A network whose features are the first pixels, for torchmetrics."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.num_features].float()


def test_frechet_distance_of_known_gaussians() -> None:
    """|μ1 − μ2|² + Σ (σ1 − σ2)² where the axes are the same."""
    one, other = exact(50, [0, 0, 0], [1, 2, 3]), exact(80, [1, -2, 0], [2, 2, 0.5], seed=1)
    assert m.frechet_distance(one, other) == pytest.approx(1 + 4 + 1 + 0 + 6.25, rel=1e-9)
    assert m.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert m.frechet_of(m.gaussian(one), m.gaussian(other)) == m.frechet_distance(one, other)


def test_frechet_distance_is_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    pictures = [torch.randint(0, 256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    for real, images in zip((True, False), pictures, strict=True):
        metric.update(images.to(torch.uint8), real=real)
    real, samples = (Flat()(images) for images in pictures)
    assert m.frechet_distance(samples, real) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_kernel_distance() -> None:
    """Of two points k(a, a) + k(b, b) − 2 k(a, b); of one distribution near 0, and below it as often as above."""
    a, b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, -1.0])

    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    value, deviation = m.kernel_distance(a.repeat(10, 1), b.repeat(12, 1))
    assert value == pytest.approx(k(a, a) + k(b, b) - 2 * k(a, b), rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9)
    values = [m.kernel_distance(noise(200, 4, seed=2 * s), noise(200, 4, seed=2 * s + 1))[0] for s in range(8)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(8) + 1e-3
    assert min(values) < 0 < max(values)
    assert m.kernel_distance(noise(200, 4), noise(200, 4, seed=1) + 1)[0] > 10 * max(values)


def test_kernel_distance_is_torchmetrics_over_the_same_subset() -> None:
    """On two sets that are their own subset twice over, so that every subset is the same."""
    from torchmetrics.image.kid import poly_mmd

    one, other = noise(6, 3), noise(6, 3, seed=1)
    samples = [one.mean(0, keepdim=True).repeat(8, 1), other.mean(0, keepdim=True).repeat(8, 1)]
    assert m.kernel_distance(*samples)[0] == pytest.approx(float(poly_mmd(samples[0][:4], samples[1][:4])), rel=1e-9)


def test_inception_score() -> None:
    """1 where nothing is told apart; as many as there are classes where all are, equally often."""
    assert m.inception_score(torch.zeros(40, 5)) == pytest.approx((1, 0))
    sure = 60 * torch.eye(5).repeat(8, 1)
    assert m.inception_score(sure, splits=1)[0] == pytest.approx(5, rel=1e-6)
    torch.manual_seed(0)
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=Flat(), splits=1)
    images = torch.randint(0, 256, (30, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    metric.update(images)
    own = m.inception_score(Flat()(images), splits=1)[0]
    assert own == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_precision_and_recall() -> None:
    real = noise(60, 5)
    assert m.precision_recall(real, real) == (1.0, 1.0)
    assert m.precision_recall(real + 100, real) == (0.0, 0.0)
    # Two modes, of which the samples know one: what they show is real, and half of the real is missing.
    both = torch.cat([real[:30], real[30:] + 100])
    precision, recall = m.precision_recall(real[:30], both)
    assert precision == 1.0
    assert recall == 0.5
    assert m.precision_recall(both, real[:30]) == (0.5, 1.0)


def test_retrieval_counts_places() -> None:
    """Each picture's own caption at a known place; a caption that occurs twice is one candidate."""
    texts = torch.eye(4)
    images = torch.tensor([[9.0, 1, 0, 0], [9, 5, 1, 0], [3, 2, 1, 0], [1, 2, 3, 9]])  # places 1, 2, 3, 1
    assert m.retrieval(images, list("abcd"), texts, (1, 2, 3, 4)) == {1: 0.5, 2: 0.75, 3: 1.0}
    twice = m.retrieval(images[[0, 1, 1]], ["a", "b", "b"], texts[[0, 1, 1]], (1,))
    assert twice == {1: pytest.approx(1 / 3)}
    assert m.retrieval(images[:1], ["a"], texts[:1]) == {}
    many = noise(3000, 8)
    assert m.retrieval(many, [str(i) for i in range(3000)], many, (1, 5)) == {1: 1.0, 5: 1.0}


def test_diversity_and_reconstruction() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    assert m.clip_diversity(torch.eye(3)) == pytest.approx(1)
    assert m.clip_diversity(torch.ones(3, 4)) == pytest.approx(0)
    assert m.clip_diversity(torch.tensor([[1.0, 0], [0, 1], [-1, 0]])) == pytest.approx((1 + 1 + 2) / 3)
    truth = noise(3, 3, 16, 16).clamp(-1, 1)
    again = (truth + 0.1 * noise(3, 3, 16, 16, seed=1)).clamp(-1, 1)
    assert torch.allclose(m.structural_similarity(truth, truth), torch.ones(3, dtype=torch.float64))
    for i, (psnr, ssim) in enumerate(
        zip(peak_signal_to_noise(again, truth), m.structural_similarity(again, truth), strict=True)
    ):
        one, other = again[i : i + 1], truth[i : i + 1]
        assert float(psnr) == pytest.approx(float(peak_signal_noise_ratio(one, other, data_range=2.0)), rel=1e-6)
        own = structural_similarity_index_measure(one, other, data_range=2.0)
        assert float(ssim) == pytest.approx(float(own), rel=1e-6)  # type: ignore[arg-type]


def test_nearest_is_the_nearest() -> None:
    queries, pool = noise(50, 6), noise(130, 6, seed=1)
    found, place = m.nearest(queries, pool, block=16)
    brute = (queries[:, None] - pool).norm(dim=-1).min(1)
    assert torch.equal(place, brute.indices)
    assert torch.allclose(found, brute.values)
    found, place = m.nearest(pool, pool, block=16, others=True)
    apart = torch.cdist(pool, pool).fill_diagonal_(torch.inf).min(1)
    assert torch.equal(place, apart.indices)
    assert torch.allclose(found, apart.values)


def test_memorisation_tells_copies_from_fresh_ones() -> None:
    train, held_out = noise(400, 6), noise(400, 6, seed=1)
    copies = distances(train[:100] + 1e-4, train, held_out)
    assert copies.share == 1.0
    assert torch.equal(copies.nearest, torch.arange(100))
    fresh = distances(noise(2000, 6, seed=2), train, held_out)
    assert fresh.share < 0.04  # about a hundredth
    # Of the held-out pictures themselves as many lie below their first percentile as it says.
    assert distances(held_out, train, held_out).share == pytest.approx(0.01, abs=0.0025)
    # Where all was trained on, training pictures are as far from one another as fresh ones are from them.
    alone = distances(noise(2000, 6, seed=2), train, None)
    assert alone.share < 0.04
    assert distances(train[:100] + 1e-4, train, None).share == 1.0
    unseen = distances(train[:1], train, held_out).baseline
    assert alone.baseline.mean() == pytest.approx(float(unseen.mean()), rel=0.05)


def test_copies_in_the_training_set_count_once() -> None:
    small = np.stack([np.full((3, 2, 2), value, np.uint8) for value in (1, 2, 1, 3, 2)])
    kept = without_copies({"small": small, "number": np.arange(5)})
    assert kept["number"].tolist() == [0, 1, 3]
    assert kept["small"][:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "measure, least",
    [(m.frechet_distance, 2), (m.kernel_distance, 4), (m.precision_recall, 4)],
)
def test_too_few_pictures(measure: object, least: int) -> None:
    for samples, real in ((1, 10), (10, 1)):
        with pytest.raises(UsageError, match=rf"{least} pictures or more of each side, and there are 1"):
            measure(noise(samples, 3), noise(real, 3))  # type: ignore[operator]
    with pytest.raises(UsageError, match="no held-out pictures to compare"):
        distances(noise(3, 2), noise(3, 2), noise(0, 2))
    with pytest.raises(UsageError, match="there is one training picture, and none to compare it with"):
        distances(noise(3, 2), noise(1, 2), None)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package in ("torchmetrics", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, package, None)
        said = f"needs the package {package.replace('_', '-')}; install all it needs with: pip install 'unclip[eval]'"
        with pytest.raises(UnclipError, match=re.escape(said)):
            m.need_eval()
