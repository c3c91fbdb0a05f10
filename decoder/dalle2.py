"""The decoder of DALLE2-pytorch, for its checkpoints: its base U-Net behind the conditioning that our decoder takes.

The image embedding is added to the timestep embedding and becomes tokens that every level sees; the caption's tokens
are seen by the middle alone, a learned row in the place of padding. It is run here, and not trained.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from decoder.config import DecoderConfig
from unclip.nn.dalle2_unet import Dalle2UNet, Dalle2UNetConfig, read_caption
from unclip.nn.embeddings import random_parameter


class Dalle2DecoderConfig(DecoderConfig):
    """A decoder of DALLE2-pytorch. What `DecoderConfig` says of its own network (tokens, seeds, noise) has no meaning
    here; `unet` says it all.
    """

    architecture: Literal["dalle2"] = "dalle2"
    version: str = Field(description="the release of DALLE2-pytorch that the weights come from")
    unet: Dalle2UNetConfig  # type: ignore[assignment]


class Dalle2Condition(NamedTuple):
    """What the U-Net takes of the conditioning."""

    time: Tensor | None
    image_tokens: Tensor
    text_tokens: Tensor | None


class Dalle2Decoder(nn.Module):
    """(x_t, t, conditioning) -> output, as `Decoder`."""

    def __init__(self, config: Dalle2DecoderConfig) -> None:
        super().__init__()
        self.config = config
        unet = config.unet
        out = 6 if config.diffusion.variance == "learned_range" else 3
        self.unet = Dalle2UNet(unet, out)
        self.image_to_tokens = nn.Linear(config.embedding_dim, unet.num_image_tokens * unet.cond_dim)
        self.image_to_time = nn.Linear(config.embedding_dim, unet.time_dim) if unet.add_image_to_time else None
        self.text_to_tokens = nn.Linear(unet.text_dim, unet.cond_dim) if unet.text_dim else None
        self.null_image_tokens = random_parameter(unet.num_image_tokens, unet.cond_dim)
        self.null_image_time = random_parameter(unet.time_dim)
        self.null_tokens = random_parameter(unet.max_text_len, unet.cond_dim)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        image_embedding: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        drop_embedding: Tensor,
        drop_text: Tensor,
    ) -> Tensor:
        """x_t (B, 3, H, W), t (B,), image_embedding (B, E), text_tokens (B, L, D), text_mask (B, L) bool;
        drop_embedding and drop_text (B,) bool -> (B, 3 or 6, H, W) float32.
        """
        condition = self.read(
            image_embedding=image_embedding,
            text_tokens=text_tokens,
            text_mask=text_mask,
            drop_embedding=drop_embedding,
            drop_text=drop_text,
        )
        return self.conditioned(x_t, t, condition)

    def read(
        self,
        *,
        image_embedding: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        drop_embedding: Tensor,
        drop_text: Tensor,
    ) -> Dalle2Condition:
        """What `forward` makes of the conditioning alone, for `conditioned`."""
        unet, kept = self.config.unet, ~drop_embedding
        image = self.image_to_tokens(image_embedding).unflatten(1, (unet.num_image_tokens, -1))
        image = torch.where(kept[:, None, None], image, self.null_image_tokens.to(image.dtype))
        time = None
        if self.image_to_time is not None:
            time = F.gelu(self.image_to_time(image_embedding))
            time = torch.where(kept[:, None], time, self.null_image_time.to(time.dtype))
        text = None
        if self.text_to_tokens is not None:
            text = read_caption(self.text_to_tokens, self.null_tokens, text_tokens, text_mask & ~drop_text[:, None])
        return Dalle2Condition(time, image, text)

    def conditioned(self, x_t: Tensor, t: Tensor, condition: Dalle2Condition) -> Tensor:
        """What `forward` gives for x_t (B, 3, H, W) and t (B,) under conditioning that was read."""
        return self.unet(x_t, t, condition.time, condition.image_tokens, condition.text_tokens)  # type: ignore[no-any-return]
