"""The prior's training objective: plain MSE to the unnoised image embedding (unCLIP §2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prior.config import PriorConfig
from prior.network import Prior
from unclip.clip import TextFeatures
from unclip.diffusion import GaussianDiffusion


def prior_loss(
    network: Any,
    prior: Prior,
    process: GaussianDiffusion,
    config: PriorConfig,
    image_embedding: Tensor,
    text: TextFeatures,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Per-sample losses (B,): `loss` and `mse` in the normalised space, and `cosine` of prediction and truth in CLIP's.

    `network` is what is called (the engine around `prior`); image_embedding (B, E) of unit length.
    """
    count, device = len(image_embedding), image_embedding.device
    x_start = prior.normalise(image_embedding)
    t = process.sample_timesteps(count, generator)
    noise = torch.randn(x_start.shape, generator=generator, device=device)
    drop_text = torch.rand(count, generator=generator, device=device) < config.drop_text
    x_t = process.q_sample(x_start, t, noise)
    output = network(
        x_t, t, text_embedding=text.embedding, text_tokens=text.tokens, text_mask=text.mask, drop_text=drop_text
    )
    losses = process.losses(output, x_start, x_t, t, noise)
    with torch.no_grad():
        predicted = process.to_prediction(output, x_t, t).x_start
        losses["cosine"] = F.cosine_similarity(prior.denormalise(predicted), image_embedding)
    return losses
