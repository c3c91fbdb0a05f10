"""From a network to a denoiser: conditioning, classifier-free guidance and the treatment of x̂_0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion.process import GaussianDiffusion, Prediction

Network = Callable[..., Tensor]
Denoiser = Callable[[Tensor, Tensor], Prediction]
Clip = Callable[[Tensor], Tensor]


def make_denoiser(
    network: Network,
    process: GaussianDiffusion,
    condition: Mapping[str, Tensor | None],
    null: Mapping[str, Tensor | None] | None = None,
    scale: float = 1.0,
    clip: Clip | None = None,
) -> Denoiser:
    """A closure `(x_t, t) -> Prediction` over a network, its conditioning and guidance.

    With s = `scale`: out(∅) + s · (out(y) − out(∅)), both halves in one batch (classifier-free guidance; unCLIP
    §2.1); s = 1
    or no `null` is the plain conditional prediction. A learned variance comes from the conditional half. `clip` maps
    x̂_0
    to x̂_0, and ε̂ follows it.
    """
    guided = null is not None and scale != 1.0

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        if guided:
            assert null is not None
            both = {name: _join(condition[name], null[name]) for name in condition}
            output = network(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).float()
            conditional, unconditional = output.chunk(2)
            channels = x_t.shape[1]
            mixed = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
            output = torch.cat([mixed, conditional[:, channels:]], dim=1)
        else:
            output = network(x_t, t, **condition)
        prediction = process.to_prediction(output, x_t, t)
        if clip is None:
            return prediction
        x_start = clip(prediction.x_start)
        return prediction._replace(x_start=x_start, epsilon=process.epsilon_from(x_t, t, x_start))

    return denoise


def static_clip(limit: float = 1.0) -> Clip:
    """x̂_0 clamped to ±limit."""
    return lambda x_start: x_start.clamp(-limit, limit)


def dynamic_threshold(percentile: float = 0.995) -> Clip:
    """Imagen's dynamic thresholding: clamp at the sample's percentile s ≥ 1 of |x̂_0|, then divide by s (Imagen,
    §2.3)."""

    def clip(x_start: Tensor) -> Tensor:
        s = torch.quantile(x_start.flatten(1).abs().float(), percentile, dim=1).clamp_min(1.0)
        s = s.view(-1, *[1] * (x_start.ndim - 1)).to(x_start.dtype)
        return x_start.clamp(-s, s) / s

    return clip


def _join(first: Any, second: Any) -> Tensor | None:
    return None if first is None else torch.cat([first, second.expand_as(first)])
