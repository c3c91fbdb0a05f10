"""Configuration: YAML and `key=value` overrides become validated, immutable objects.

Every run is described by one complete YAML file (`configs/<stage>/<recipe>.yaml`). An unknown key or a value out of
range
ends in one sentence that names the key and, for a misspelt one, the nearest that exists.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from unclip.errors import UsageError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration object: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


ScheduleName = Literal["linear", "cosine", "quadratic", "sigmoid"]
SamplerName = Literal["ddpm", "ddim", "plms", "pndm", "dpmpp_2m", "unipc", "analytic"]
DETERMINISTIC = ("plms", "pndm", "dpmpp_2m", "unipc")
"""The samplers that take no eta but 0."""


def check_steps(spec: Any) -> int | str | tuple[int, ...]:
    """Sampling steps in one of their forms, brought to normal: 50 or "50" -> 50; "ddim50", "ends50" and "trailing50"
    stay; [0, 500, 999] or "0,500,999" -> (0, 500, 999). What the process allows is checked where it is known.

    Raises UsageError: another form, less than one step, a negative timestep or one that is named twice.
    """
    if isinstance(spec, str):
        text = spec.replace(" ", "")
        named = re.fullmatch(r"(ends|ddim|trailing)([1-9]\d*)", text)
        if named:
            return text
        if re.fullmatch(r"-?\d+", text):
            spec = int(text)
        elif re.fullmatch(r"\d+(,\d+)+,?|\d+,", text):
            spec = tuple(int(part) for part in text.rstrip(",").split(","))
    if isinstance(spec, (list, tuple)) and spec and all(type(t) is int and t >= 0 for t in spec):
        if len(set(spec)) < len(spec):
            twice = next(t for t in spec if list(spec).count(t) > 1)
            raise UsageError(f"the timestep {twice} is named twice among the sampling steps; expected each once")
        return tuple(spec)
    if type(spec) is not int:
        raise UsageError(
            f"the sampling steps are {_short(spec)}; expected a number such as 50, a spacing such as 'ddim50', "
            "'ends50' or 'trailing50', or a list of timesteps from 0 up"
        )
    if spec < 1:
        raise UsageError(f"{spec} sampling steps asked for; expected 1 or more")
    return spec


def count_steps(spec: int | str | tuple[int, ...]) -> int:
    """How many steps a checked `spec` means."""
    if isinstance(spec, tuple):
        return len(spec)
    return spec if isinstance(spec, int) else int(spec.lstrip("abcdefghijklmnopqrstuvwxyz"))


def _check_steps_field(spec: Any) -> Any:
    try:
        return check_steps(spec)
    except UsageError as error:  # pydantic collects ValueErrors alone
        raise ValueError(str(error)) from error


StepSpec = Annotated[int | str | tuple[int, ...], BeforeValidator(_check_steps_field)]
"""A field that takes sampling steps as `check_steps` does."""


class XStartClipConfig(Config):
    """What is done to x̂_0 at each sampling step (unclip.diffusion.clip_from)."""

    kind: Literal["none", "static", "dynamic"] = Field(
        "static", description="leave it, clamp it to ±limit, or threshold it dynamically (Imagen, §2.3)"
    )
    limit: float = Field(1.0, gt=0, description="of the static clamp; 1 for pixels in [-1, 1]")
    percentile: float = Field(0.995, gt=0, le=1, description="of |x̂_0| in each sample, for the dynamic threshold")


class DiffusionConfig(Config):
    """The forward process, what a network predicts of it, and how its losses are weighted."""

    schedule: ScheduleName = "cosine"
    beta_range: tuple[float, float] | None = Field(
        None, description="smallest and largest β at T = 1000, by default 1e-4 and 0.02; not for cosine"
    )
    zero_terminal_snr: bool = Field(
        False, description="rescale the schedule so that x_T is pure noise (Lin et al. 2024); needs v or x_start"
    )
    timesteps: int = Field(1000, ge=2, le=100_000)
    prediction: Literal["epsilon", "x_start", "v"] = "epsilon"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    vb_weight: float = Field(0.001, ge=0, description="λ of L_hybrid (Improved DDPM, eq. 16); learned_range only")
    loss_weighting: Literal["none", "min_snr"] = Field(
        "none", description="min_snr: the squared error weighted by min(SNR, γ) in x_0 (Hang et al. 2023)"
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="γ of min_snr")
    timestep_bias: float = Field(
        1.0, gt=0, description="t/T = u^(1/bias), u uniform: 1 draws t uniformly, 2 favours noisy timesteps"
    )
    x_start_clip: XStartClipConfig | None = Field(
        None, description="what is done to x̂_0 while sampling; by default what the stage always did"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionConfig:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr makes x_T pure noise, from which a predicted epsilon tells nothing of x_0; "
                "set prediction to v or x_start"
            )
        if self.zero_terminal_snr and self.loss_weighting == "min_snr":
            raise ValueError(
                "min_snr gives the last timestep of a zero_terminal_snr schedule the weight 0, so that it would never "
                "be trained; leave one of them out"
            )
        if self.beta_range is not None:
            low, high = self.beta_range
            if self.schedule == "cosine":
                raise ValueError("beta_range is given, but the cosine schedule has none; leave it out")
            if not 0 < low < high < 1:
                raise ValueError(f"beta_range is {[low, high]}, expected 0 < smallest < largest < 1")
        return self


class EpsilonStatistics(Config):
    """What Analytic-DPM needs to know of a trained model (Bao et al. 2022, eq. 8); `unclip statistics` measures it.

    It stands in a part's folder as analytic.json.
    """

    timesteps: tuple[int, ...] = Field(min_length=1, description="where it was measured, ascending")
    epsilon_square: tuple[float, ...] = Field(description="Γ_t = E||ε̂(x_t, t)||²/d at those timesteps")
    data_variance: float = Field(gt=0, description="variance of an element of x_0; no x_t leaves more open")
    noise_limit: float | None = Field(
        None, gt=0, description="largest standard deviation of the last noise that is added; for pixels (App. F.2)"
    )
    samples: int = Field(ge=1, description="how many x_0 went into it")

    @model_validator(mode="after")
    def _table(self) -> EpsilonStatistics:
        if len(self.timesteps) != len(self.epsilon_square):
            raise ValueError(f"{len(self.timesteps)} timesteps and {len(self.epsilon_square)} values; expected as many")
        if list(self.timesteps) != sorted(set(self.timesteps)) or self.timesteps[0] < 0:
            raise ValueError("timesteps must ascend from 0 or more")
        if not all(0 <= value < float("inf") for value in self.epsilon_square):
            raise ValueError("epsilon_square holds a negative or infinite value")
        return self


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
    filter: FilterConfig = FilterConfig()
    holdout: float = Field(
        0.0, ge=0, lt=1, description="share of the samples kept from training, chosen by a hash of their keys"
    )
    part: Literal["train", "validation"] = Field("train", description="validation reads what `holdout` keeps back")
    image_size: int = Field(64, ge=8, le=2048, description="edge of the square image after resizing, in pixels")
    crop_size: int | None = Field(None, ge=8, description="edge of a random crop of the resized image")
    horizontal_flip: bool = False
    augment: bool = Field(False, description="random shift, scale, rotation and background for CLIP training")
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
        if self.sources and self.source != "synthetic":
            raise ValueError(f"both source ({self.source!r}) and sources are named; expected one of them")
        if self.part == "validation" and self.holdout == 0:
            raise ValueError("part is validation, but holdout is 0, so that nothing is kept back for it")
        return self

    def each(self) -> list[tuple[DataConfig, float]]:
        """The sources one by one, each as a configuration of its own, with their weights."""
        if not self.sources:
            return [(self, 1.0)]
        fields = ("source", "split", "streaming", "image_column", "caption_column", "key_column")
        result = []
        for one in self.sources:
            given = {name: value for name in fields if (value := getattr(one, name)) is not None}
            result.append((self.model_copy(update={**given, "sources": ()}), one.weight))
        return result


class OptimizerConfig(Config):
    """AdamW, warm-up and decay of the learning rate."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="of the learning rate after the warm-up; the last two fall to min_lr at train.steps"
    )
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a cosine or linear schedule")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 leaves gradients alone")
    kernel: Literal["auto", "torch", "deepspeed"] = Field(
        "auto",
        description="torch's fused AdamW, or DeepSpeed's FusedAdam (CPUAdam on the CPU); auto takes the latter for a "
        "GPU run whose optimizer is offloaded",
    )

    @model_validator(mode="after")
    def _falls(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr:g}, above lr {self.lr:g}")
        return self


