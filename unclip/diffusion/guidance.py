"""From a network to a denoiser: conditioning, classifier-free guidance and the treatment of x̂_0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.clipping import Clip, dynamic_threshold, static_clip
from unclip.diffusion.process import GaussianDiffusion, Prediction
from unclip.errors import UsageError

__all__ = ["Clip", "Condition", "Denoiser", "Network", "dynamic_threshold", "make_denoiser", "static_clip"]

Network = Callable[..., Tensor]
Denoiser = Callable[[Tensor, Tensor], Prediction]
Condition = Mapping[str, Tensor | None]


def make_denoiser(
    network: Network,
    process: GaussianDiffusion,
    condition: Condition | Sequence[Condition],
    null: Condition | None = None,
    scale: float | Sequence[float] = 1.0,
    clip: Clip | None = None,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """A closure `(x_t, t) -> Prediction` over a network, its conditioning and guidance.

    With one `condition` y and s = `scale`: out(∅) + s · (out(y) − out(∅)) (classifier-free guidance; unCLIP §2.1).
    s = 1 or no `null` is the plain conditional prediction.

    With a chain of conditions c_1, …, c_n, each knowing more than the one before it (the image embedding, then
    embedding and caption), and one scale each: out(∅) + Σ s_i · (out(c_i) − out(c_{i−1})), c_0 = ∅. The last one is
    the *full* condition: a learned variance comes from it, and so does the standard deviation that `rescale` keeps.
    All that is needed goes through the network in one batch; what a scale of 1, or equal neighbours, cancel is left
    out. A null row of batch size 1 stands for all samples.

    interval: fractions (low, high) of T; where (t + 1)/T lies outside, the prediction is the full condition's
    (limited-interval guidance, Kynkäänniemi et al. 2024, there in σ).
    rescale: φ of Lin et al. 2024 §3.4, in [0, 1]: guided output blended with itself at the conditional's deviation.
    `clip` maps x̂_0 to x̂_0, and ε̂ follows it.

    Raises UsageError: not one scale a condition, an interval that is not 0 ≤ low ≤ high ≤ 1, rescale outside [0, 1].
    """
    conditions = [condition] if isinstance(condition, Mapping) else list(condition)
    scales = [float(scale)] if isinstance(scale, (int, float)) else [float(s) for s in scale]
    if not conditions or len(scales) != len(conditions):
        raise UsageError(f"{len(scales)} guidance scales for {len(conditions)} conditions; expected one scale each")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise UsageError(f"the guidance interval is {interval}, expected fractions of T with 0 <= low <= high <= 1")
    if not 0 <= rescale <= 1:
        raise UsageError(f"guidance rescale is {rescale}, expected 0 (none) to 1")
    full = conditions[-1]
    branches, factors = ([full], []) if null is None else _needed(null, conditions, scales)
    # The same tensors at every step, so that a network may keep what it makes of them (unclip.nn.prepared).
    joined: dict[str, Tensor | None] = {}

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        count, channels = len(branches), x_t.shape[1]
        if not joined:
            joined.update({name: _join([branch[name] for branch in branches], full[name]) for name in full})
        batch = {name: _plain(value) for name, value in joined.items()}
        outputs = network(torch.cat([x_t] * count), torch.cat([t] * count), **batch).float().chunk(count)
        conditional = outputs[-1]
        mixed = outputs[0][:, :channels]
        for factor, before, after in zip(factors, outputs[:-1], outputs[1:], strict=True):
            mixed = mixed + factor * (after[:, :channels] - before[:, :channels])
        if rescale:
            mixed = _rescaled(mixed, conditional[:, :channels], rescale)
        mixed = torch.cat([mixed, conditional[:, channels:]], dim=1)
        if interval is None:
            return mixed
        outside = ~_inside(t, interval, process.timesteps)
        return torch.where(outside.view(-1, *[1] * (x_t.ndim - 1)), conditional, mixed)

    def output_at(x_t: Tensor, t: Tensor) -> Tensor:
        acts = factors and (interval is None or bool(_inside(t, interval, process.timesteps).any()))
        if acts:
            return guided(x_t, t)
        return network(x_t, t, **{name: _plain(value) for name, value in full.items()})

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = process.to_prediction(output_at(x_t, t), x_t, t)
        if clip is None:
            return prediction
        x_start = clip(prediction.x_start)
        return prediction._replace(x_start=x_start, epsilon=process.epsilon_from(x_t, t, x_start))

    return denoise


def _needed(null: Condition, conditions: list[Condition], scales: list[float]) -> tuple[list[Condition], list[float]]:
    """The conditions that do not cancel, ∅ first and the full one last, and the scale of each difference."""
    branches: list[Condition] = [null]
    factors: list[float] = []
    for condition, scale in zip(conditions, scales, strict=True):
        if factors and scale == factors[-1]:  # s(b − a) + s(c − b) = s(c − a)
            branches[-1] = condition
        elif not factors and scale == 1:  # ∅ + 1·(c − ∅) = c
            branches[0] = condition
        else:
            branches.append(condition)
            factors.append(scale)
    return branches, factors


def _rescaled(mixed: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """Lin et al. 2024, eq. 15 and 16, each sample by its own standard deviation."""
    axes = tuple(range(1, mixed.ndim))
    wanted = conditional.std(dim=axes, keepdim=True)
    got = mixed.std(dim=axes, keepdim=True)
    return mixed * (rescale * wanted / got.clamp_min(1e-12) + 1 - rescale)


def _inside(t: Tensor, interval: tuple[float, float], timesteps: int) -> Tensor:
    fraction = (t.double() + 1) / timesteps
    return (fraction >= interval[0]) & (fraction <= interval[1])


def _join(parts: Sequence[Any], like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.cat([_plain(part.expand_as(like)) for part in parts])


def _plain(value: Any) -> Any:
    """Tensors made in inference mode cannot take part in a gradient; a copy can (see unclip.diffusion.gradient)."""
    inference = isinstance(value, Tensor) and value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if inference else value
