"""Configuration of an upsampler and of its training run."""

from __future__ import annotations

from math import gcd
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from unclip.config import (
    DETERMINISTIC,
    Config,
    DataConfig,
    DiffusionConfig,
    SamplerName,
    StepSpec,
    TrainConfig,
    count_steps,
)
from unclip.config_latent import LatentConfig, check_latent
from unclip.diffusion.timesteps import check_steps_exist, timesteps_from
from unclip.nn import UNetConfig
from unclip.nn.config import EfficientUNetConfig
from upsamplers.corruption_config import (
    BlurConfig,
    BSRConfig,
    BSRGANConfig,
    CameraConfig,
    CorruptionConfig,
    NoCorruptionConfig,
)

__all__ = [
    "ADMConfig",
    "BSRConfig",
    "BSRGANConfig",
    "BlurConfig",
    "CameraConfig",
    "CorruptionConfig",
    "EfficientUNetConfig",
    "NoCorruptionConfig",
    "UpsamplerConfig",
    "UpsamplerRunConfig",
]


class ADMConfig(UNetConfig):
    """The paper's network, an ADM U-Net; what `unet` means unless `kind` says otherwise."""

    kind: Literal["adm"] = "adm"


def _unet_kind(value: Any) -> str:
    """Configurations written before there was a choice name no kind."""
    kind = value.get("kind", "adm") if isinstance(value, dict) else getattr(value, "kind", "adm")
    return str(kind)


NetworkConfig = Annotated[
    Annotated[ADMConfig, Tag("adm")] | Annotated[EfficientUNetConfig, Tag("efficient")],
    Discriminator(
        _unet_kind,
        custom_error_type="unet_kind",
        custom_error_message="expected kind adm or efficient",
    ),
]


