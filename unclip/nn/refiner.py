"""What a U-Net that folds pixels into channels adds at full resolution, so that its patches meet without seams."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.nn.blocks import zeroed
from unclip.nn.sparing import conv_and_shift


class Refiner(nn.Module):
    """Three convolutions over what the U-Net puts out and what it was given, added to the former.

    The last one starts at zero: a network that gets a refiner afterwards begins by answering as before.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, embedding_dim: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels + out_channels, width, 3, padding=1)
        self.shift = nn.Linear(embedding_dim, width)
        self.conv_mid = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = zeroed(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, h: Tensor, x: Tensor, emb: Tensor) -> Tensor:
        """h (B, out_channels, H, W), x (B, in_channels, H, W), emb (B, embedding_dim) -> as h."""
        r = conv_and_shift(torch.cat([h, x], 1), self.conv_in, self.shift(F.silu(emb))[:, :, None, None])
        r = F.silu(self.conv_mid(F.silu(r)))
        return h + self.conv_out(r)  # type: ignore[no-any-return]
