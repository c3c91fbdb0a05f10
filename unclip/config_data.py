"""Configuration of where training samples come from. unclip.config takes it up, and is where others import it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from unclip.config_base import Config

Style = Literal["hue", "palette", "contours", "fine_lines", "turned", "blurred", "lit"]


class SyntheticConfig(Config):
    """Captioned shapes drawn on the fly; see unclip.data.synthetic."""

    size: int = Field(4096, ge=1, description="number of scenes in an epoch")
    max_objects: int = Field(2, ge=1, le=3)


class FilterConfig(Config):
    """Which samples are kept. What is left out is counted by its reason, and named nowhere."""

    min_edge: int | None = Field(None, ge=1, description="shortest edge of the picture as stored, in pixels")
    max_aspect: float | None = Field(None, ge=1, description="longer edge over shorter edge")
    min_caption: int = Field(0, ge=0, description="characters; of several captions those are kept that fit")
    max_caption: int | None = Field(None, ge=1, description="characters")
    score_column: str | None = Field(
        None, description="a column of numbers, such as the similarity that clip-retrieval and img2dataset write"
    )
    min_score: float | None = None
    max_score: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> FilterConfig:
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ValueError(f"max_caption {self.max_caption} is less than min_caption {self.min_caption}")
        bounds = [bound for bound in (self.min_score, self.max_score) if bound is not None]
        if bounds and self.score_column is None:
            raise ValueError("a score is asked for, but score_column does not say where it stands")
        if self.score_column is not None and not bounds:
            raise ValueError("score_column is named without min_score or max_score")
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            raise ValueError(f"max_score {bounds[1]} is less than min_score {bounds[0]}")
        return self


class SourceConfig(Config):
    """One source of a mixture. What is null is as in the `data` section."""

    source: str
    weight: float = Field(1.0, gt=0, description="share of the samples, relative to the other sources' weights")
    split: str | None = None
    streaming: bool | None = None
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    low_column: str | None = None
    cache: bool | None = None
    restyle: float | None = Field(None, ge=0, le=1)
    plain: bool | None = Field(
        None,
        description="false where data.plain is true: these pictures are drawn as restyle left them, and a CLIP's "
        "keep_embeddings lets theirs go",
    )


class DataConfig(Config):
    """Where captioned images come from and how one becomes a training sample."""

    source: str = Field(
        "synthetic",
        description="'synthetic', a folder of images with metadata.jsonl, a parquet file or glob, webdataset tars "
        "(file, folder or glob), a Hugging Face Hub id, or a folder of embeddings (`unclip embed --dataset`, or "
        "clip-retrieval's layout)",
    )
    sources: tuple[SourceConfig, ...] = Field((), description="several sources with weights, in the place of `source`")
    split: str = "train"
    streaming: bool = False
    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = Field(
        None, description="what names a sample for good; by default __key__, key, or the image's path or content"
    )
    low_column: str | None = Field(
        None,
        description="for an upsampler: the column of low-resolution pictures that it sees in the place of the image "
        "reduced, such as a decoder's own; a sample without one sees the image reduced",
    )
    low_size: int | None = Field(
        None, ge=1, description="edge of those pictures, pixels; an upsampler's run sets it to model.low_size"
    )
    filter: FilterConfig = FilterConfig()
    holdout: float = Field(
        0.0, ge=0, lt=1, description="share of the samples kept from training, chosen by a hash of their keys"
    )
    part: Literal["train", "validation"] = Field("train", description="validation reads what `holdout` keeps back")
    image_size: int = Field(64, ge=8, le=2048, description="edge of the square image after resizing, in pixels")
    crop_size: int | None = Field(None, ge=8, description="edge of a random crop of the resized image")
    horizontal_flip: bool = False
    augment: bool = Field(False, description="random shift, scale, rotation and background for CLIP training")
    restyle: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the pictures shown in another style, for CLIP training: hue, palette, contours, lines, "
        "turn, blur, light",
    )
    restyle_weights: dict[Style, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="how often restyle takes a style, relative to 1 for those not named, such as {fine_lines: 4, "
        "lit: 0}",
    )
    plain: bool = Field(
        False,
        description="give the picture before augment and restyle as well: a decoder then learns to draw it from the "
        "embedding of what they made of it; a CLIP's run with keep_embeddings sets it",
    )
    cache: bool = Field(False, description="keep decoded images in memory (small sets)")
    shuffle_buffer: int = Field(1000, ge=1, description="samples held for shuffling a stream")
    workers: int = Field(
        0, ge=0, le=64, description="processes that read and decode; 0 does it in threads of the training process"
    )
    prefetch: int = Field(2, ge=1, le=64, description="batches prepared ahead, by each worker where there are some")
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.crop_size is not None and self.crop_size > self.image_size:
            raise ValueError(f"crop_size is {self.crop_size}, larger than image_size {self.image_size}")
        self._check_low()
        if set(self.restyle_weights) == set(get_args(Style)) and not any(self.restyle_weights.values()):
            raise ValueError("restyle_weights leave no style; give at least one a weight above 0")
        if not self.plain and any(one.plain for one in self.sources):
            raise ValueError("a source asks for plain, and the data section does not; set data.plain to true")
        if self.plain and (self.has_low or self.crop_size is not None or self.horizontal_flip):
            raise ValueError(
                "data.plain (which keep_embeddings sets) compares each picture with what augment and restyle made of "
                "it; leave out low_column, crop_size and horizontal_flip"
            )
        if self.sources and self.source != "synthetic":
            raise ValueError(f"both source ({self.source!r}) and sources are named; expected one of them")
        if self.part == "validation" and self.holdout == 0:
            raise ValueError("part is validation, but holdout is 0, so that nothing is kept back for it")
        return self

    def _check_low(self) -> None:
        if not self.has_low:
            return
        if self.low_size is not None and self.image_size % self.low_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of low_size {self.low_size}")
        if self.augment or self.restyle or any(one.restyle for one in self.sources):
            raise ValueError(
                "augment and restyle change the image and not the picture of low_column, which would no longer be of "
                "it; leave them out"
            )

    @property
    def has_low(self) -> bool:
        """Whether a source has low-resolution pictures of its own."""
        return self.low_column is not None or any(one.low_column is not None for one in self.sources)

    def unchanged(self) -> DataConfig:
        """The same data without the random changes of training; pictures are cropped as before."""
        sources = tuple(one.model_copy(update={"restyle": None}) for one in self.sources)
        change = {"augment": False, "restyle": 0.0, "horizontal_flip": False, "sources": sources}
        return self.model_copy(update=change)

    @property
    def changes(self) -> list[str]:
        """Names of the random changes that are asked for; those of a mixture's sources are theirs (`each`)."""
        return [name for name in ("crop_size", "horizontal_flip", "augment", "restyle") if getattr(self, name)]

    def each(self) -> list[tuple[DataConfig, float]]:
        """The sources one by one, each as a configuration of its own, with their weights."""
        if not self.sources:
            return [(self, 1.0)]
        fields = [name for name in SourceConfig.model_fields if name != "weight"]
        result = []
        for one in self.sources:
            given = {name: value for name in fields if (value := getattr(one, name)) is not None}
            result.append((self.model_copy(update={**given, "sources": ()}), one.weight))
        return result
