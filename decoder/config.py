"""Configuration of the decoder and of a run that trains it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unclip.config import Config, DataConfig, DiffusionConfig, TrainConfig
from unclip.nn import UNetConfig


class DecoderConfig(Config):
    """An unCLIP decoder: U-Net, conditioning, process, and how it is sampled by default."""

    embedding_dim: int = Field(768, ge=1, description="width of the CLIP image embedding")
    token_dim: int = Field(768, ge=1, description="width of CLIP's text token features")
    text_length: int = Field(77, ge=1, description="CLIP's context length")
    context_dim: int = Field(512, ge=1, description="width of the context tokens inside the U-Net")
    image_tokens: int = Field(4, ge=1, description="context tokens made from the image embedding (unCLIP §2.1: four)")
    spatial_seed: bool = Field(
        False,
        description="also project the image embedding to a map added at the lowest resolution: it tells a small "
        "network "
        "where things are, which it would otherwise have to carry through global tokens; fixes the image size",
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
    drop_embedding: float = Field(0.1, ge=0, le=1, description="share of samples without image embedding (unCLIP §2.1)")
    drop_text: float = Field(0.5, ge=0, le=1, description="share of samples without caption (unCLIP §2.1)")
    unet: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig(variance="learned_range")
    steps: int = Field(50, ge=1, description="default sampling steps")
    sampler: Literal["ddpm", "ddim", "dpmpp_2m"] = "ddpm"
    guidance: float = Field(3.0, ge=0, description="default classifier-free guidance scale")


class DecoderRunConfig(Config):
    """A whole decoder training run."""

    clip: str = Field(description="a CLIP as FrozenCLIP.load takes it: a folder, 'ViT-L-14/openai', 'hf-hub:user/name'")
    clip_cache: int = Field(0, ge=0, description="CLIP features kept in memory; for small sets without augmentation")
    init_from: str | None = Field(
        None,
        description="a decoder part to start from; its output layer is left out where it predicts something else",
    )
    model: DecoderConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
