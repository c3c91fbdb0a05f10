"""Embeddings as codes: principal components, buckets, and the distribution of the dot product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prior.codes import DotProducts, EmbeddingCodes, components_for, measure_codes
from unclip.errors import UsageError

DIM, COUNT = 16, 4000


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(count: int = COUNT) -> Tensor:
    """Gaussians whose variances fall by half from one hidden direction to the next, around a mean of 3."""
    rotation = torch.linalg.qr(rand(DIM, DIM, seed=1).double()).Q
    scales = 2.0 ** (-torch.arange(DIM) / 2)
    return (3 + rand(count, DIM, seed=2).double() * scales @ rotation).float()


def codes_of(data: Tensor, components: int, buckets: int = 1024) -> EmbeddingCodes:
    codes = EmbeddingCodes(DIM, components, buckets)
    codes.store(measure_codes(data, components, 0.01))
    return codes


def test_components_are_orthonormal_and_ordered_by_falling_variance() -> None:
    data = correlated()
    found = measure_codes(data, DIM, 0.01)
    basis = found.components.double()
    assert torch.allclose(basis @ basis.T, torch.eye(DIM, dtype=torch.float64), atol=1e-5)
    assert bool((found.variances.diff() < 0).all())
    projected = (data - found.mean).double() @ basis.T
    assert torch.allclose(projected.var(0, correction=0), found.variances.double(), rtol=1e-4)
    covariance = torch.cov(projected.T, correction=0)
    assert float((covariance - covariance.diag().diag()).abs().max()) < 1e-5  # uncorrelated
    expected = torch.linalg.eigvalsh(torch.cov(data.double().T, correction=0)).flip(0)
    assert torch.allclose(found.variances.double(), expected, rtol=1e-5)


def test_reconstruction_loses_exactly_the_discarded_eigenvalues() -> None:
    """Σ of the dropped eigenvalues is the mean squared error of leaving their components out."""
    data = correlated()
    errors = []
    for count in (1, 2, 5, 10, 15, 16):
        codes = codes_of(data, count)
        lost = (codes.reconstruct(codes.project(data)) - data).double().square().sum(1).mean()
        assert float(lost) == pytest.approx(float(codes.variances[count:].sum()), rel=1e-3, abs=1e-8)
        errors.append(float(lost))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8 < errors[0]


@pytest.mark.parametrize("error", [0.3, 0.1, 0.01, 0.001])
def test_components_are_kept_by_explained_error(error: float) -> None:
    data = correlated()
    found = measure_codes(data, None, error)
    kept = len(found.components)
    lost = [float(found.variances[k:].sum() / found.variances.sum()) for k in range(DIM + 1)]
    assert lost[kept] <= error < lost[kept - 1]  # enough, and one less would not be
    assert kept == components_for(found.variances, error)


def test_buckets_give_a_value_back_within_half_of_their_width() -> None:
    data = correlated()
    for buckets in (2, 7, 1024):
        codes = codes_of(data, 6, buckets)
        coordinates = codes.project(data)
        back = codes.dequantise(codes.quantise(coordinates))
        assert bool(((back - coordinates).abs() <= 0.5 * codes.bucket_width * 1.001 + 1e-6).all())
        every = torch.arange(buckets)[:, None].expand(-1, 6)
        assert torch.equal(codes.quantise(codes.dequantise(every)), every)
        used = codes.quantise(coordinates)
        assert int(used.min()) == 0 and int(used.max()) == buckets - 1  # the ends are those of the data
    # What 1,024 buckets lose is nothing beside the dropped components.
    rounding = float((back - coordinates).square().sum(1).mean())
    assert rounding < 1e-3 * float(codes.variances[6:].sum())


def test_codes_are_the_same_where_training_computes_in_bfloat16() -> None:
    data = correlated(300)
    codes = codes_of(data, 6)
    expected = codes.encode(data)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes.encode(data), expected)
        assert codes.decode(expected).dtype == torch.float32


def test_values_beyond_the_measured_ends_stay_in_the_last_bucket() -> None:
    codes = codes_of(correlated(), 3)
    far = codes.mean + 100 * codes.components[:1]
    assert codes.encode(torch.cat([far, 2 * codes.mean - far]))[:, 0].tolist() == [1023, 0]


def test_the_first_codes_alone_decode_to_a_coarser_embedding() -> None:
    data = correlated(200)
    codes = codes_of(data, DIM)
    whole = codes.encode(data)
    errors = [float((codes.decode(whole[:, :count]) - data).norm(dim=1).mean()) for count in (0, 1, 4, DIM)]
    assert errors == sorted(errors, reverse=True)
    assert torch.allclose(codes.decode(whole[:, :0]), codes.mean.expand(200, -1))


def test_signs_and_order_do_not_depend_on_the_order_of_the_data() -> None:
    data = correlated(500)
    one, other = measure_codes(data, 5, 0.01), measure_codes(data.flip(0), 5, 0.01)
    assert torch.allclose(one.components, other.components, atol=1e-5)
    largest = one.components.gather(1, one.components.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_too_little_data_is_refused() -> None:
    with pytest.raises(UsageError, match="components is 8, but the 6 embeddings measured vary in 5 directions"):
        measure_codes(correlated(6), 8, 0.01)
    with pytest.raises(UsageError, match="the 4 embeddings measured are all alike"):
        measure_codes(torch.ones(4, DIM), None, 0.01)


# ---- the dot product ---------------------------------------------------------------------------------------


def dots_of(values: Tensor, buckets: int = 64) -> DotProducts:
    dots = DotProducts(buckets)
    dots.measure(values)
    return dots


def test_tokens_of_the_dot_product_are_equally_frequent_and_ordered() -> None:
    values = 0.3 + 0.05 * rand(20_000)
    dots = dots_of(values)
    counts = torch.bincount(dots.quantise(values), minlength=64)
    assert int(counts.min()) >= 312 and int(counts.max()) <= 314
    assert torch.allclose(dots.shares, counts / 20_000)
    assert bool((dots.quantise(values.sort().values).diff() >= 0).all())


@pytest.mark.parametrize("percentile", [0.0, 0.5, 0.9])
def test_drawn_dot_products_lie_above_the_percentile(percentile: float) -> None:
    values = 0.3 + 0.05 * rand(20_000)
    dots = dots_of(values)
    tokens = dots.draw(torch.rand(100_000, generator=torch.Generator().manual_seed(3)), percentile)
    lowest = int(dots.quantise(values.sort().values[int(percentile * len(values))][None]))
    assert int(tokens.min()) == lowest and int(tokens.max()) == 63
    if percentile == 0.5:
        assert lowest == 32  # the upper half of 64
    counts = torch.bincount(tokens, minlength=64)[lowest + 1 :].double()
    expected = 100_000 / (64 * (1 - percentile))
    assert bool(((counts - expected).abs() < 5 * expected**0.5).all())  # each as often as any other


def test_a_dot_product_that_never_occurred_is_never_drawn() -> None:
    """Four different values fill four of 64 tokens; nothing was learned of the others."""
    values = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(50)
    dots = dots_of(values)
    seen = set(dots.quantise(values).tolist())
    assert len(seen) == 4
    drawn = dots.draw(torch.rand(5000, generator=torch.Generator().manual_seed(0)), 0.0)
    assert set(drawn.tolist()) == seen
    upper = set(dots.quantise(torch.tensor([0.3, 0.4])).tolist())
    assert set(dots.draw(torch.rand(5000, generator=torch.Generator().manual_seed(1)), 0.5).tolist()) == upper
    assert int(dots.draw(torch.tensor([1 - 1e-9], dtype=torch.float64), 0.0)) == max(seen)
