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
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from unclip.config_base import Config, ConfigT
from unclip.config_data import DataConfig, FilterConfig, SourceConfig, SyntheticConfig
from unclip.config_diffusion import DiffusionConfig, EpsilonStatistics, ScheduleName, XStartClipConfig
from unclip.errors import UsageError

__all__ = [
    "DETERMINISTIC",
    "Config",
    "ConfigT",
    "DataConfig",
    "DiffusionConfig",
    "EpsilonStatistics",
    "FilterConfig",
    "GuardConfig",
    "LoRAConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "SamplerName",
    "ScheduleName",
    "SourceConfig",
    "StepSpec",
    "SyntheticConfig",
    "TrainConfig",
    "WandbConfig",
    "XStartClipConfig",
    "check_steps",
    "count_steps",
    "load_config",
    "load_overrides",
    "parse_config",
]

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


class OptimizerConfig(Config):
    """AdamW, warm-up and decay of the learning rate."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
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
    timeout_minutes: float = Field(
        30.0, gt=0, le=525_600, description="how long a process waits for the others; at most a year"
    )


class WandbConfig(Config):
    """Weights & Biases. `auto` is what WANDB_MODE says; where it says nothing, online when somebody is logged in and
    offline otherwise.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = Field(None, description="null: what WANDB_PROJECT says, or 'unclip'")
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
    seed: int = Field(0, ge=0, le=10**13, description="at most 10^13: times a million it has to fit into 64 bits")
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
                f"{' and '.join(given)} are given; each says by itself what learns (lora: its adapters alone), so "
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
