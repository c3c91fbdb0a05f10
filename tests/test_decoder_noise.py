"""The noise mixed into the decoder's training embeddings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from decoder.objective import noised_embedding


@pytest.fixture
def embeddings() -> torch.Tensor:
    """Unit vectors that vary in the first four of 64 dimensions alone."""
    z = torch.zeros(512, 64)
    z[:, :4] = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    return F.normalize(z, dim=1)


@pytest.mark.parametrize("shape", ["isotropic", "data"])
def test_noise_stays_on_the_sphere_and_within_its_weight(embeddings, shape):
    noised = noised_embedding(embeddings, 0.3, torch.Generator().manual_seed(1), shape=shape)
    torch.testing.assert_close(noised.norm(dim=1), torch.ones(512))
    assert not torch.allclose(noised, embeddings)
    if shape == "isotropic":  # d is nearly orthogonal to z, so that cos = sqrt(1 − w²) with w ≤ 0.3
        assert (noised * embeddings).sum(1).min() > 0.85
    # w uniform in [0, 0.3]: the angle's sine, near w, averages near 0.15.
    sine = (1 - (noised * embeddings).sum(1).clamp(max=1) ** 2).sqrt()
    assert 0.09 < sine.mean() < 0.17


def test_data_noise_moves_embeddings_the_way_they_differ(embeddings):
    generator = torch.Generator().manual_seed(1)
    assert noised_embedding(embeddings, 0.3, generator, shape="data")[:, 4:].abs().max() == 0
    assert noised_embedding(embeddings, 0.3, generator, shape="isotropic")[:, 4:].abs().max() > 0


def test_a_sample_does_not_take_part_in_its_own_noise():
    z = torch.eye(8)
    noised = noised_embedding(z, 0.5, torch.Generator().manual_seed(0), shape="data")
    moved = noised - z * noised.diagonal()[:, None]
    # Exactly two others take part: one pulls, one pushes.
    assert ((moved.abs() > 1e-6).sum(1) == 2).all()
    torch.testing.assert_close(moved.sum(1), torch.zeros(8), atol=1e-6, rtol=0)


def test_no_noise_and_tiny_batches(embeddings):
    generator = torch.Generator().manual_seed(0)
    assert noised_embedding(embeddings, 0.0, generator, shape="data") is embeddings
    pair = noised_embedding(embeddings[:2], 0.3, generator, shape="data")  # falls back to isotropic
    assert torch.isfinite(pair).all() and pair[:, 4:].abs().max() > 0
