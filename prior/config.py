"""Configuration of the diffusion prior and of a run that trains it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from unclip.config import Config, DataConfig, DiffusionConfig, TrainConfig


class PriorConfig(Config):
    """A diffusion prior: causal Transformer, process, and how it is sampled by default (unCLIP §2.2, App. C)."""

    embedding_dim: int = Field(768, ge=1, description="width of CLIP's image and text embeddings")
    token_dim: int = Field(768, ge=1, description="width of CLIP's text token features")
    text_length: int = Field(77, ge=1, description="CLIP's context length")
    width: int = Field(512, ge=8)
    depth: int = Field(6, ge=1)
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    normalisation: Literal["standardise", "scale"] = Field(
        "standardise",
        description="how embeddings are brought to the noise's scale: by the mean and standard deviation measured on "
        "the data and stored with the model, or by `scale`",
    )
    scale: float | None = Field(
        None, gt=0, description="factor for 'scale'; by default sqrt(embedding_dim); the paper used 17.2"
    )
    drop_text: float = Field(0.1, ge=0, le=1, description="share of samples without caption (unCLIP §2.2)")
    diffusion: DiffusionConfig = DiffusionConfig(prediction="x_start")
    clip_range: float = Field(10.0, gt=0, description="x̂_0 is clamped to ± this many units of the normalised space")
    steps: int = Field(64, ge=1, description="default sampling steps")
    sampler: Literal["ddpm", "ddim", "dpmpp_2m"] = "ddpm"
    guidance: float = Field(1.0, ge=0, description="default classifier-free guidance scale")
    candidates: int = Field(2, ge=1, description="samples drawn a caption; the one nearest the text embedding is kept")

    @model_validator(mode="after")
    def _heads_divide(self) -> PriorConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        if self.diffusion.variance == "learned_range":
            raise ValueError(
                "the prior predicts the embedding alone; diffusion.variance must be fixed_small or fixed_large"
            )
        return self


class PriorRunConfig(Config):
    """A whole prior training run."""

    clip: str = Field(description="a CLIP as FrozenCLIP.load takes it: a folder, 'ViT-L-14/openai', 'hf-hub:user/name'")
    clip_cache: int = Field(0, ge=0, description="CLIP features kept in memory; for small sets without augmentation")
    statistics_batches: int = Field(
        32, ge=1, description="batches over which mean and deviation are measured before training"
    )
    model: PriorConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
