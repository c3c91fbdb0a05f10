"""The plan of a training run on many GPUs: parameters, FLOPs, memory, time, data, money."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unclip.errors import UsageError
from unclip.gpus import Gpu
from unclip.planning.memory import Memory, memory
from unclip.planning.parameters import count_parameters
from unclip.planning.recipe import Recipe
from unclip.planning.trace import Flops, StepTrace, planning_tensors
from unclip.planning.workload import open_workload
from unclip.training import Distributed
from unclip.training.engine import micro_batch_size

_GIB = 2**30
_SECONDS_A_DAY = 86_400
# LAION-400M at 256 px is 27 KB a sample in its tar files, of which some 1.5 KB are headers, caption and metadata.
_BYTES_A_PIXEL, _BYTES_A_SAMPLE = 0.38, 1500


@dataclass(frozen=True)
class PlanOptions:
    """What is planned with. `mfu` is the share of the GPU's peak at which everything it executes is done.

    `zero_stage` and `micro_batch` are the configuration's own where None; `reserve` is the share of a GPU's memory left
    to the CUDA context, NCCL and fragmentation.
    """

    gpu: Gpu
    gpus: int
    mfu: float = 0.4
    zero_stage: int | None = None
    micro_batch: int | None = None
    reserve: float = 0.1
    price_per_gpu_hour: float | None = None
    bytes_per_image: float | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UsageError(f"--gpus is {self.gpus}; at least one GPU is needed")
        if not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu is {self.mfu}; expected a share of the peak above 0 and up to 1, such as 0.4")
        if not 0 <= self.reserve < 1:
            raise UsageError(f"--reserve is {self.reserve}; expected a share of the memory from 0 to below 1")
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise UsageError(f"--zero is {self.zero_stage}; DeepSpeed's ZeRO has the stages 0, 1, 2 and 3")
        for name in ("price_per_gpu_hour", "bytes_per_image"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected a finite number of 0 or more")


def plan(recipe: Recipe, options: PlanOptions) -> dict[str, Any]:
    """Everything that `unclip plan` tells, as plain values: bytes, seconds, FLOPs (a multiplication and an addition are
    two), counts.

    Raises UsageError: a batch that does not divide over the GPUs, a micro-batch larger than a GPU's share or not
    dividing it, bfloat16 on a GPU that has none.
    """
    train = recipe.config.train
    peak = options.gpu.teraflops(train.precision)
    micro, accumulation = _batches(train, options)
    with planning_tensors():
        workload = open_workload(recipe)
        trace = StepTrace(workload.network, workload.run, bfloat16=train.precision == "bfloat16")
        counted = count_parameters(recipe, workload.network)
        frozen = {name: _size(module) for name, module in workload.frozen.items()}
        need = _Need(trace, counted, sum(size["bytes"] for size in frozen.values()), train.batch_size, options)
        usable = options.gpu.memory_gib * _GIB * (1 - options.reserve)
        by_stage = _memory_table(need, train, options, micro, usable)
        step = trace.at(micro).flops
    return {
        "config": str(recipe.path),
        "stage": recipe.stage,
        "network": type(workload.network).__name__,
        "precision": train.precision,
        "hardware": {
            "gpu": options.gpu.name,
            "gpus": options.gpus,
            "peak_teraflops": peak,
            "mfu": options.mfu,
            "memory_bytes": round(options.gpu.memory_gib * _GIB),
            "usable_bytes": round(usable),
        },
        "parameters": {**counted, "frozen": {name: size["parameters"] for name, size in frozen.items()}},
        "batch": {"batch_size": train.batch_size, "micro_batch": micro, "accumulation": accumulation},
        "flops": _flops(step, micro),
        "memory": {
            "zero_stage": train.zero_stage if options.zero_stage is None else options.zero_stage,
            "by_stage": by_stage,
        },
        "time": _time(step, train, options, accumulation, peak),
        "data": _data(recipe, options),
        "assumptions": [*recipe.assumptions, *workload.assumptions, *_assumptions(recipe, options)],
    }


@dataclass(frozen=True)
class _Need:
    """Memory of one GPU by ZeRO stage and micro-batch."""

    trace: StepTrace
    counted: dict[str, Any]
    frozen: int
    batch_size: int
    options: PlanOptions

    def __call__(self, zero_stage: int, micro: int) -> Memory:
        return memory(
            self.counted["total"],
            self.counted["trainable"],
            zero_stage=zero_stage,
            gpus=self.options.gpus,
            accumulation=self.batch_size // self.options.gpus // micro,
            frozen=self.frozen,
            peak=self.trace.at(micro).peak,
        )


def _batches(train: Any, options: PlanOptions) -> tuple[int, int]:
    """Micro-batch and accumulation: the configuration's, or those that follow from a micro-batch asked for."""
    if options.micro_batch is None:
        everybody = Distributed(0, options.gpus, torch.device("cpu"))
        return micro_batch_size(train, everybody), train.accumulation
    if train.batch_size % options.gpus:
        raise UsageError(
            f"train.batch_size {train.batch_size} does not divide over {options.gpus} GPUs; "
            "change one of them (train.batch_size=…)"
        )
    share = train.batch_size // options.gpus
    if not 1 <= options.micro_batch <= share or share % options.micro_batch:
        raise UsageError(
            f"--micro-batch is {options.micro_batch}; a GPU's share of the batch is {share} samples, and the "
            f"micro-batch must divide it: {', '.join(map(str, _divisors(share)))}"
        )
    return options.micro_batch, share // options.micro_batch


