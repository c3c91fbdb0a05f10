"""The upsampler's network: a convolutional ADM U-Net over x_t and the enlarged condition (unCLIP, App. C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.nn import UNet
from upsamplers.config import UpsamplerConfig

CHANNELS = 3


class Upsampler(nn.Module):
    """x_t (B, 3, H, W), t (B,), low_res (B, 3, h, w) → (B, 3, H, W), or 6 channels with a learned variance.

    Any H and W: the inputs are padded by reflection to what the U-Net divides by, and the output is cut back.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        learned = config.diffusion.variance == "learned_range"
        self.unet = UNet(config.unet, 2 * CHANNELS, 2 * CHANNELS if learned else CHANNELS)

    def forward(self, x_t: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
        height, width = x_t.shape[-2:]
        enlarged = upsample(low_res, (height, width))
        joined = _pad(torch.cat([x_t, enlarged.to(x_t.dtype)], dim=1), self.unet.multiple)
        # Convolutions follow their input's layout, and channels_last is the fast one. The weights stay
        # contiguous, because DeepSpeed broadcasts them as flat memory.
        joined = joined.contiguous(memory_format=torch.channels_last)
        output: Tensor = self.unet(joined, t)[..., :height, :width]
        if not self.config.residual:
            return output
        # conv_out starts at zero, so an untrained network's x_0 is exactly the interpolated condition.
        x_start = output[:, :CHANNELS] + enlarged
        return torch.cat([x_start, output[:, CHANNELS:]], dim=1)


def upsample(low_res: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic interpolation to (H, W), in float32 and without its overshoot."""
    return F.interpolate(low_res.float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def _pad(x: Tensor, multiple: int) -> Tensor:
    """Extend H and W at the right and the bottom to multiples of `multiple`."""
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if bottom == right == 0:
        return x
    # Reflection needs an image larger than the margin.
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)
