"""The decoder's training objective: L_hybrid (or plain MSE) with independent dropout of embedding and caption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder.config import DecoderConfig
from decoder.inpainting import random_known
from decoder.text import text_embedding
from unclip.clip import TextFeatures
from unclip.diffusion import GaussianDiffusion, noise_augment, sample_levels


def decoder_loss(
    network: Any,
    process: GaussianDiffusion,
    config: DecoderConfig,
    x_start: Tensor,
    image_embedding: Tensor,
    text: TextFeatures,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Per-sample losses (B,) by name for images (B, 3, H, W) in [-1, 1] (unCLIP §2.1; Improved DDPM eq. 16).

    `text` is what the decoder takes of the captions (`CaptionEncoder`).
    """
    count, device = len(x_start), x_start.device
    t = process.sample_timesteps(count, generator)
    noise = torch.randn(x_start.shape, generator=generator, device=device)
    x_t = process.q_sample(x_start, t, noise)
    drop_embedding = torch.rand(count, generator=generator, device=device) < config.drop_embedding
    drop_text = torch.rand(count, generator=generator, device=device) < config.drop_text
    if config.drop_both:
        neither = torch.rand(count, generator=generator, device=device) < config.drop_both
        drop_embedding, drop_text = drop_embedding | neither, drop_text | neither
    condition = {
        "image_embedding": noised_embedding(
            image_embedding, config.embedding_noise, generator, shape=config.embedding_noise_shape
        ),
        "text_tokens": text.tokens,
        "text_mask": text.mask,
        "drop_embedding": drop_embedding,
        "drop_text": drop_text,
    }
    if config.text_embedding_to_time:
        condition["text_embedding"] = text_embedding(text, config)
    if config.embedding_noise_levels:
        level = sample_levels(count, config.embedding_noise_levels, generator)
        condition |= augmented_embedding(
            condition["image_embedding"],
            level,
            torch.randn(image_embedding.shape, generator=generator, device=device),
            process,
            config.scale,
        )
    if config.inpainting:
        known = random_known(count, x_start.shape[-1], generator, config.mask_everything)
        condition |= {"known_image": x_start, "known": known}
    output = network(x_t, t, **condition)
    return process.losses(output, x_start, x_t, t, noise)


def augmented_embedding(
    embedding: Tensor, level: int | Tensor, noise: Tensor, process: GaussianDiffusion, scale: float
) -> dict[str, Tensor]:
    """`image_embedding` (B, E) noised to `level` steps of the process, and the `noise_level` (B,) to tell the network
    (Imagen §2.4; Stable unCLIP). The noise meets the embedding after multiplication by `scale`, where its elements have
    about unit variance.
    """
    noised, level = noise_augment(embedding * scale, level, noise, process)
    return {"image_embedding": noised / scale, "noise_level": level}


def noised_embedding(
    embedding: Tensor, largest: float, generator: torch.Generator, *, shape: str = "isotropic"
) -> Tensor:
    """sqrt(1−w²)·z + w·d back on the unit sphere, w uniform in [0, largest], d a random direction; (B, E).

    `isotropic`: d is uniform on the sphere. `data`: d is the difference of two other embeddings of the batch, so that
    the noise moves z the way embeddings differ, which is how a prior errs; a batch below three falls back to isotropic.
    """
    if largest == 0:
        return embedding
    count, device = len(embedding), embedding.device
    w = largest * torch.rand(count, 1, generator=generator, device=device)
    direction = torch.randn(embedding.shape, generator=generator, device=device)
    if shape == "data" and count > 2:
        # Neighbours in a shuffled ring: never the sample itself, and never twice the same.
        order = torch.randperm(count, generator=generator, device=device)
        others = embedding[order].roll(1, 0) - embedding[order].roll(-1, 0)
        direction = torch.empty_like(others).index_copy(0, order, others)
    return F.normalize((1 - w**2).sqrt() * embedding + w * F.normalize(direction, dim=1), dim=1)
