"""The priors' training objectives: squared error of the diffusion prior, cross-entropy of the autoregressive one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prior.autoregressive import AutoregressivePrior
from prior.conditioning import text_embedding
from prior.config import AutoregressivePriorConfig, PriorConfig
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

    `network` is what is called (the engine around `prior`); image_embedding (B, E) of the configured length.
    """
    count, device = len(image_embedding), image_embedding.device
    x_start = prior.normalise(image_embedding)
    t = process.sample_timesteps(count, generator)
    noise = torch.randn(x_start.shape, generator=generator, device=device)
    drop_text = torch.rand(count, generator=generator, device=device) < config.drop_text
    x_t = process.q_sample(x_start, t, noise)
    output = network(
        x_t,
        t,
        text_embedding=text_embedding(text, config.embedding_length),
        text_tokens=text.tokens,
        text_mask=text.mask,
        drop_text=drop_text,
    )
    losses = process.losses(output, x_start, x_t, t, noise)
    with torch.no_grad():
        predicted = process.to_prediction(output, x_t, t).x_start
        losses["cosine"] = F.cosine_similarity(prior.denormalise(predicted), image_embedding)
    return losses


def autoregressive_loss(
    network: Any,
    prior: AutoregressivePrior,
    config: AutoregressivePriorConfig,
    image_embedding: Tensor,
    text: TextFeatures,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Per-sample losses (B,): `loss`, the mean cross-entropy of a code in nats (ln(buckets) for a blind guess; unCLIP
    §2.2); `accuracy`, the share of codes whose likeliest value is right; `cosine` of the truth with the embedding
    decoded from the likeliest codes, each after the true ones before it.

    `network` is what is called (the engine around `prior`); image_embedding (B, E) of the configured length.
    """
    embedding = text_embedding(text, config.embedding_length)
    codes = prior.codes.encode(image_embedding)  # (B, K)
    dot = prior.dots.quantise((image_embedding * embedding).sum(1))
    count, device = len(codes), codes.device
    drop_text = torch.rand(count, generator=generator, device=device) < config.drop_text
    logits = network(
        codes,
        dot=dot,
        text_embedding=embedding,
        text_tokens=text.tokens,
        text_mask=text.mask,
        drop_text=drop_text,
    )  # (B, K, buckets)
    loss = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(1)
    with torch.no_grad():
        likeliest = logits.argmax(2)
        return {
            "loss": loss,
            "accuracy": (likeliest == codes).float().mean(1),
            "cosine": F.cosine_similarity(prior.codes.decode(likeliest), image_embedding),
        }
