"""Configuration of a CLIP training run; without PyTorch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from unclip.config import Config, DataConfig, TrainConfig

VOCABULARY = "bpe_vocabulary.txt.gz"


class TowerConfig(Config):
    """A Transformer tower of the CLIP (open_clip's names)."""

    width: int = Field(128, ge=16)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> TowerConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class ClipConfig(Config):
    """A ViT and a causal text Transformer meeting in `embed_dim`."""

    embed_dim: int = Field(256, ge=8)
    image_size: int = Field(64, ge=16)
    patch_size: int = Field(8, ge=2)
    context_length: int = Field(32, ge=4)
    vocabulary_merges: int = Field(
        48894, ge=0, le=48894, description="merges kept of CLIP's byte-pair vocabulary, commonest first; 48894 is all"
    )
    vision: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()

    @model_validator(mode="after")
    def _has_patches(self) -> ClipConfig:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        return self

    def open_clip_config(self) -> dict[str, Any]:
        """The `model_cfg` of open_clip_config.json."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "width": self.vision.width,
                "layers": self.vision.layers,
                "head_width": self.vision.width // self.vision.heads,
                "pool_type": "avg",
            },
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": 2 * 256 + self.vocabulary_merges + 2,
                "width": self.text.width,
                "layers": self.text.layers,
                "heads": self.text.heads,
                "tokenizer_kwargs": {"bpe_path": VOCABULARY},
            },
        }


class ClipRunConfig(Config):
    """A whole CLIP training run."""

    model: ClipConfig = ClipConfig()
    init_from: str | None = Field(
        None,
        description="a CLIP of the same sizes to go on from: a run, a bundle, or a folder in open_clip's layout",
    )
    spread_weight: float = Field(
        0.0,
        ge=0,
        description="weight of a term beside open_clip's loss that keeps embeddings from crowding into few dimensions",
    )
    keep_embeddings: float = Field(
        0.0,
        ge=0,
        description="weight of a term that gives each picture, however augmented and restyled, the embedding that "
        "init_from has for it plain; so priors and decoders of that CLIP fit this one too",
    )
    data: DataConfig = DataConfig(augment=True)
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _plain_pictures_too(cls, body: Any) -> Any:
        """Keeping embeddings takes the pictures as they were before augmentation."""
        if not isinstance(body, dict) or not body.get("keep_embeddings"):
            return body
        data = body.get("data", cls.model_fields["data"].default)
        if isinstance(data, DataConfig):
            data = data.model_dump()
        if not isinstance(data, dict):
            return body
        if body.get("init_from") is None:
            raise ValueError("keep_embeddings keeps those of the CLIP that init_from names; name one")
        return {**body, "data": {**data, "plain": True}}

    @model_validator(mode="after")
    def _trained_whole(self) -> ClipRunConfig:
        if self.train.lora is not None:
            raise ValueError("train.lora is for priors, decoders and upsamplers; a CLIP has train.freeze and trainable")
        return self

    @model_validator(mode="after")
    def _compares(self) -> ClipRunConfig:
        check_batch(self.train.batch_size // self.train.accumulation)
        edge = self.data.crop_size or self.data.image_size
        if edge != self.model.image_size:
            name = "crop_size" if self.data.crop_size else "image_size"
            raise ValueError(f"data.{name} is {edge}, expected model.image_size {self.model.image_size}")
        return self


def check_batch(at_once: int) -> None:
    """ValueError for pictures that are seen one by one."""
    if at_once < 2:
        raise ValueError(
            "a CLIP learns by telling the pictures of a batch apart and sees only one at once; let train.batch_size be "
            "at least twice train.accumulation times the processes"
        )
