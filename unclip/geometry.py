"""Angles and great circles: how CLIP embeddings and noise are moved between one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.errors import UsageError

_PARALLEL = 1e-6
"""Angle in radians below which two directions count as one."""
_ANTIPODAL = 1e-3
"""The same for opposite directions: closer to π, rounding alone chooses the plane of the rotation."""


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle in radians, float64 (...,), between vectors along the last axis, (..., D) each, of any length but 0.

    2·atan2(|a − b|, |a + b|) of the unit vectors, which is exact where the arc cosine loses half of the digits: near 0
    and near π (Kahan 2006, "How futile are mindless assessments of roundoff", §12).
    """
    left, right = (v.double() / v.double().norm(dim=-1, keepdim=True) for v in (a, b))
    return 2 * torch.atan2((left - right).norm(dim=-1), (left + right).norm(dim=-1))


def slerp(start: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation: (sin((1−w)Ω) start + sin(wΩ) end) / sin Ω, Ω the angle between them (Shoemake 1985).

    `start`, `end` (..., D) are vectors along the last axis, `weight` a number or a tensor (...,) in [0, 1]; returns
    (..., D) in the dtype of `start`. Vectors of unit length stay so, and turn by w·Ω; others keep the formula, which
    takes lengths along. At 0 and 1 the ends come back to the bit. Computed in float64. Parallel vectors are mixed on
    the straight line, which is the formula's limit. UsageError: a weight outside [0, 1], or a vector of zeros;
    opposite vectors, between which no great circle is shorter than another.
    """
    w = torch.as_tensor(weight, dtype=torch.float64, device=start.device)
    if bool(((w < 0) | (w > 1) | ~torch.isfinite(w)).any()):
        raise UsageError(f"slerp's weight is {w.tolist()}, expected 0 (the start) to 1 (the end)")
    for name, vector in (("start", start), ("end", end)):
        if bool((vector.norm(dim=-1) == 0).any()):
            raise UsageError(f"slerp's {name} is a vector of zeros, which has no direction")
    w = w[..., None]
    omega = angle_between(start, end)[..., None]
    if bool((torch.pi - omega < _ANTIPODAL).any()):
        raise UsageError(
            "slerp's ends point in opposite directions, so that every way from one to the other is equally short; "
            "put a third one between them"
        )
    parallel = omega < _PARALLEL
    sine = torch.where(parallel, torch.ones_like(omega), omega.sin())
    first = torch.where(parallel, 1 - w, ((1 - w) * omega).sin() / sine)
    second = torch.where(parallel, w, (w * omega).sin() / sine)
    return (first * start.double() + second * end.double()).to(start.dtype)


def text_difference(target: Tensor, base: Tensor) -> Tensor:
    """z_d = norm(z_t − z_t0), the direction from one caption's CLIP embedding to another's (unCLIP, §3.3), (..., D)
    of unit length. UsageError: the two are the same.
    """
    difference = target.double() - base.double()
    length = difference.norm(dim=-1, keepdim=True)
    if bool((length < _PARALLEL).any()):
        raise UsageError("the two captions have the same CLIP embedding, so that there is no direction between them")
    return (difference / length).to(target.dtype)


def path(stops: int, frames: int, loop: bool = False) -> list[tuple[int, int, float]]:
    """The frames of a journey over `stops` points: (index before, index after, weight in [0, 1)) of each; the last is
    (n, n, 0.0).

    `frames` lie between one stop and the next, both included; a loop goes on to the first stop, which it does not
    repeat at its end. UsageError: fewer than 2 frames or stops.
    """
    if stops < 2:
        raise UsageError(f"an interpolation goes between 2 or more, got {stops}")
    if frames < 2:
        raise UsageError(f"frames is {frames}, expected 2 or more, since both ends are among them")
    targets: Sequence[int] = [*range(1, stops), *([0] if loop else [])]
    way = [(i, after, k / (frames - 1)) for i, after in enumerate(targets) for k in range(frames - 1)]
    return way if loop else [*way, (stops - 1, stops - 1, 0.0)]


def linear_schedule(last: float, frames: int) -> list[float]:
    """`frames` numbers from 0 to `last`, evenly, with both ends to the bit. UsageError: fewer than 2 frames."""
    if frames < 2:
        raise UsageError(f"frames is {frames}, expected 2 or more, since both ends are among them")
    return [last * k / (frames - 1) for k in range(frames - 1)] + [last]


def peak_signal_to_noise(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB, (B,) float64, of images (B, C, H, W) in [-1, 1]: 10·log10(2² / mean squared error), the peak being
    the whole range from black to white; infinite for equal images.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)
