"""From `train` to DeepSpeed's JSON, and back where the user brings one (`train.deepspeed`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip.config import OptimizerConfig, TrainConfig, parse_config
from unclip.errors import UsageError

_ELSEWHERE = {
    "scheduler": "the schedule is train.optimizer.schedule, warmup_steps and min_lr",
    "fp16": "weights are float32; train.precision: bfloat16 computes in half precision",
    "bf16": "weights are float32; train.precision: bfloat16 computes in half precision",
    "amp": "weights are float32; train.precision: bfloat16 computes in half precision",
    "torch_autocast": "autocast is train.precision: bfloat16",
    "data_efficiency": "the data's order is the data section's",
    "curriculum_learning": "the data's order is the data section's",
    "elasticity": "another number of processes continues any checkpoint without it",
    "checkpoint": "checkpoints are train.checkpoint_every, keep_checkpoints and keep_every",
}
"""Sections of a DeepSpeed JSON whose work this loop does itself, or not at all."""

_IN_ZERO = {
    "zero_hpz_partition_size": "secondary partitions (hpZ)",
    "mics_shard_size": "MiCS",
    "zenflow": "ZenFlow",
    "zero_quantized_weights": "quantised weights",
    "zero_quantized_nontrainable_weights": "quantised weights",
}
"""Keys of zero_optimization under which the averaged model or a checkpoint would not be exact."""


def settle(config: TrainConfig, world_size: int) -> TrainConfig:
    """`config` with what its DeepSpeed JSON says and the configuration leaves open; as it is where there is none.

    Raises UsageError: no such file, no JSON, a section this loop does otherwise, a key that the configuration says
    otherwise, an offload that the ZeRO stage does not have.
    """
    if config.deepspeed is not None:
        said = _said(read(config.deepspeed), config, world_size)
        against = [
            f"{key} {_shown(value)} there and train.{name} {_shown(_at(config, name))} here"
            for name, (key, value) in said.items()
            if _explicit(config, name) and not _same(value, _at(config, name))
        ]
        if against:
            raise UsageError(
                f"{config.deepspeed} and the configuration disagree: {'; '.join(against)}; say each in one place"
            )
        config = _with(config, {name: value for name, (_, value) in said.items()})
    _check_offload(config)
    return config


def read(file: str) -> dict[str, Any]:
    """A DeepSpeed JSON without its "auto" values, checked for sections that do not go together with this loop."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"train.deepspeed is {file}, and there is no such file")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"train.deepspeed: {file} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise UsageError(f"train.deepspeed: {file} holds a {type(body).__name__} at its top, expected keys and values")
    body = _without_auto(body)
    for name, instead in _ELSEWHERE.items():
        section = body.get(name)
        if section and not (isinstance(section, dict) and section.get("enabled") is False):
            raise UsageError(f"train.deepspeed: {file} has a section {name!r}, which is not used here: {instead}")
    zero = body.get("zero_optimization", {})
    for name, what in _IN_ZERO.items():
        if zero.get(name) not in (None, False, 1, -1):
            raise UsageError(f"train.deepspeed: {file} asks for {what} ({name}), with which a run cannot be resumed")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise UsageError(
            f"train.deepspeed: {file} keeps parameters on nvme, which the moving average reads at every step; use cpu"
        )
    kind = str(body.get("optimizer", {}).get("type", "AdamW"))
    if kind.lower() not in ("adam", "adamw"):
        raise UsageError(f"train.deepspeed: {file} asks for the optimizer {kind!r}; AdamW is the one there is")
    return body


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The whole JSON that DeepSpeed is given for a settled configuration."""
    body = read(config.deepspeed) if config.deepspeed is not None else {}
    for key in ("train_batch_size", "optimizer", *_ELSEWHERE):  # the loop's, or derived
        body.pop(key, None)
    zero = {**body.pop("zero_optimization", {}), "stage": config.zero_stage}
    if config.offload.optimizer != "none":
        zero["offload_optimizer"] = {**zero.get("offload_optimizer", {}), "device": config.offload.optimizer}
        if config.offload.optimizer == "nvme":
            zero["offload_optimizer"]["nvme_path"] = config.offload.nvme_path
    if config.offload.parameters != "none":
        zero["offload_param"] = {**zero.get("offload_param", {}), "device": config.offload.parameters}
    return {
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **body,
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": config.accumulation,
        # Without ZeRO the loop clips: it has the norm at hand, and DeepSpeed would compute it again.
        "gradient_clipping": config.optimizer.grad_clip if config.zero_stage else 0.0,
        "zero_optimization": zero,
    }


def micro_batch(config: TrainConfig, world_size: int) -> int:
    """Samples a process sees at once; UsageError when the batch does not divide evenly."""
    parts = world_size * config.accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"train.batch_size {config.batch_size} does not divide over {world_size} processes × "
            f"{config.accumulation} accumulation steps; use a multiple of {parts}"
        )
    return config.batch_size // parts


def _said(body: dict[str, Any], config: TrainConfig, world_size: int) -> dict[str, tuple[str, Any]]:
    """Keys of `train` -> the JSON's name for it and its value there."""
    found: dict[str, tuple[str, Any]] = {}

    def take(name: str, key: str, value: Any) -> None:
        if value is not None:
            found[name] = (key, value)

    zero = body.get("zero_optimization", {})
    accumulation = body.get("gradient_accumulation_steps")
    take("accumulation", "gradient_accumulation_steps", accumulation)
    take("zero_stage", "zero_optimization.stage", zero.get("stage"))
    take("offload.optimizer", "offload_optimizer.device", zero.get("offload_optimizer", {}).get("device"))
    take("offload.nvme_path", "offload_optimizer.nvme_path", zero.get("offload_optimizer", {}).get("nvme_path"))
    take("offload.parameters", "offload_param.device", zero.get("offload_param", {}).get("device"))
    take("optimizer.grad_clip", "gradient_clipping", body.get("gradient_clipping"))
    for name, value in body.get("optimizer", {}).get("params", {}).items():
        if name in OptimizerConfig.model_fields:
            take(f"optimizer.{name}", f"optimizer.params.{name}", tuple(value) if isinstance(value, list) else value)
        elif name not in ("torch_adam", "adam_w_mode", "bias_correction"):
            raise UsageError(f"train.deepspeed: {config.deepspeed} gives the optimizer an unknown parameter {name!r}")
    micro, whole = body.get("train_micro_batch_size_per_gpu"), body.get("train_batch_size")
    if micro is not None:
        product = micro * (accumulation or config.accumulation) * world_size
        if whole not in (None, product):
            raise UsageError(
                f"train.deepspeed: {config.deepspeed} says train_batch_size {whole}, but "
                f"train_micro_batch_size_per_gpu {micro} makes {product} on {world_size} processes"
            )
        take("batch_size", f"train_micro_batch_size_per_gpu {micro}, a batch of", product)
    else:
        take("batch_size", "train_batch_size", whole)
    return found


