"""Great circles in numbers: uniform, exact at their ends, and refused where they are not defined."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.errors import UsageError
from unclip.geometry import (
    angle_between,
    linear_schedule,
    path,
    peak_signal_to_noise,
    slerp,
    text_difference,
)


def unit(count: int, seed: int, dim: int = 64) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("turn", [1e-3, 0.4, 1.5, 3.0])
def test_slerp_turns_uniformly_and_keeps_the_length(turn: float) -> None:
    start, other = unit(1, 0), unit(1, 1)
    across = F.normalize(other - (other @ start.T) * start, dim=1)
    end = math.cos(turn) * start + math.sin(turn) * across
    weights = torch.linspace(0, 1, 33)
    way = slerp(start.expand(33, -1), end.expand(33, -1), weights)
    angles = angle_between(way[:-1], way[1:])
    assert float((angles - turn / 32).abs().max()) < 1e-5 * max(turn, 0.1)
    assert float((way.norm(dim=1) - 1).abs().max()) < 1e-6
    assert torch.equal(way[:1], start) and torch.equal(way[-1:], end)


def test_slerp_has_its_closed_form_and_takes_lengths_along() -> None:
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    for w in (0.25, 0.5, 0.9):
        wanted = torch.tensor([2 * math.cos(w * math.pi / 2), 4 * math.sin(w * math.pi / 2)])
        assert torch.allclose(slerp(x, y, w), wanted, atol=1e-6)
    assert torch.allclose(slerp(x, 3 * x, 0.5), 2 * x)  # parallel: the straight line


def test_slerp_refuses_what_has_no_way() -> None:
    a = unit(1, 0)
    with pytest.raises(UsageError, match="opposite directions"):
        slerp(a, -a, 0.5)
    with pytest.raises(UsageError, match=r"slerp's weight is 1\.5, expected 0 \(the start\) to 1"):
        slerp(a, unit(1, 1), 1.5)
    with pytest.raises(UsageError, match="slerp's end is a vector of zeros"):
        slerp(a, torch.zeros_like(a), 0.5)


@pytest.mark.parametrize("turn", [1e-7, 1e-4, 1.0, math.pi - 1e-7])
def test_angles_are_exact_also_where_the_arc_cosine_is_not(turn: float) -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = 5 * torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
    assert float(angle_between(a, b)) == pytest.approx(turn, abs=1e-14)


def test_a_text_difference_is_the_normalised_difference() -> None:
    target, base = unit(3, 0), unit(3, 1)
    z_d = text_difference(target, base)
    assert torch.allclose(z_d.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.allclose(torch.cosine_similarity(z_d, target - base), torch.ones(3), atol=1e-6)
    with pytest.raises(UsageError, match="the two captions have the same CLIP embedding"):
        text_difference(target, target)


def test_a_path_meets_every_stop() -> None:
    assert path(2, 3) == [(0, 1, 0.0), (0, 1, 0.5), (1, 1, 0.0)]
    assert path(3, 2) == [(0, 1, 0.0), (1, 2, 0.0), (2, 2, 0.0)]
    assert path(2, 3, loop=True) == [(0, 1, 0.0), (0, 1, 0.5), (1, 0, 0.0), (1, 0, 0.5)]
    assert len(path(4, 10)) == 3 * 9 + 1
    with pytest.raises(UsageError, match="frames is 1, expected 2 or more"):
        path(2, 1)
    with pytest.raises(UsageError, match="between 2 or more, got 1"):
        path(1, 5)
    assert linear_schedule(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3]) and linear_schedule(0.3, 7)[-1] == 0.3
    with pytest.raises(UsageError, match="frames is 0"):
        linear_schedule(0.5, 0)


def test_psnr_has_the_range_of_the_picture_as_its_peak() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([a[0] + 0.2, a[1]])  # a tenth of the range from black to white
    values = peak_signal_to_noise(a, b)
    assert float(values[0]) == pytest.approx(20.0) and float(values[1]) == math.inf
