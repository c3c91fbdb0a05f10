"""Configuration of the two priors, diffusion and autoregressive, and of a run that trains one of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from unclip.config import Config, DataConfig, DiffusionConfig, SamplerName, StepSpec, TrainConfig
from unclip.diffusion.timesteps import check_steps_exist


class TextEncoderConfig(Config):
    """A Transformer of the prior's own over the CLIP's token features, trained with the prior (unCLIP, App. C)."""

    width: int = Field(2048, ge=8)
    depth: int = Field(24, ge=1)
    heads: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> TextEncoderConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class SharedConfig(Config):
    """What both priors have: a causal Transformer behind the caption's features (unCLIP §2.2)."""

    embedding_dim: int = Field(768, ge=1, description="width of CLIP's image and text embeddings")
    token_dim: int = Field(768, ge=1, description="width of CLIP's text token features")
    text_length: int = Field(77, ge=1, description="CLIP's context length")
    width: int = Field(512, ge=8)
    depth: int = Field(6, ge=1)
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    attention_bias: bool = Field(False, description="biases in the attention's four projections, as Karlo has them")
    norm_bias: bool = Field(False, description="LayerNorms with a bias, the final one too, as Karlo has them")
    text_tokens: bool = Field(
        True,
        description="whether the caption's token features are read; without them its embedding says all, for data that "
        "hold embeddings alone (clip-retrieval)",
    )
    text_encoder: TextEncoderConfig | None = Field(
        None, description="a Transformer over the CLIP's token features before the prior; null takes them as they are"
    )
    embedding_length: Literal["unit", "raw"] = Field(
        "unit", description="whether embeddings have unit length, or the length that the CLIP gives them (Karlo)"
    )
    text_scale: float | None = Field(
        None,
        gt=0,
        description="factor on the text embedding before its projection; by default sqrt(embedding_dim), which brings "
        "the elements of a unit vector to the size of 1, or 1 for embeddings of raw length",
    )
    null_text: Literal["learned", "clip"] = Field(
        "learned",
        description="what stands for a dropped caption: learned vectors, or the CLIP's features of the empty text, "
        "which are stored with the model",
    )
    drop_text: float = Field(0.1, ge=0, le=1, description="share of samples without caption (unCLIP §2.2)")
    guidance: float = Field(1.0, ge=0, description="default classifier-free guidance scale")
    candidates: int = Field(2, ge=1, description="samples drawn a caption; the one nearest the text embedding is kept")

    @model_validator(mode="after")
    def _heads_divide(self) -> SharedConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        if self.text_encoder is not None and not self.text_tokens:
            raise ValueError("a text_encoder reads the caption's tokens, and text_tokens is false; leave one out")
        return self


class PriorConfig(SharedConfig):
    """A diffusion prior: causal Transformer, process, and how it is sampled by default (unCLIP §2.2, App. C)."""

    kind: Literal["diffusion"] = "diffusion"
    normalisation: Literal["standardise", "scale"] = Field(
        "standardise",
        description="how embeddings are brought to the noise's scale: by the mean and standard deviation measured on "
        "the data and stored with the model, or by `scale`",
    )
    scale: float | None = Field(
        None, gt=0, description="factor for 'scale'; by default sqrt(embedding_dim); the paper used 17.2"
    )
    diffusion: DiffusionConfig = DiffusionConfig(prediction="x_start")
    clip_range: float | None = Field(
        10.0,
        gt=0,
        description="x̂_0 is clamped to ± this many units of the normalised space, unless diffusion.x_start_clip says "
        "something else; null leaves it",
    )
    steps: StepSpec = Field(64, description="default sampling steps: a number, 'ddim64', or a list of timesteps")
    sampler: SamplerName = "ddpm"

    @model_validator(mode="after")
    def _fits(self) -> PriorConfig:
        if self.diffusion.variance == "learned_range":
            raise ValueError(
                "the prior predicts the embedding alone; diffusion.variance must be fixed_small or fixed_large"
            )
        check_steps_exist(self.steps, self.diffusion.timesteps)
        return self


class AutoregressivePriorConfig(SharedConfig):
    """An autoregressive prior: codes of the embedding's principal components, one after the other (unCLIP §2.2)."""

    kind: Literal["autoregressive"] = "autoregressive"
    components: int | None = Field(
        None, ge=1, description="principal components kept; null takes as many as `largest_error` needs"
    )
    largest_error: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="share of the embeddings' variance that dropping components may lose, where `components` is null; "
        "the paper kept 319 of 1024 for less than 1 %",
    )
    buckets: int = Field(1024, ge=2, description="codes a component, uniform between its measured ends")
    dot_buckets: int = Field(64, ge=2, description="values of the token that tells z_i·z_t, equally frequent")
    dot_percentile: float = Field(
        0.5, ge=0, lt=1, description="sampling draws z_i·z_t from its distribution above this percentile"
    )
    temperature: float = Field(1.0, ge=0, description="default; 0 takes the likeliest code")
    top_p: float = Field(1.0, gt=0, le=1, description="default; codes beyond this probability mass are not drawn")
    candidates: int = Field(1, ge=1, description="samples drawn a caption; the one nearest the text embedding is kept")

    @model_validator(mode="after")
    def _components_fit(self) -> AutoregressivePriorConfig:
        if self.components is not None and self.components > self.embedding_dim:
            raise ValueError(f"components {self.components} is more than the embedding's {self.embedding_dim}")
        return self


CONFIGS: dict[str, type[PriorConfig] | type[AutoregressivePriorConfig]] = {
    "diffusion": PriorConfig,
    "autoregressive": AutoregressivePriorConfig,
}


def kind_of(config: Any) -> str:
    """The kind of a prior's configuration or dictionary; 'diffusion' where it names none."""
    return str(config.get("kind", "diffusion") if isinstance(config, dict) else getattr(config, "kind", "diffusion"))


AnyPriorConfig = Annotated[
    Annotated[PriorConfig, Tag("diffusion")] | Annotated[AutoregressivePriorConfig, Tag("autoregressive")],
    Discriminator(
        kind_of, custom_error_type="kind", custom_error_message="the kind must be 'diffusion' or 'autoregressive'"
    ),
]


class PriorRunConfig(Config):
    """A whole prior training run."""

    clip: str = Field(description="a CLIP as FrozenCLIP.load takes it: a folder, 'ViT-L-14/openai', 'hf-hub:user/name'")
    clip_cache: int = Field(0, ge=0, description="CLIP features kept in memory; for small sets without augmentation")
    statistics_batches: int = Field(
        32,
        ge=1,
        description="batches of 64 over which the embeddings' statistics are measured before training: mean and "
        "deviation, or principal components, their ends and the distribution of z_i·z_t",
    )
    dashboard_samples: int = Field(
        256, ge=2, description="embeddings drawn every train.sample_every steps, whose cosines are told"
    )
    init_from: str | None = Field(
        None,
        description="trained weights to start from: a bundle ('emoji' is the bundled one), the folder of a run or of "
        "a prior, or a checkpoint in diffusers' layout; what `model` leaves out is as there",
    )
    model: AnyPriorConfig = PriorConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _has_a_model(self) -> PriorRunConfig:
        if "model" not in self.model_fields_set and self.init_from is None:
            raise ValueError("no section model; describe the network, or take that of another with init_from")
        return self