class UpsamplerConfig(Config):
    """One upsampler. The defaults are the paper's recipe: plain ε prediction without a skip (unCLIP, App. C).

    For small models `diffusion.prediction: x_start` with `residual: true` is the stronger choice. The network
    then starts as the interpolation of its condition and learns only what is missing. Given a low-resolution
    image x_0 is nearly settled, so that almost every timestep poses the same regression problem: one to four
    steps suffice, and no parameters are spent on passing noise through, as ε or v would ask for.
    """

    latent: LatentConfig | None = Field(
        None, description="the autoencoder in whose latents the result is diffused (Latent Diffusion); null: pixels"
    )
    condition: Literal["image", "latent"] = Field(
        "image",
        description="what a network in latents sees of the low-resolution image: its pixels, folded into channels "
        "where they are finer than the latents, or its own latents",
    )
    unet: NetworkConfig = ADMConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    low_size: int = Field(64, ge=1, description="edge of the condition, pixels")
    high_size: int = Field(256, ge=2, description="edge of the result, pixels")
    downsample: Literal["bicubic", "area"] = Field(
        "bicubic", description="antialiased filter that makes the training condition from the image"
    )
    clamp_condition: bool = Field(
        True, description="the enlarged condition is held in [-1, 1]; false keeps bicubic's overshoot, as Karlo does"
    )
    corruption: CorruptionConfig = BlurConfig()
    noise_augmentation: int | None = Field(
        None,
        ge=1,
        description="largest level of the noise added to the condition in training, in timesteps of `diffusion`; the "
        "network is told the level (Imagen, §2.4). None: no noise, and no input for its level",
    )
    noise_level: int = Field(0, ge=0, description="level of that noise at sampling, by default")
    last_step_network: bool = Field(
        False, description="a second network of the same shape for the last step alone, at `lowest_timestep` (Karlo)"
    )
    residual: bool = Field(False, description="add the upsampled condition to the output; x_start only")
    steps: StepSpec = Field(27, description="sampling steps by default: a number, 'ddim27', or a list of timesteps")
    sampler: SamplerName = "ddim"
    eta: float = Field(0.0, ge=0, description="noise of the sampler; 0 is deterministic DDIM")
    lowest_timestep: int = Field(
        0, ge=0, description="where the evenly spaced timesteps end; the last step goes from there to x_0"
    )

    @property
    def factor(self) -> int:
        """How many times the edge grows."""
        return self.high_size // self.low_size

    @property
    def channels(self) -> int:
        """Channels of what is diffused."""
        return 3 if self.latent is None else self.latent.channels

    @property
    def fold(self) -> int:
        """Pixels a side of the low-resolution image that fall on one latent; 1 where there are no more pixels."""
        if self.latent is None or self.condition == "latent":
            return 1
        return max(1, self.low_size * self.latent.factor // self.high_size)

    @property
    def condition_channels(self) -> int:
        """Channels of the condition as the network takes it."""
        return self.channels if self.condition == "latent" else 3 * self.fold**2

    @property
    def low_multiple(self) -> int:
        """What the edges of the low-resolution image must be divisible by, for whole latents."""
        if self.latent is None:
            return 1
        own = self.latent.factor
        return own if self.condition == "latent" else own // gcd(own, self.factor)

    @property
    def condition_process(self) -> DiffusionConfig:
        """The process whose noise `noise_augmentation` gives to the condition."""
        return self.diffusion

    @property
    def text_dim(self) -> int | None:
        """Width of the caption's token features that the network reads: none, as in the paper."""
        return None

    @property
    def last_timestep(self) -> int:
        """The timestep of the last step, which a last-step network is for."""
        return timesteps_from(self.steps, self.diffusion.timesteps, lowest=self.lowest_timestep)[0]

    @model_validator(mode="after")
    def _consistent(self) -> UpsamplerConfig:
        if self.high_size % self.low_size or self.factor < 2:
            raise ValueError(
                f"high_size {self.high_size} is not a multiple (2 or more) of low_size {self.low_size}"
            )
        if isinstance(self.unet, ADMConfig) and (self.unet.attention_resolutions or self.unet.middle_attention):
            raise ValueError(
                "unet asks for attention; an ADM upsampler has convolutions only, because it is trained on crops and "
                "applied to whole images. Leave attention_resolutions and middle_attention out"
            )
        self._check_latents()
        if self.residual and self.diffusion.prediction != "x_start":
            raise ValueError(
                f"residual adds the condition to a predicted x_0 and needs diffusion.prediction x_start, "
                f"not {self.diffusion.prediction}"
            )
        if self.sampler == "analytic":
            raise ValueError("sampler analytic needs statistics, which upsamplers do not keep; use ddim or ddpm")
        if self.eta and self.sampler in DETERMINISTIC:
            raise ValueError(f"eta is {self.eta}, but {self.sampler} is deterministic; set eta to 0 or use ddim")
        check_steps_exist(self.steps, self.diffusion.timesteps, self.lowest_timestep)
        if self.last_step_network and count_steps(self.steps) < 2:
            raise ValueError("last_step_network needs steps 2 or more: one step is the first and the last at once")
        largest = self.noise_augmentation or 0
        if largest > self.condition_process.timesteps:
            raise ValueError(
                f"noise_augmentation {largest} is above diffusion.timesteps {self.condition_process.timesteps}"
            )
        if self.noise_level > largest:
            raise ValueError(f"noise_level {self.noise_level} is above noise_augmentation ({largest or 'not set'})")
        return self


    def _check_latents(self) -> None:
        check_latent(self.latent, self.diffusion.variance, "upsampler")
        if self.latent is None:
            if self.condition == "latent":
                raise ValueError("condition 'latent' needs an upsampler in latents; name its autoencoder, model.latent")
            return
        if self.residual and self.condition != "latent":
            raise ValueError("residual adds the condition to latents; set model.condition to latent, or leave it out")
        if "factor" not in self.latent.model_fields_set:
            return  # not read from the autoencoder yet
        own, edge = self.latent.factor, self.high_size // self.latent.factor
        if self.high_size % own or self.low_size % self.low_multiple:
            raise ValueError(
                f"{self.low_size} and {self.high_size} pixels are no whole number of latents of {own} pixels a side"
            )
        if self.condition == "image" and self.low_size > edge and self.low_size % edge:
            raise ValueError(
                f"condition 'image' folds {self.low_size} pixels onto {edge} latents, which do not divide them; set "
                "model.condition to latent"
            )


class UpsamplerRunConfig(Config):
    """A training run: `data.image_size` is the model's high_size; trained on random crops (unCLIP, App. C)."""

    model: UpsamplerConfig = UpsamplerConfig()
    data: DataConfig = DataConfig(image_size=256, crop_size=64)
    train: TrainConfig = TrainConfig()
    crop_fraction: float | None = Field(
        None, gt=0, le=1, description="edge of the crops over high_size, a quarter in the paper; sets data.crop_size"
    )
    init_from: str | None = Field(
        None,
        description="trained weights to start from: a bundle ('emoji' is the bundled one), the folder of a run or of "
        "an upsampler, or a checkpoint in diffusers' layout; what `model` leaves out is as there. Its first network "
        "also starts a missing last-step network",
    )
    last_step_share: float = Field(
        0.25, ge=0, le=1, description="share of the samples that train the last-step network; 1 trains it alone"
    )

    @model_validator(mode="before")
    @classmethod
    def _fraction_to_pixels(cls, body: Any) -> Any:
        """`crop_fraction` becomes data.crop_size before the data are validated."""
        if not isinstance(body, dict) or not isinstance(body.get("crop_fraction"), (int, float)):
            return body
        model, data, fraction = body.get("model", {}), body.get("data", {}), body["crop_fraction"]
        if isinstance(data, DataConfig):
            data = data.model_dump()
        usual = data.get("image_size", 256) if isinstance(data, dict) and body.get("init_from") else 256
        size = _edge_of(model, "high_size", usual)
        if not isinstance(data, dict) or not isinstance(size, int):
            return body
        crop = round(size * fraction)
        given = data.get("crop_size")
        if given not in (None, crop):
            raise ValueError(f"crop_fraction {fraction} asks for crops of {crop} pixels, data.crop_size for {given}")
        return {**body, "data": {**data, "crop_size": crop}}

    @model_validator(mode="before")
    @classmethod
    def _low_size(cls, body: Any) -> Any:
        """The pictures of data.low_column have the edge of the model's condition."""
        model, data = (body.get("model", {}), body.get("data")) if isinstance(body, dict) else ({}, None)
        if not isinstance(data, dict) or data.get("low_size") is not None or not _names_low(data):
            return body
        usual = None if body.get("init_from") else 64  # the checkpoint has it; the run fills it in again
        return {**body, "data": {**data, "low_size": _edge_of(model, "low_size", usual)}}

    @model_validator(mode="after")
    def _sizes_agree(self) -> UpsamplerRunConfig:
        if self.init_from is not None and not {"high_size", "low_size"} <= self.model.model_fields_set:
            return self  # the checkpoint has the rest; the run checks again
        if self.data.image_size != self.model.high_size:
            raise ValueError(
                f"data.image_size is {self.data.image_size}, expected model.high_size {self.model.high_size}"
            )
        if self.data.low_size not in (None, self.model.low_size):
            raise ValueError(f"data.low_size is {self.data.low_size}, expected model.low_size {self.model.low_size}")
        crop = self.data.crop_size or self.data.image_size
        if crop % self.model.factor:
            raise ValueError(f"data.crop_size {crop} is not divisible by the factor {self.model.factor}")
        latent = self.model.latent
        if latent is not None and "factor" in latent.model_fields_set:
            whole = max(latent.factor, self.model.factor * self.model.low_multiple)
            if crop % whole:
                raise ValueError(f"data.crop_size {crop} is no whole number of latents; take a multiple of {whole}")
        return self


def _edge_of(model: Any, name: str, usual: int | None) -> int | None:
    """An edge as the section `model` names it, before it is validated; None where it names none that could be one."""
    value = model.get(name, usual) if isinstance(model, dict) else getattr(model, name, None)
    return value if isinstance(value, int) else None


def _names_low(data: dict[str, Any]) -> bool:
    """Whether the section `data`, before it is validated, names a column of low-resolution pictures."""
    sources = data.get("sources")
    return any(
        isinstance(part, dict) and part.get("low_column") is not None
        for part in (data, *(sources if isinstance(sources, (list, tuple)) else ()))
    )
