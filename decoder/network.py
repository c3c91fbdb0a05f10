"""The unCLIP decoder's network: a GLIDE U-Net conditioned on a CLIP image embedding and a caption (unCLIP §2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoder.config import DecoderConfig
from unclip.nn import UNet


class Decoder(nn.Module):
    """The image embedding is added to the timestep embedding and becomes extra context tokens beside the caption's.

    Null conditions are learned: one embedding in place of a dropped image embedding, one row of tokens for a dropped
    caption.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = 3
        out_channels = 2 * channels if config.diffusion.variance == "learned_range" else channels
        self.unet = UNet(config.unet, channels, out_channels, config.context_dim)
        dim = config.embedding_dim
        self.embedding_to_time = nn.Linear(dim, self.unet.embedding_dim)
        self.embedding_to_tokens = nn.Linear(dim, config.image_tokens * config.context_dim)
        self.text_to_tokens = nn.Linear(config.token_dim, config.context_dim)
        self.text_norm = nn.LayerNorm(config.context_dim)
        self.null_embedding = nn.Parameter(torch.zeros(dim))
        self.null_text = nn.Parameter(torch.randn(config.text_length, config.token_dim) * 0.02)
        self.seed = (
            nn.Linear(dim, self.unet.bottom_channels * self.unet.bottom_size**2) if config.spatial_seed else None
        )

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
        """x_t (B, 3, H, W), t (B,), image_embedding (B, E) of unit length, text_tokens (B, L, D), text_mask (B, L)
        bool;
        drop_embedding and drop_text (B,) bool: True puts the learned null in its place. -> (B, 3 or 6, H, W) float32.
        """
        embedding = torch.where(
            drop_embedding[:, None], self.null_embedding.to(image_embedding.dtype), self._scaled(image_embedding)
        )
        tokens = torch.where(drop_text[:, None, None], self.null_text.to(text_tokens.dtype), text_tokens)
        mask = text_mask | drop_text[:, None]
        image_context = self.embedding_to_tokens(embedding).unflatten(1, (self.config.image_tokens, -1))
        text_context = self.text_norm(self.text_to_tokens(tokens))
        context = torch.cat([text_context, image_context.to(text_context.dtype)], dim=1)  # (B, L + 4, C)
        mask = F.pad(mask, (0, self.config.image_tokens), value=True)
        seed = None
        if self.seed is not None:
            size = self.unet.bottom_size
            seed = self.seed(embedding).unflatten(1, (-1, size, size))
        return self.unet(x_t, t, self.embedding_to_time(embedding), context, mask, seed)  # type: ignore[no-any-return]

    def _scaled(self, embedding: Tensor) -> Tensor:
        """A unit vector times sqrt(E): elements of size about 1, as linear layers expect."""
        return embedding * self.config.embedding_dim**0.5
