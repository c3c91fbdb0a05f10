"""A small decoder, features to feed it, and how it is trained on a handful of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder import Decoder, DecoderConfig, DecoderStage, decoder_loss
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.diffusion import GaussianDiffusion

DIM, TOKEN, LENGTH, CONTEXT, SIZE = 12, 10, 5, 16, 8
SMALL: dict[str, Any] = {
    "embedding_dim": DIM,
    "token_dim": TOKEN,
    "text_length": LENGTH,
    "context_dim": CONTEXT,
    "steps": 3,
    "unet": {
        "image_size": SIZE,
        "model_channels": 16,
        "channel_mult": [1],
        "num_res_blocks": 1,
        "attention_resolutions": [8],
        "head_channels": 16,
    },
}


def config(**changes: Any) -> DecoderConfig:
    return parse_config(DecoderConfig, {**SMALL, **changes})


def network(**changes: Any) -> Decoder:
    """Nothing is zero, so that every input reaches the output."""
    torch.manual_seed(0)
    decoder = randomised(Decoder(config(**changes)))
    if decoder.config.null_text == "clip":
        decoder.set_null_text(text(1, seed=90))
    return decoder.requires_grad_(False)


def randomised(decoder: Decoder) -> Decoder:
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.eval()


def stage(**changes: Any) -> DecoderStage:
    decoder = network(**changes)
    return DecoderStage(decoder, decoder.config)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(count: int, seed: int = 0) -> Tensor:
    return F.normalize(rand(count, DIM, seed=seed), dim=1)


def text(count: int, seed: int = 0) -> TextFeatures:
    """Features as FrozenCLIP gives them: tokens beyond the end are masked, embeddings as long as `norm` says."""
    mask = torch.arange(LENGTH) <= (torch.arange(count) % (LENGTH - 1) + 1)[:, None]
    tokens = rand(count, LENGTH, TOKEN, seed=seed) * mask[..., None]
    return TextFeatures(tokens, mask, unit(count, seed + 1), 1 + rand(count, seed=seed + 2).abs())


def inputs(count: int = 2, size: int = SIZE) -> dict[str, Tensor]:
    """What a decoder is called with, nothing dropped."""
    features, no = text(count), torch.zeros(count, dtype=torch.bool)
    return {
        "x_t": rand(count, 3, size, size, seed=3),
        "t": torch.arange(count) * 300 + 50,
        "image_embedding": unit(count, 7),
        "text_tokens": features.tokens,
        "text_mask": features.mask,
        "drop_embedding": no,
        "drop_text": no,
    }


class Spy:
    """Records the conditioning; answers with zeros of twice the channels."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        self.calls.append(conditioning)
        return torch.zeros(len(x_t), 6, *x_t.shape[2:])


def pictures(count: int) -> Tensor:
    """Discs of different places and colours, (B, 3, S, S) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    drawn = []
    for i in range(count):
        inside = (y - 2 - 3 * (i // 2 % 2)) ** 2 + (x - 2 - 3 * (i % 2)) ** 2 <= 4
        colour = torch.tensor([1.0 if i % 3 == k else -0.5 for k in range(3)])
        drawn.append(torch.where(inside, colour[:, None, None], torch.tensor(-1.0)))
    return torch.stack(drawn)


def overfit(
    own: DecoderConfig, embedding: Tensor, features: TextFeatures, steps: int = 80, lr: float = 5e-3
) -> tuple[DecoderStage, list[float]]:
    """Train on `pictures`, one a row of the features -> the stage and the history of the squared error."""
    torch.manual_seed(0)
    decoder, process = Decoder(own), GaussianDiffusion(own.diffusion)
    if own.null_text == "clip":
        decoder.set_null_text(text(1, seed=90))
    count = len(embedding)
    truth, generator = pictures(count), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr)
    index, history = torch.arange(count).repeat(8 // count), []
    for _ in range(steps):
        losses = decoder_loss(decoder, process, own, truth[index], embedding[index], features[index], generator)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
        history.append(losses["mse"].mean().item())
    return DecoderStage(decoder.requires_grad_(False), own), history


def worst_error(drawn: Tensor) -> float:
    """Largest squared error of a picture over the pictures' spread around their mean."""
    truth = pictures(len(drawn))
    error = (drawn - truth).square().mean(dim=(1, 2, 3))
    return float(error.max() / (truth - truth.mean(0)).square().mean())
