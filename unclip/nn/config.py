"""Shapes of the U-Nets, as configurations and model folders hold them; without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from unclip.config import Config


class UNetConfig(Config):
    """Shape of the U-Net; the paper's sizes are in configs/."""

    image_size: int = Field(64, ge=4, description="edge the network is trained at; fixes where attention sits")
    model_channels: int = Field(64, ge=8, multiple_of=2, description="even; half the timestep's features are cosines")
    channel_mult: tuple[int | float, ...] = Field((1, 2, 3, 4), min_length=1, description="width of each level")
    num_res_blocks: int | tuple[int, ...] = Field(2, description="residual blocks a level, or one number for each")
    attention_resolutions: tuple[int, ...] = Field((), description="feature map edges that get attention")
    middle_attention: bool | None = Field(
        None, description="attention between the two middle blocks; None: where attention_resolutions names their edge"
    )
    head_channels: int = Field(64, ge=8)
    scale_shift_norm: bool = Field(
        True, description="the embedding scales and shifts each block's second norm (ADM); false: it is added before it"
    )
    resblock_updown: bool = Field(
        True, description="residual blocks resample (ADM); false: a convolution alone does (DDPM)"
    )
    norm_groups: int = Field(32, ge=1, description="groups of every GroupNorm; a narrow layer takes a divisor of it")
    norm_eps: float = Field(1e-5, gt=0)
    patch_size: int = Field(1, ge=1, description="pixels folded into channels by the stem, a side")
    refine_channels: int = Field(
        0, ge=0, description="width of three convolutions at the image's own resolution behind the last one; 0: none"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    checkpoint_activations: bool = False

    @model_validator(mode="after")
    def _shapes_fit(self) -> UNetConfig:
        levels, blocks = len(self.channel_mult), self.num_res_blocks
        if not isinstance(blocks, int) and len(blocks) != levels:
            raise ValueError(f"num_res_blocks names {len(blocks)} levels, channel_mult {levels}")
        if min((blocks,) if isinstance(blocks, int) else blocks) < 0:
            raise ValueError("num_res_blocks must be 0 or more at every level")
        for level, width in enumerate(self.widths):
            if width < 1 or width != self.model_channels * self.channel_mult[level]:
                raise ValueError(
                    f"channel_mult {self.channel_mult[level]} times model_channels {self.model_channels} is no whole "
                    "number of channels"
                )
            edge = self.image_size // self.patch_size // 2**level
            middle = level == levels - 1 and self.middle_attention
            if (edge in self.attention_resolutions or middle) and width % self.head_channels:
                raise ValueError(
                    f"head_channels {self.head_channels} does not divide the {width} channels at edge {edge}"
                )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(self.model_channels * mult) for mult in self.channel_mult)

    @property
    def multiple(self) -> int:
        """What the edges of its input must be divisible by."""
        return int(self.patch_size * 2 ** (len(self.channel_mult) - 1))


class EfficientUNetConfig(Config):
    """Shape of an Efficient U-Net; the defaults are Imagen's super-resolution networks (App. F)."""

    kind: Literal["efficient"] = "efficient"
    image_size: int = Field(64, ge=4, description="edge the network is trained at")
    model_channels: int = Field(128, ge=8, multiple_of=2)
    channel_mult: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1, description="width of each level")
    num_res_blocks: tuple[int, ...] = Field((2, 4, 8, 8), min_length=1, description="residual blocks of each level")
    bottom_attention: bool = Field(False, description="self-attention after the blocks of the lowest level")
    head_channels: int = Field(64, ge=8)
    patch_size: int = Field(1, ge=1, description="pixels folded into channels by the stem, a side")
    dropout: float = Field(0.0, ge=0, lt=1)
    checkpoint_activations: bool = False

    @model_validator(mode="after")
    def _shapes_fit(self) -> EfficientUNetConfig:
        if len(self.num_res_blocks) != len(self.channel_mult):
            raise ValueError(
                f"num_res_blocks names {len(self.num_res_blocks)} levels, channel_mult {len(self.channel_mult)}"
            )
        if min(self.num_res_blocks) < 1 or min(self.channel_mult) < 1:
            raise ValueError("num_res_blocks and channel_mult must be 1 or more at every level")
        bottom = self.model_channels * self.channel_mult[-1]
        if self.bottom_attention and bottom % self.head_channels:
            raise ValueError(f"head_channels {self.head_channels} does not divide the {bottom} channels at the bottom")
        return self
