"""The decoder's training objective: L_hybrid (or plain MSE) with independent dropout of embedding and caption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder.config import DecoderConfig
from unclip.clip import TextFeatures
from unclip.diffusion import GaussianDiffusion


def decoder_loss(
    network: Any,
    process: GaussianDiffusion,
    config: DecoderConfig,
    x_start: Tensor,
    image_embedding: Tensor,
    text: TextFeatures,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Per-sample losses (B,) by name for images (B, 3, H, W) in [-1, 1] (unCLIP §2.1; Improved DDPM eq. 16)."""
    count, device = len(x_start), x_start.device
    t = process.sample_timesteps(count, generator)
    noise = torch.randn(x_start.shape, generator=generator, device=device)
    x_t = process.q_sample(x_start, t, noise)
    drop_embedding = torch.rand(count, generator=generator, device=device) < config.drop_embedding
    drop_text = torch.rand(count, generator=generator, device=device) < config.drop_text
    output = network(
        x_t,
        t,
        image_embedding=noised_embedding(image_embedding, config.embedding_noise, generator),
        text_tokens=text.tokens,
        text_mask=text.mask,
        drop_embedding=drop_embedding,
        drop_text=drop_text,
    )
    return process.losses(output, x_start, x_t, t, noise)


def noised_embedding(embedding: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """sqrt(1−w²)·z + w·ε̂ back on the unit sphere, w uniform in [0, largest], ε̂ a random direction; (B, E)."""
    if largest == 0:
        return embedding
    w = largest * torch.rand(len(embedding), 1, generator=generator, device=embedding.device)
    direction = F.normalize(torch.randn(embedding.shape, generator=generator, device=embedding.device), dim=1)
    return F.normalize((1 - w**2).sqrt() * embedding + w * direction, dim=1)
