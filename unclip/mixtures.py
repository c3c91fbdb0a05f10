"""Weighted means of embeddings, on a straight line through the space or along great circles."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from unclip.errors import UsageError

MEANS = ("linear", "spherical")
_CANCELS = 1e-3
"""Share of the summed lengths below which a sum of vectors has no direction to speak of."""
_MOST_STEPS = 200


def weighted_mean(embeddings: Tensor, weights: Sequence[float], mean: str = "linear") -> Tensor:
    """Embeddings (N, E) and a weight each -> one embedding (E,), float32.

    linear: the direction of Σ w_i z_i; weights may be negative, which moves away. Its length is the mean of the
    lengths, Σ |w_i|·‖z_i‖ / Σ |w_i|: a plain mean of vectors of unit length would be shorter than any embedding.
    spherical: the point of the sphere with the least Σ w_i · angle² (Buss & Fillmore 2001), weights 0 or more. Of two
    it is their slerp. Lengths as above.
    Only the weights' ratios count. A single embedding of positive weight comes back to the bit, and so does one whose
    fellows weigh nothing.
    Raises UsageError: no weight but 0, one that is not finite, vectors that cancel each other.
    """
    _check(embeddings, weights, mean)
    kept = [index for index, weight in enumerate(weights) if weight != 0]
    if len(kept) == 1 and weights[kept[0]] > 0:
        return embeddings[kept[0]]
    rows = embeddings[kept].double()
    own = torch.tensor([weights[index] for index in kept], dtype=torch.float64, device=rows.device)
    own = own / own.abs().sum()
    lengths = rows.norm(dim=1)
    length = (own.abs() * lengths).sum()
    total = (own[:, None] * rows).sum(0)
    if float(total.norm()) < _CANCELS * float(length):
        raise UsageError(
            "the embeddings of this mixture cancel each other, so that no direction is left; change the weights"
        )
    direction = total / total.norm()
    if mean == "spherical":
        direction = _spherical(rows / lengths[:, None], own, direction)
    return (direction * length).float()


def _spherical(units: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Buss & Fillmore 2001, algorithm A1: step by the mean of the logarithms, in the tangent space, until it is none.

    units (N, E) of unit length, weights (N,) of sum 1, start (E,) of unit length -> (E,).
    """
    point = start
    for _ in range(_MOST_STEPS):
        cosine = (units @ point).clamp(-1, 1)
        angle = cosine.arccos()
        across = units - cosine[:, None] * point
        norm = across.norm(dim=1, keepdim=True)
        log = torch.where(norm > 0, across / norm.clamp_min(1e-300), torch.zeros_like(across)) * angle[:, None]
        move = (weights[:, None] * log).sum(0)
        step = move.norm()
        if float(step) < 1e-12:
            break
        point = step.cos() * point + step.sin() * move / step
        point = point / point.norm()
    return point


def _check(embeddings: Tensor, weights: Sequence[float], mean: str) -> None:
    if mean not in MEANS:
        raise UsageError(f"unknown mean {mean!r}; known: {', '.join(MEANS)}")
    if len(weights) != len(embeddings) or not len(weights):
        raise UsageError(f"{len(weights)} weights for {len(embeddings)} embeddings; expected one each, at least one")
    for weight in weights:
        if not isfinite(weight):
            raise UsageError(f"a weight of the mixture is {weight}; expected finite numbers")
        if mean == "spherical" and weight < 0:
            raise UsageError(
                f"a spherical mean takes weights of 0 or more, and one is {weight:g}; use the linear mean for negative "
                "ones"
            )
    if not any(weights):
        raise UsageError("all weights of the mixture are 0; give at least one part another weight")