class OffloadConfig(Config):
    """What DeepSpeed keeps off the GPU. It costs time; see docs/training.md."""

    optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="AdamW's state and the weights it updates; ZeRO 1 to 3, nvme with 3 only"
    )
    parameters: Literal["none", "cpu"] = Field("none", description="this process's part of the weights; ZeRO 3")
    nvme_path: str | None = Field(None, description="folder on a local disk, for nvme")


class GuardConfig(Config):
    """What ends a run that goes wrong."""

    max_skipped: int = Field(
        20, ge=1, description="steps in a row without a finite loss and gradient, after which the run ends"
    )
    compare_every: int = Field(
        500, ge=0, description="steps between comparisons of the processes' weights (ZeRO 0 to 2); 0 is before saving"
    )
    timeout_minutes: float = Field(30.0, gt=0, description="how long a process waits for the others")


class WandbConfig(Config):
    """Weights & Biases. `auto` is online when somebody is logged in and offline otherwise."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "unclip"
    name: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None


class LoRAConfig(Config):
    """Low-rank adapters beside frozen weights (Hu et al. 2022): W + alpha/rank · B·A, of which only A and B learn."""

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0, description="by default `rank`, which makes the factor 1")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what goes into the adapters, in training")
    target: tuple[str, ...] = Field(
        ("attention",),
        min_length=1,
        description="layers that get one: 'attention', 'feedforward', 'conv', 'linear' (all linear ones), or patterns "
        "such as 'unet.middle.*'",
    )
    export: Literal["merged", "adapter", "both"] = Field(
        "both", description="what the run writes: a whole model/, a small adapter/ in peft's layout, or both"
    )


class TrainConfig(Config):
    """What the shared training loop needs to know (unclip.training.fit)."""

    run_dir: str = Field("runs/run", description="checkpoints, metrics.jsonl, samples and the exported model go here")
    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="samples a step over all processes and accumulation")
    accumulation: int = Field(1, ge=1, description="micro-batches a step")
    seed: int = Field(0, ge=0)
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 means autocast; parameters and EMA stay float32"
    )
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: OffloadConfig = OffloadConfig()
    deepspeed: str | None = Field(
        None, description="a DeepSpeed JSON; what it says must not be said otherwise in this configuration"
    )
    compile: bool = Field(False, description="torch.compile of the network")
    freeze: tuple[str, ...] = Field((), description="patterns of parameters that do not learn, such as 'unet.down.*'")
    trainable: tuple[str, ...] = Field((), description="patterns of the parameters that learn, and no others do")
    lora: LoRAConfig | None = Field(None, description="train low-rank adapters alone")
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    log_every: int = Field(10, ge=1)
    log_param_norm: bool = Field(False, description="tell the norm of all parameters as well")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="peak of one process's device, of which the MFU is a share; by default the GPU's data sheet says "
        "it, and on a CPU a matrix product",
    )
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every: int = Field(0, ge=0, description="checkpoints at multiples of this step stay as well; 0: none")
    validate_every: int = Field(
        0, ge=0, description="steps between losses of the EMA model on data.holdout, which training never sees; 0: none"
    )
    validate_batches: int = Field(8, ge=1, description="micro-batches a process, the same every time")
    sample_every: int = Field(
        0, ge=0, description="steps between grids of samples (prior: measurements of them); 0 makes none"
    )
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> TrainConfig:
        given = [name for name in ("freeze", "trainable", "lora") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are given; each says what learns by itself (lora trains its adapters alone), so "
                "name one of them"
            )
        return self


def load_config(cls: type[ConfigT], path: str | Path, overrides: list[str] | None = None) -> ConfigT:
    """Read a YAML file, apply `a.b=value` overrides (values parsed as YAML) and validate.

    Raises UsageError: file missing or not YAML, an override without `=`, an unknown key, a value out of range.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no configuration file at {file}; the ready ones are in configs/<stage>/<recipe>.yaml")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{file} holds a {type(data).__name__} at its top, expected keys and values")
    for override in overrides or []:
        _apply_override(data, override)
    return parse_config(cls, data, origin=str(file))


