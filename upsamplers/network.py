"""The upsampler's network: a convolutional U-Net over x_t and the enlarged condition (unCLIP, App. C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from unclip.nn import UNet, timestep_embedding
from unclip.nn.config import EfficientUNetConfig
from unclip.nn.efficient_unet import EfficientUNet
from unclip.nn.storage import StripeMemory, peak_memory
from unclip.nn.striped import run_striped
from upsamplers.config import UpsamplerConfig

CHANNELS = 3  # of pictures


class Upsampler(nn.Module):
    """x_t (B, 3, H, W), t (B,), low_res (B, 3, h, w) → (B, 3, H, W), or 6 channels with a learned variance. In latents
    x_t and the result are latents (B, C, H/f, W/f), and so is low_res where `condition` is latent.

    Any H and W: the inputs are padded by reflection to what the U-Net divides by, and the output is cut back.
    With `last_step_network` a second U-Net, `last_unet`, takes the samples whose t is the last step's.
    """

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = _unet(config)
        self.in_channels = config.channels + config.condition_channels
        if config.last_step_network:
            self.last_unet, self.last_timestep = _unet(config), config.last_timestep
        if config.noise_augmentation is not None:
            width, dim = config.unet.model_channels, self.unet.embedding_dim
            self.level_embed = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        low_res: Tensor,
        noise_level: Tensor | None = None,
        memory: StripeMemory | None = None,
    ) -> Tensor:
        """noise_level (B,): how much noise `low_res` carries, where the model is trained with noise augmentation.

        With `memory` the U-Net runs in stripes of rows within it; the result is the same.
        """
        height, width = x_t.shape[-2:]
        pixels = self.config.condition == "image"
        folded = F.pixel_unshuffle(low_res, self.config.fold) if self.config.fold > 1 else low_res
        enlarged = upsample(folded, (height, width), self.config.clamp_condition and pixels)
        joined = pad(torch.cat([x_t, enlarged.to(x_t.dtype)], dim=1), self.unet.multiple)
        # Convolutions follow their input's layout, and channels_last is the fast one. The weights stay
        # contiguous, because DeepSpeed broadcasts them as flat memory.
        joined = joined.contiguous(memory_format=torch.channels_last)
        output = self._route(joined, t, self._level_embedding(noise_level, len(x_t)), memory)[..., :height, :width]
        if not self.config.residual:
            return output
        # conv_out starts at zero, so an untrained network's x_0 is exactly the interpolated condition.
        x_start = output[:, : self.config.channels] + enlarged
        return torch.cat([x_start, output[:, self.config.channels :]], dim=1)

    def _level_embedding(self, level: Tensor | None, count: int) -> Tensor | None:
        if self.config.noise_augmentation is None:
            return None
        first: nn.Linear = self.level_embed[0]  # type: ignore[assignment]
        if level is None:
            level = torch.zeros(count, dtype=torch.long, device=first.weight.device)
        features = timestep_embedding(level, self.config.unet.model_channels)
        return self.level_embed(features.to(first.weight.dtype))  # type: ignore[no-any-return]

    def _route(self, x: Tensor, t: Tensor, embedding: Tensor | None, memory: StripeMemory | None) -> Tensor:
        """Each sample through the U-Net that its timestep belongs to."""

        def run(unet: nn.Module, chosen: Tensor | slice) -> Tensor:
            added = None if embedding is None else embedding[chosen]
            if memory is None:
                return unet(x[chosen], t[chosen], added)  # type: ignore[no-any-return]
            return run_striped(unet, x[chosen], t[chosen], added, memory=memory)

        if not self.config.last_step_network:
            return run(self.unet, slice(None))
        if isinstance(t, FakeTensor):  # a plan does not know whose a sample is; each network has one at least
            return torch.cat([run(self.unet, slice(1, None)), run(self.last_unet, slice(0, 1))])
        last = t <= self.last_timestep
        rows = [(~last).nonzero()[:, 0], last.nonzero()[:, 0]]
        # In training every network that learns runs in every process, were it on a row that is cut away again:
        # processes must agree on which gradients there are to sum, and under ZeRO 3 on whose weights are gathered.
        always = [self.training and _learns(unet) for unet in (self.unet, self.last_unet)]
        parts = []
        for unet, chosen, needed in zip((self.unet, self.last_unet), rows, always, strict=True):
            if len(chosen) == len(x):
                parts.append(run(unet, slice(None)))  # a view, which keeps channels_last
            elif needed or len(chosen):
                parts.append(run(unet, chosen if len(chosen) else slice(0, 1))[: len(chosen)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(rows).argsort()]

    def activation_bytes(self, batch: int, height: int, width: int) -> int:
        """Most memory in bytes, beside the weights, that a whole forward pass takes in float32."""
        multiple = self.unet.multiple
        edges = (height + -height % multiple, width + -width % multiple)
        x = torch.empty(batch, self.in_channels, *edges, device="meta")
        return peak_memory(self.unet, x, torch.empty(batch, dtype=torch.long, device="meta"))


def _unet(config: UpsamplerConfig) -> UNet | EfficientUNet:
    in_channels = config.channels + config.condition_channels
    out_channels = (2 if config.diffusion.variance == "learned_range" else 1) * config.channels
    if isinstance(config.unet, EfficientUNetConfig):
        return EfficientUNet(config.unet, in_channels, out_channels)
    return UNet(config.unet, in_channels, out_channels)


def _learns(network: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters())


def upsample(low_res: Tensor, size: tuple[int, int], clamp: bool = True) -> Tensor:
    """Antialiased bicubic interpolation to (H, W), in float32, and without its overshoot where `clamp`."""
    enlarged = F.interpolate(low_res.float(), size=size, mode="bicubic", antialias=True)
    return enlarged.clamp(-1, 1) if clamp else enlarged


def pad(x: Tensor, multiple: int) -> Tensor:
    """Extend H and W at the right and the bottom to multiples of `multiple`."""
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if bottom == right == 0:
        return x
    # Reflection needs an image larger than the margin.
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)
