"""Configuration of the decoder and of a run that trains it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unclip.config import Config, DataConfig, DiffusionConfig, SamplerName, StepSpec, TrainConfig
from unclip.config_latent import LatentConfig, check_latent
from unclip.diffusion.timesteps import check_steps_exist
from unclip.nn import UNetConfig


class ClipText(Config):
    """Token features of the frozen CLIP that the decoder is trained with."""

    kind: Literal["clip"] = "clip"


class GlideText(Config):
    """GLIDE's text transformer, trained with the decoder on the CLIP's vocabulary (GLIDE, §3.1; unCLIP, §2.1)."""

    kind: Literal["glide"] = "glide"
    vocab_size: int = Field(49408, ge=2, description="tokens of the CLIP's vocabulary; read from it when training")
    length: int = Field(128, ge=2, description="tokens a caption; longer ones are cut")
    width: int = Field(512, ge=8)
    depth: int = Field(16, ge=1)
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> GlideText:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class T5Text(Config):
    """Features of a frozen T5-style encoder, read through `transformers` (Imagen, §2.1)."""

    kind: Literal["t5"] = "t5"
    name: str = Field(description="a local folder or a Hub id with the encoder and its tokenizer")
    length: int = Field(128, ge=2, description="tokens a caption; longer ones are cut")
    width: int = Field(768, ge=1, description="width of the encoder's features; read from it when training")


TextSource = Annotated[ClipText | GlideText | T5Text, Field(discriminator="kind")]


class DecoderConfig(Config):
    """An unCLIP decoder: U-Net, conditioning, process, and how it is sampled by default."""

    embedding_dim: int = Field(768, ge=1, description="width of the CLIP image embedding")
    token_dim: int = Field(768, ge=1, description="width of CLIP's text token features")
    text_length: int = Field(77, ge=1, description="CLIP's context length")
    text: TextSource = Field(ClipText(), description="where the context tokens of a caption come from")
    context_dim: int = Field(512, ge=1, description="width of the context tokens inside the U-Net")
    image_tokens: int = Field(4, ge=1, description="context tokens made from the image embedding (unCLIP §2.1: four)")
    image_tokens_first: bool = Field(False, description="the image's tokens stand before the caption's (Karlo)")
    image_tokens_interleaved: bool = Field(
        False, description="the token's index, not the channel's, varies fastest in their projection (Karlo)"
    )
    embedding_length: Literal["unit", "raw"] = Field(
        "unit", description="whether embeddings have unit length, or the length that the CLIP gives them (Karlo)"
    )
    embedding_scale: float | None = Field(
        None,
        gt=0,
        description="factor on embeddings before their projections; by default sqrt(embedding_dim), which brings the "
        "elements of a unit vector to the size of 1, or 1 for embeddings of raw length",
    )
    text_embedding_to_time: bool = Field(
        False, description="the CLIP text embedding is added to the timestep embedding too (Karlo)"
    )
    null_text: Literal["learned", "clip"] = Field(
        "learned", description="what stands for a dropped caption: learned rows, or the CLIP's features of '' (Karlo)"
    )
    spatial_seed: bool = Field(
        False,
        description="also project the image embedding to a map added at the lowest resolution: it tells a small "
        "network "
        "where things are, which it would otherwise have to carry through global tokens; fixes the image size",
    )
    text_seed: bool = Field(
        False,
        description="also let every place of the lowest feature map look through the caption for what belongs there, "
        "and add what it finds: a small network reads off words which thing stands where long before its other "
        "attention layers do; fixes the image size",
    )
    embedding_hidden: int = Field(
        0,
        ge=0,
        description="width of a hidden layer whose features of the image embedding go wherever the embedding goes: a "
        "CLIP says in products, not in sums, which of several things stands where; 0 is none",
    )
    embedding_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest weight of noise mixed into the training embedding: a prior's small errors do no harm",
    )
    embedding_noise_shape: Literal["isotropic", "data"] = Field(
        "isotropic", description="noise in every direction alike, or along the differences between embeddings"
    )
    embedding_noise_levels: int = Field(
        0,
        ge=0,
        description="noise conditioning augmentation: the embedding is noised to a level drawn from 0 to this many "
        "steps of the process, and the level fed to the network (Imagen §2.4; Stable unCLIP); 0 is none",
    )
    inpainting: bool = Field(
        False, description="four more input channels: the known part of the image, and where it is (GLIDE §3.3)"
    )
    mask_everything: float = Field(
        0.25, ge=0, le=1, description="inpainting: share of training samples of which nothing is known"
    )
    drop_embedding: float = Field(0.1, ge=0, le=1, description="share of samples without image embedding (unCLIP §2.1)")
    drop_text: float = Field(0.5, ge=0, le=1, description="share of samples without caption (unCLIP §2.1)")
    drop_both: float = Field(
        0.0, ge=0, le=1, description="share of samples without either, beside what the two drops do (GLIDE §3.2: 0.2)"
    )
    latent: LatentConfig | None = Field(
        None,
        description="the autoencoder whose latents it works in; unet.image_size is their edge then. null: pixels",
    )
    unet: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig(variance="learned_range")
    steps: StepSpec = Field(50, description="default sampling steps: a number, 'ddim50', or a list of timesteps")
    sampler: SamplerName = "ddpm"
    guidance: float = Field(3.0, ge=0, description="default classifier-free guidance scale")
    guidance_text: float | None = Field(
        None, ge=0, description="default scale for what the caption adds to the image embedding; null: `guidance`"
    )
    guidance_interval: tuple[float, float] | None = Field(
        None, description="fractions of T between which guidance acts; null: everywhere"
    )
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="φ of Lin et al. 2024; 0 is none")

    @model_validator(mode="after")
    def _fits(self) -> DecoderConfig:
        if self.null_text == "clip" and self.text.kind != "clip":
            raise ValueError(f"null_text 'clip' needs text.kind 'clip', and it is {self.text.kind!r}")
        plain = isinstance(self.unet, UNetConfig)  # a network of DALLE2-pytorch has a shape of its own
        if plain and self.unet.image_size % self.unet.multiple:
            raise ValueError(
                f"unet.image_size {self.unet.image_size} is not divisible by {self.unet.multiple}: patch_size "
                f"{self.unet.patch_size}, and {len(self.unet.channel_mult)} levels of channel_mult, of which each "
                "halves the edge of the one before"
            )
        check_latent(self.latent, self.diffusion.variance, "decoder")
        check_steps_exist(self.steps, self.diffusion.timesteps)
        if self.latent is not None and self.inpainting:
            raise ValueError("inpainting keeps pixels, and this decoder works in latents; leave one of them out")
        if self.embedding_noise and self.embedding_length == "raw":
            raise ValueError(
                f"embedding_noise {self.embedding_noise} turns unit vectors, and embedding_length is 'raw'; "
                "use embedding_noise_levels"
            )
        if self.embedding_noise_levels > self.diffusion.timesteps:
            raise ValueError(
                f"embedding_noise_levels is {self.embedding_noise_levels}, the process has "
                f"{self.diffusion.timesteps} timesteps"
            )
        return self

    @property
    def scale(self) -> float:
        """What embeddings are multiplied by."""
        if self.embedding_scale is not None:
            return self.embedding_scale
        return self.embedding_dim**0.5 if self.embedding_length == "unit" else 1.0

    @property
    def channels(self) -> int:
        """Channels of what is diffused."""
        return 3 if self.latent is None else self.latent.channels

    @property
    def image_size(self) -> int:
        """Edge of its pictures in pixels."""
        return self.unet.image_size * (1 if self.latent is None else self.latent.factor)

    @property
    def context_length(self) -> int:
        """Tokens of a caption as this decoder takes it."""
        return self.text_length if isinstance(self.text, ClipText) else self.text.length

    @property
    def text_columns(self) -> slice:
        """Which of the context tokens are the caption's; the others are the image embedding's."""
        first = self.image_tokens if self.image_tokens_first else 0
        return slice(first, first + self.context_length)

    @property
    def feature_dim(self) -> int | None:
        """Width of a caption's token features; None where the decoder takes token ids."""
        if isinstance(self.text, GlideText):
            return None
        return self.token_dim if isinstance(self.text, ClipText) else self.text.width