def load_overrides(
    cls: type[ConfigT], data: dict[str, Any], overrides: list[str], origin: str = "the configuration"
) -> ConfigT:
    """A plain dictionary with `a.b=value` overrides on top, validated. Raises UsageError as `load_config` does."""
    for override in overrides:
        _apply_override(data, override)
    return parse_config(cls, data, origin)


def parse_config(cls: type[ConfigT], data: dict[str, Any], origin: str = "the configuration") -> ConfigT:
    """Validate a plain dictionary; every problem is named in one UsageError."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_explain(cls, problem) for problem in error.errors())
        raise UsageError(f"{origin}: {problems}") from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    key = key.lstrip("-")
    if not separator or not key:
        raise UsageError(f"the override {override!r} is not of the form key=value, such as train.steps=1000")
    node: Any = data
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UsageError(f"the override {override!r} goes below {parent!r}, which is a value and not a section")
    try:
        node[last] = _yaml_scalar(value)
    except yaml.YAMLError as error:
        raise UsageError(f"the override {override!r} has a value that is not YAML: {_first_line(error)}") from error


def _yaml_scalar(text: str) -> Any:
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(cls: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    names, parents = _fields_at(cls, location[:-1])
    key = ".".join(_fields_at(cls, location)[1])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        prefix = ".".join(parents)
        nearest = (
            f"did you mean {'.'.join(filter(None, [prefix, close[0]]))!r}?" if close else f"known: {', '.join(names)}"
        )
        return f"unknown key {key!r}; {nearest}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'configuration'}: {message[0].lower() + message[1:]} (got {_short(problem.get('input'))})"


def _fields_at(cls: type[BaseModel], path: list[str]) -> tuple[list[str], list[str]]:
    """The fields of the model found by walking `path` through nested models, and the path without tags of unions."""
    models: list[type[BaseModel]] = [cls]
    shown = []
    for name in path:
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        tagged = [model for model in models if _kind_of(model) == name] if len(models) > 1 else []
        if tagged:  # the tag of a union, which the user has written as `kind`
            models = tagged
        elif fields:
            models = _models_of(fields[0].annotation)
            shown.append(name)
        elif len(models) == 1 or not models:
            shown.append(name)  # an index
    return sorted({name for model in models for name in model.model_fields}), shown


def _kind_of(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation admits, in the order they are written."""
    if _is_model(annotation):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_of(argument)]
    return []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
