"""Configuration of the corruptions that an upsampler's condition undergoes in training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unclip.config import Config

Range = tuple[float, float]
Whole = tuple[int, int]


def check_ranges(config: Config, **bounds: tuple[float, float]) -> None:
    """ValueError unless each named pair is ordered and lies within its bounds."""
    for name, (lowest, highest) in bounds.items():
        low, high = getattr(config, name)
        if not lowest <= low <= high <= highest:
            raise ValueError(f"{name} is [{low}, {high}], expected smallest then largest within {lowest} to {highest}")


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
    """A mild degradation in BSRGAN's manner, on the low-resolution image: blur, resize, noise, JPEG in random order.

    It is for a decoder's pictures, which an upsampler shall clean up and not replace, and for small sets. The whole
    degradation of the paper is `kind: bsrgan`.
    """

    kind: Literal["bsr"] = "bsr"
    probability: float = Field(1.0, ge=0, le=1, description="share of the images that are degraded")
    kernel_size: int = Field(7, ge=3, le=31, description="pixels of the low-resolution image, odd")
    blur_sigma: Range = Field((0.1, 1.5), description="standard deviation along each axis, pixels")
    isotropic: float = Field(0.5, ge=0, le=1, description="share of the blurs that are isotropic")
    resize_scale: Range = Field((0.5, 1.25), description="edge after the resize, before it is undone")
    noise_sigma: Range = Field((0.0, 10.0), description="standard deviation of the noise in 8-bit levels")
    jpeg_quality: Whole = Field((60, 95), description="Pillow's scale")

    @model_validator(mode="after")
    def _ordered(self) -> BSRConfig:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected an odd number")
        check_ranges(self, blur_sigma=(0.01, 8), resize_scale=(0.1, 4), noise_sigma=(0, 64), jpeg_quality=(1, 100))
        return self


class CameraConfig(Config):
    """Sensor noise of a simulated camera (after Brooks et al. 2019; see upsamplers.camera)."""

    shot_noise: Range = Field((1e-4, 0.012), description="variance a unit of light, drawn log-uniformly")
    read_noise_spread: float = Field(
        0.26, ge=0, description="deviation of log read noise around 2.18 log(shot noise) + 1.2 (Brooks et al., §3.1)"
    )
    red_gain: Range = (1.9, 2.4)
    blue_gain: Range = (1.5, 1.9)

    @model_validator(mode="after")
    def _ordered(self) -> CameraConfig:
        check_ranges(self, shot_noise=(1e-8, 1), red_gain=(1, 8), blue_gain=(1, 8))
        return self


class BSRGANConfig(Config):
    """BSRGAN's degradation from the high-resolution to the low-resolution image (Zhang et al. 2021, §3).

    Two blurs, a random resize, the final reduction, noise, JPEG and camera noise, each once, in an order drawn for
    each image; the final reduction comes after the random resize. Another JPEG ends it. The defaults are those of the
    authors' code at factor 4, lengths in pixels of the image that an operation meets.
    """

    kind: Literal["bsrgan"] = "bsrgan"
    probability: float = Field(1.0, ge=0, le=1, description="share of the images that are degraded; others are reduced")
    halve_first: float = Field(0.25, ge=0, le=1, description="share halved before all else; at factors above 2 only")
    kernel_sizes: Whole = Field((7, 25), description="smallest and largest edge of a blur kernel; odd edges are drawn")
    anisotropic: float = Field(0.5, ge=0, le=1, description="share of the blurs with a rotated, stretched Gaussian")
    blur_sigma: Range = Field((0.1, 2.8), description="standard deviation of an isotropic blur")
    blur_variance: Range = Field((0.1, 8.0), description="eigenvalues of an anisotropic blur's covariance")
    resize_probability: float = Field(
        0.75, ge=0, le=1, description="share resized to a random size; the others are blurred and decimated"
    )
    shrink: Range = Field(
        (1.0, 2.0), description="the resize divides the edge by s in [first, second · factor]; s < 1 enlarges"
    )
    kernels: tuple[Literal["nearest", "area", "bilinear", "bicubic"], ...] = Field(
        ("area", "bilinear", "bicubic"), min_length=1, description="of every resize, equally likely"
    )
    noise_sigma: Range = Field((2.0, 25.0), description="standard deviation of the noise in 8-bit levels")
    noise_shares: tuple[float, float, float] = Field(
        (0.4, 0.4, 0.2), description="shares of colour noise, grey noise, and noise correlated between channels"
    )
    jpeg_probability: float = Field(0.9, ge=0, le=1, description="of the JPEG among the shuffled operations")
    final_jpeg_probability: float = Field(1.0, ge=0, le=1, description="of the JPEG at the end")
    jpeg_quality: Whole = Field((30, 95), description="Pillow's scale")
    camera_probability: float = Field(0.25, ge=0, le=1)
    camera: CameraConfig = CameraConfig()

    @model_validator(mode="after")
    def _ordered(self) -> BSRGANConfig:
        check_ranges(
            self,
            kernel_sizes=(3, 51),
            blur_sigma=(0.01, 20),
            blur_variance=(1e-4, 400),
            shrink=(0.1, 8),
            noise_sigma=(0, 128),
            jpeg_quality=(1, 100),
        )
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes is {list(self.kernel_sizes)}, expected odd numbers")
        if min(self.noise_shares) < 0 or abs(sum(self.noise_shares) - 1) > 1e-6:
            raise ValueError(f"noise_shares is {list(self.noise_shares)}, expected three shares that sum to 1")
        return self


CorruptionConfig = Annotated[
    NoCorruptionConfig | BlurConfig | BSRConfig | BSRGANConfig, Field(discriminator="kind")
]