class DecoderRunConfig(Config):
    """A whole decoder training run."""

    clip: str = Field(description="a CLIP as FrozenCLIP.load takes it: a folder, 'ViT-L-14/openai', 'hf-hub:user/name'")
    clip_cache: int = Field(0, ge=0, description="CLIP features kept in memory; for small sets without augmentation")
    init_from: str | None = Field(
        None,
        description="trained weights to start from: a bundle ('emoji' is the bundled one), the folder of a run or of "
        "a decoder, or a checkpoint in diffusers' layout; what `model` leaves out is as there",
    )
    model: DecoderConfig = DecoderConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _has_a_model(self) -> DecoderRunConfig:
        if "model" not in self.model_fields_set and self.init_from is None:
            raise ValueError("no section model; describe the network, or take that of another with init_from")
        return self

    @model_validator(mode="after")
    def _sizes_agree(self) -> DecoderRunConfig:
        model, data, latent = self.model, self.data, self.model.latent
        if data.crop_size not in (None, data.image_size):
            raise ValueError(f"data.crop_size is {data.crop_size}, and a decoder draws whole pictures; leave it out")
        named = {"unet", "latent"} <= model.model_fields_set and "image_size" in model.unet.model_fields_set
        if self.init_from is not None and not named:
            return self  # the checkpoint has the rest; the run checks again
        if latent is None and data.image_size != model.image_size:
            raise ValueError(
                f"data.image_size is {data.image_size}, expected model.unet.image_size {model.image_size}: a decoder "
                "is trained on pictures of its own size"
            )
        if latent is not None and "factor" in latent.model_fields_set and data.image_size != model.image_size:
            raise ValueError(
                f"data.image_size is {data.image_size}, and latents of {model.unet.image_size} with {latent.factor} "
                f"pixels a side are pictures of {model.image_size}; make them equal"
            )
        return self