def _check_offload(config: TrainConfig) -> None:
    offload, stage = config.offload, config.zero_stage
    if offload.optimizer != "none" and stage == 0:
        raise UsageError("train.offload.optimizer needs train.zero_stage 1, 2 or 3, and it is 0")
    if offload.optimizer == "nvme" and stage != 3:
        raise UsageError(f"train.offload.optimizer nvme needs train.zero_stage 3, and it is {stage}")
    if offload.parameters != "none" and stage != 3:
        raise UsageError(f"train.offload.parameters needs train.zero_stage 3, and it is {stage}")
    if offload.optimizer == "nvme" and offload.nvme_path is None:
        raise UsageError("train.offload.optimizer nvme needs train.offload.nvme_path, a folder on a local disk")


def _with(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    body = config.model_dump(exclude_unset=True)
    for name, value in values.items():
        node = body
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return parse_config(TrainConfig, body, origin=f"train.deepspeed: {config.deepspeed}")


def _explicit(config: TrainConfig, name: str) -> bool:
    node: Any = config
    for part in name.split("."):
        if part not in node.model_fields_set:
            return False
        node = getattr(node, part)
    return True


def _at(config: TrainConfig, name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    return node


def _same(one: Any, other: Any) -> bool:
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return float(one) == float(other) if numbers else one == other


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def _without_auto(node: Any) -> Any:
    """Hugging Face's files say "auto" for what the configuration decides."""
    if isinstance(node, dict):
        return {key: _without_auto(value) for key, value in node.items() if value != "auto"}
    return node