def _flops(flops: Flops, micro: int) -> dict[str, float]:
    """FLOPs of one image."""
    return {
        "forward": flops.forward / micro,
        "backward": flops.backward / micro,
        "recomputed": flops.recomputed / micro,
        "frozen": flops.frozen / micro,
        "training_step": flops.total / micro,
    }


def _memory_table(
    need: _Need, train: Any, options: PlanOptions, micro: int, usable: float
) -> dict[str, dict[str, Any]]:
    """By ZeRO stage: bytes at the planned micro-batch, whether they fit, and the largest micro-batch that does."""
    sizes = _divisors(train.batch_size // options.gpus)
    table: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        there = need(stage, micro)
        fitting = [size for size in sizes if need(stage, size).total <= usable]
        table[str(stage)] = {
            **there.as_dict(),
            "fits": there.total <= usable,
            "largest_micro_batch": max(fitting, default=None),
        }
    return table


def _time(flops: Flops, train: Any, options: PlanOptions, accumulation: int, peak: float) -> dict[str, float | None]:
    step = accumulation * flops.total / (peak * 1e12 * options.mfu)
    days = train.steps * step / _SECONDS_A_DAY
    hours = days * 24 * options.gpus
    return {
        "steps": train.steps,
        "step_seconds": step,
        "images_per_second": train.batch_size / step,
        "days": days,
        "gpu_hours": hours,
        "total_flops": train.steps * accumulation * options.gpus * flops.total,
        "model_mfu": options.mfu * (flops.forward + flops.backward) / flops.total,
        "cost": None if options.price_per_gpu_hour is None else hours * options.price_per_gpu_hour,
    }


def _data(recipe: Recipe, options: PlanOptions) -> dict[str, float]:
    train, edge = recipe.config.train, recipe.config.data.image_size
    each = options.bytes_per_image
    if each is None:
        each = _BYTES_A_SAMPLE + _BYTES_A_PIXEL * edge**2
    images = train.steps * train.batch_size
    return {"image_size": edge, "images": images, "bytes_per_image": each, "bytes": images * each}


def _assumptions(recipe: Recipe, options: PlanOptions) -> list[str]:
    told = [
        f"GPUs reach {options.mfu:.0%} of their dense {recipe.config.train.precision} peak in everything they execute, "
        "waiting for each other and for data included",
        "weights, gradients, optimizer and moving average are float32, as the training loop keeps them; DeepSpeed's "
        "buckets have their default sizes",
        f"{options.reserve:.0%} of a GPU's memory is left to the CUDA context, NCCL and fragmentation",
    ]
    if options.bytes_per_image is None:
        told.append(
            f"images are stored as JPEG at {recipe.config.data.image_size} px, {_BYTES_A_PIXEL} bytes a pixel, with "
            f"{_BYTES_A_SAMPLE} bytes of caption and file headers each"
        )
    if getattr(recipe.config, "clip_cache", 0):
        told.append("clip_cache keeps CLIP's features in memory; the plan counts CLIP at every step nevertheless")
    if recipe.config.train.compile:
        told.append("what torch.compile saves is not counted")
    return told


def _size(module: nn.Module) -> dict[str, int]:
    tensors = [*module.parameters(), *module.buffers()]
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def _divisors(number: int) -> list[int]:
    """Micro-batches into which a GPU's share of the batch can be cut, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]
