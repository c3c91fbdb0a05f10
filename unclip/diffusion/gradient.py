"""Guidance by gradients: a denoiser steered by a classifier, or by the similarity of a CLIP that knows noise.

Both add s·∇ log p(y|x_t) to the score. In ε that is ε̂ − s·sqrt(1−ᾱ_t)·∇ (Dhariwal & Nichol 2021, algorithm 2 and
eq. 14), which every sampler here can follow; DDPM's mean moves by s·β/sqrt(α)·∇, that is s·Σ∇ of algorithm 1 to first
order in β. Unlike classifier-free guidance it costs a backward pass, though none through the network where the
gradient is taken at x_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from unclip.diffusion.clipping import Clip
from unclip.diffusion.guidance import Denoiser
from unclip.diffusion.process import GaussianDiffusion, Prediction

LogProbability = Callable[[Tensor, Tensor], Tensor]
"""(x (B, …), t (B,)) -> (B,): log p(y|x_t), or a similarity, of each sample by itself."""


def classifier_guidance(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    log_probability: LogProbability,
    scale: float = 1.0,
    clip: Clip | None = None,
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021): `log_probability(x_t, t)` is log p(y|x_t) of a classifier that was
    trained on noised samples; scale 1 is Bayes' rule.

    A learned variance stays as it is. `clip` is applied to the guided x̂_0, and ε̂ follows it. Where ᾱ_t is 0 nothing is
    moved: pure noise says nothing of y. Works inside torch.inference_mode too.
    """

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        gradient, _ = _gradient(lambda x: (log_probability(x, t.clone()), None), x_t)
        return _steered(process, denoiser(x_t, t), gradient, x_t, t, scale, clip)

    return guided


def clip_guidance(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    similarity: LogProbability,
    scale: float,
    clip: Clip | None = None,
    *,
    at: Literal["x_t", "x_start"] = "x_t",
) -> Denoiser:
    """CLIP guidance (GLIDE, Nichol et al. 2022, §2.3): the gradient of f(x_t, t)·g(y) in the classifier's place.

    at="x_t": `similarity` is that of a noise-aware CLIP, called with x_t. at="x_start": of a CLIP that knows clean
    images alone, called with x̂_0(x_t); the gradient then goes back through the denoiser, at the price of its backward
    pass. Else as `classifier_guidance`.
    """
    if at == "x_t":
        return classifier_guidance(denoiser, process, similarity, scale, clip)

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        def of_x_start(x: Tensor) -> tuple[Tensor, Prediction]:
            prediction = denoiser(x, t.clone())
            return similarity(prediction.x_start, t.clone()), prediction

        gradient, prediction = _gradient(of_x_start, x_t)
        assert prediction is not None
        detached = Prediction(*(None if value is None else value.detach() for value in prediction))  # type: ignore[arg-type]
        return _steered(process, detached, gradient, x_t, t, scale, clip)

    return guided


def _gradient(
    function: Callable[[Tensor], tuple[Tensor, Prediction | None]], x_t: Tensor
) -> tuple[Tensor, Prediction | None]:
    """∇ of each sample's value by its own x_t, and what else the function returns."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        value, rest = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient, rest


def _steered(
    process: GaussianDiffusion,
    prediction: Prediction,
    gradient: Tensor,
    x_t: Tensor,
    t: Tensor,
    scale: float,
    clip: Clip | None,
) -> Prediction:
    alpha, sigma = process.alpha_sigma(t, x_t)
    epsilon = prediction.epsilon - scale * sigma * gradient
    # The same move in x_0, which keeps the digits of x̂_0 and can be left out where there is no signal.
    shift = torch.where(alpha > 0, scale * sigma**2 / alpha.clamp_min(1e-30) * gradient, torch.zeros_like(gradient))
    x_start = prediction.x_start + shift
    epsilon = torch.where(alpha > 0, epsilon, prediction.epsilon)
    if clip is not None:
        x_start = clip(x_start)
        epsilon = process.epsilon_from(x_t, t, x_start)
    return prediction._replace(x_start=x_start, epsilon=epsilon)
