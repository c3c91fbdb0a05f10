"""The enlarging networks of DALLE2-pytorch's decoders, for its checkpoints: its U-Net over x_t and the picture of the
stage before, enlarged to nearest neighbours. They are run here, and not trained.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.config import DiffusionConfig
from unclip.nn.dalle2_unet import Dalle2UNet, Dalle2UNetConfig, read_caption
from upsamplers.config import UpsamplerConfig
from upsamplers.network import pad

NOISE_TIMESTEPS = 1000  # fixed in DALLE2-pytorch


class Dalle2UpsamplerConfig(UpsamplerConfig):
    """An enlarging network of DALLE2-pytorch. What `UpsamplerConfig` says of training and of its own network has no
    meaning here; `unet` says it all.

    A level l of `noise_augmentation` counts as everywhere here: 0 is none, and l ≥ 1 is the timestep l − 1 of a linear
    schedule of 1,000 steps, which is what DALLE2-pytorch calls the level and tells the network.
    """

    architecture: Literal["dalle2"] = "dalle2"
    version: str = Field(description="the release of DALLE2-pytorch that the weights come from")
    unet: Dalle2UNetConfig  # type: ignore[assignment]

    @property
    def condition_process(self) -> DiffusionConfig:
        """The process whose noise the condition gets: one of its own, whatever the network was trained on."""
        return DiffusionConfig(schedule="linear", timesteps=NOISE_TIMESTEPS)

    @property
    def text_dim(self) -> int | None:
        """Width of the caption's token features that the network reads; None where it reads none."""
        return self.unet.text_dim

    @model_validator(mode="after")
    def _is_enlarging(self) -> Dalle2UpsamplerConfig:
        if not self.unet.low_res or self.latent is not None or self.residual or self.last_step_network:
            raise ValueError("a network of DALLE2-pytorch has unet.low_res, and neither latents nor residual")
        if self.unet.low_res_noise != (self.noise_augmentation is not None):
            raise ValueError("noise_augmentation and unet.low_res_noise go together")
        return self


class Dalle2Upsampler(nn.Module):
    """(x_t, t, low_res) -> output, as `Upsampler`; and the caption, where the network was trained with it."""

    def __init__(self, config: Dalle2UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        unet = config.unet
        self.unet = Dalle2UNet(unet, 6 if config.diffusion.variance == "learned_range" else 3)
        if unet.text_dim is not None:
            self.text_to_tokens = nn.Linear(unet.text_dim, unet.cond_dim)
            self.null_tokens = nn.Parameter(torch.randn(unet.max_text_len, unet.cond_dim))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        low_res: Tensor,
        noise_level: Tensor | None = None,
        memory: None = None,
        *,
        text_tokens: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """x_t (B, 3, H, W), t (B,), low_res (B, 3, h, w), noise_level (B,) -> (B, 3 or 6, H, W) float32. text_tokens
        (B, L, D) and text_mask (B, L): a caption, without which a network that reads one is given its learned null.
        """
        height, width = x_t.shape[-2:]
        low_res = enlarge_nearest(low_res, (height, width)).to(x_t.dtype)
        padded, beside = pad(x_t, self.config.unet.multiple), pad(low_res, self.config.unet.multiple)
        level = None
        if self.config.unet.low_res_noise:
            level = t.new_zeros(len(x_t)) if noise_level is None else (noise_level - 1).clamp_min(0)
        text = self._read(text_tokens, text_mask, len(x_t))
        output = self.unet(padded, t, None, None, text, beside, level)
        return output[..., :height, :width]  # type: ignore[no-any-return]

    def _read(self, tokens: Tensor | None, mask: Tensor | None, count: int) -> Tensor | None:
        if self.config.unet.text_dim is None:
            return None
        if tokens is None or mask is None:
            return self.null_tokens.expand(count, -1, -1)
        return read_caption(self.text_to_tokens, self.null_tokens, tokens, mask)


def enlarge_nearest(low_res: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbours (B, 3, H, W); what has the size already stays as it is."""
    return low_res if low_res.shape[-2:] == size else F.interpolate(low_res, size=size, mode="nearest")
