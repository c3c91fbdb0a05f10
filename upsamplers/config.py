"""Configuration of an upsampler and of its training run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unclip.config import Config, DataConfig, DiffusionConfig, TrainConfig
from unclip.nn import UNetConfig

Range = tuple[float, float]


class NoCorruptionConfig(Config):
    """The low-resolution image as it is."""

    kind: Literal["none"] = "none"


class BlurConfig(Config):
    """Gaussian blur, the first upsampler's corruption (unCLIP, App. C: kernel 3, sigma 0.6)."""

    kind: Literal["blur"] = "blur"
    kernel_size: int = Field(3, ge=1, le=31, description="pixels of the low-resolution image, odd")
    sigma: float = Field(0.6, gt=0, description="standard deviation in pixels of the low-resolution image")
    probability: float = Field(1.0, ge=0, le=1, description="share of the images that are blurred")

    @model_validator(mode="after")
    def _odd(self) -> BlurConfig:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected an odd number")
        return self


class BSRConfig(Config):
    """BSRGAN's degradation, the second upsampler's corruption (unCLIP, App. C; Zhang et al. 2021).

    The defaults are milder than BSRGAN's own: the model shall clean up a decoder's picture, not replace it.
    """

    kind: Literal["bsr"] = "bsr"
    probability: float = Field(1.0, ge=0, le=1, description="share of the images that are degraded")
    kernel_size: int = Field(7, ge=3, le=31, description="pixels of the low-resolution image, odd")
    blur_sigma: Range = Field((0.1, 1.5), description="standard deviation along each axis, pixels")
    isotropic: float = Field(0.5, ge=0, le=1, description="share of the blurs that are isotropic")
    resize_scale: Range = Field((0.5, 1.25), description="edge after the resize, before it is undone")
    noise_sigma: Range = Field((0.0, 10.0), description="standard deviation of the noise in 8-bit levels")
    jpeg_quality: tuple[int, int] = Field((60, 95), description="Pillow's scale")

    @model_validator(mode="after")
    def _ordered(self) -> BSRConfig:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected an odd number")
        bounds = {
            "blur_sigma": (0.01, 8),
            "resize_scale": (0.1, 4),
            "noise_sigma": (0, 64),
            "jpeg_quality": (1, 100),
        }
        for name, (lowest, highest) in bounds.items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(
                    f"{name} is [{low}, {high}], expected smallest then largest within {lowest} to {highest}"
                )
        return self


CorruptionConfig = Annotated[NoCorruptionConfig | BlurConfig | BSRConfig, Field(discriminator="kind")]


class UpsamplerConfig(Config):
    """One upsampler. The defaults are the paper's recipe: plain ε prediction without a skip (unCLIP, App. C).

    For small models `diffusion.prediction: x_start` with `residual: true` is the stronger choice. The network
    then starts as the interpolation of its condition and learns only what is missing. Given a low-resolution
    image x_0 is nearly settled, so that almost every timestep poses the same regression problem: one to four
    steps suffice, and no parameters are spent on passing noise through, as ε or v would ask for.
    """

    unet: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    low_size: int = Field(64, ge=1, description="edge of the condition, pixels")
    high_size: int = Field(256, ge=2, description="edge of the result, pixels")
    downsample: Literal["bicubic", "area"] = Field(
        "bicubic", description="antialiased filter that makes the training condition from the image"
    )
    corruption: CorruptionConfig = BlurConfig()
    residual: bool = Field(False, description="add the upsampled condition to the output; x_start only")
    steps: int = Field(27, ge=1, description="sampling steps by default")
    sampler: Literal["ddim", "ddpm", "dpmpp_2m"] = "ddim"
    eta: float = Field(0.0, ge=0, description="noise of the sampler; 0 is deterministic DDIM")
    lowest_timestep: int = Field(
        0, ge=0, description="where the evenly spaced timesteps end; the last step goes from there to x_0"
    )

    @property
    def factor(self) -> int:
        """How many times the edge grows."""
        return self.high_size // self.low_size

    @model_validator(mode="after")
    def _consistent(self) -> UpsamplerConfig:
        if self.high_size % self.low_size or self.factor < 2:
            raise ValueError(
                f"high_size {self.high_size} is not a multiple (2 or more) of low_size {self.low_size}"
            )
        if self.unet.attention_resolutions:
            raise ValueError(
                "unet.attention_resolutions is set; an upsampler has convolutions only, because it is "
                "trained on crops and applied to whole images. Leave it empty"
            )
        if self.residual and self.diffusion.prediction != "x_start":
            raise ValueError(
                f"residual adds the condition to a predicted x_0 and needs diffusion.prediction x_start, "
                f"not {self.diffusion.prediction}"
            )
        if self.eta and self.sampler == "dpmpp_2m":
            raise ValueError(f"eta is {self.eta}, but dpmpp_2m is deterministic; set eta to 0 or use ddim")
        if self.lowest_timestep + self.steps > self.diffusion.timesteps:
            raise ValueError(
                f"{self.steps} steps from timestep {self.lowest_timestep} up do not fit into "
                f"{self.diffusion.timesteps} timesteps"
            )
        return self


class UpsamplerRunConfig(Config):
    """A training run: `data.image_size` is the model's high_size, `crop_size` a quarter (unCLIP, App. C)."""

    model: UpsamplerConfig = UpsamplerConfig()
    data: DataConfig = DataConfig(image_size=256, crop_size=64)
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _sizes_agree(self) -> UpsamplerRunConfig:
        if self.data.image_size != self.model.high_size:
            raise ValueError(
                f"data.image_size is {self.data.image_size}, expected model.high_size {self.model.high_size}"
            )
        crop = self.data.crop_size or self.data.image_size
        if crop % self.model.factor:
            raise ValueError(f"data.crop_size {crop} is not divisible by the factor {self.model.factor}")
        return self
