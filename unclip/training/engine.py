"""DeepSpeed behind one door: engine, optimizer, schedule. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from unclip.config import OptimizerConfig, TrainConfig
from unclip.errors import UnclipError
from unclip.training.distributed import Distributed
from unclip.training.settings import deepspeed_config, micro_batch

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def micro_batch_size(config: TrainConfig, distributed: Distributed) -> int:
    """Samples a process sees at once; UsageError when the batch does not divide evenly."""
    return micro_batch(config, distributed.world_size)


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor on the learning rate at an optimizer step: linear warm-up, then constant, or half a cosine or a line down
    to min_lr."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    lowest = config.min_lr / config.lr
    return lowest + (1 - lowest) * height


def start_engine(network: nn.Module, config: TrainConfig, distributed: Distributed) -> Any:
    """Wrap the network in a DeepSpeed engine with AdamW and the schedule of `config`. Parameters stay float32."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    start_group(config, distributed)
    import deepspeed

    network = network.to(distributed.device)
    if config.precision == "bfloat16":
        # On a GPU the engine turns autocast off around the network unless its own configuration asks for it.
        autocast = torch.autocast(distributed.device.type, torch.bfloat16)
        network.forward = autocast(network.forward)  # type: ignore[method-assign]
    # ZeRO-3 replaces the parameters, so their groups must be plain lists made before; norms and biases do not decay.
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    decay = config.optimizer.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = _adamw([g for g in groups if g["params"]], config, distributed)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(config.optimizer, step, config.steps)
    )
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(config, distributed.world_size),
        dist_init_required=False,
    )
    _bound_waiting(config)
    if config.compile:
        engine.compile()  # in place: the state's names stay
    return engine


@contextmanager
def process_kept() -> Iterator[None]:
    """Take back what training leaves in this process, which goes on to other work where training is called from Python.

    A run without a launcher tells DeepSpeed of itself in the environment, where child processes would take it for a
    launcher's word; ZeRO 3 puts a linear layer of its own into torch "until manually reset".
    """
    linear, launched = torch.nn.functional.linear, {name: os.environ.get(name) for name in _LAUNCHED}
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        for name, value in launched.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start_group(config: TrainConfig, distributed: Distributed) -> None:
    """Connect the processes; nothing where that is done. UnclipError: they do not find each other."""
    backend = "nccl" if distributed.device.type == "cuda" else "gloo"
    _group_of_one(backend)
    import deepspeed

    if deepspeed.comm.is_initialized():
        return
    if distributed.device.type == "cpu":
        # Compiling this op takes minutes and a C++ compiler at the first start; gloo alone is as good on a few cores.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(distributed.device)
    try:
        deepspeed.init_distributed(
            dist_backend=backend, verbose=False, timeout=timedelta(minutes=config.guard.timeout_minutes)
        )
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UnclipError(
            f"process {distributed.rank} of {distributed.world_size} did not find the others at {place}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def apply_gradients(engine: Any, config: TrainConfig) -> tuple[Any, bool]:
    """End the optimizer step on all processes -> (global gradient norm before clipping, whether weights changed).

    Where the norm is not finite, weights, moments and their counts stay, and the schedule goes on.
    """
    if config.zero_stage == 0:
        trained = [p for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        applied = bool(norm.isfinite())
        if not applied:
            engine.zero_grad()  # without gradients AdamW does nothing at all
        elif config.optimizer.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(trained, config.optimizer.grad_clip, norm)
        engine.step()
        return norm, applied
    engine.step()  # ZeRO has the norm only now; it clips, and skips by itself
    applied = engine.was_step_applied()
    if not applied:
        engine.lr_scheduler.step()
    return engine.get_global_grad_norm(), applied


def set_schedule(engine: Any, step: int) -> None:
    """Let the learning rate be that of `step`, from the configuration as it is now."""
    schedule = engine.lr_scheduler
    schedule.last_epoch = step
    for group, rate, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(step)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _adamw(groups: list[dict[str, Any]], config: TrainConfig, distributed: Distributed) -> torch.optim.Optimizer:
    options = config.optimizer
    common: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    offloaded = config.offload.optimizer != "none"
    cuda = distributed.device.type == "cuda"
    if config.offload.optimizer == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            raise UnclipError(
                "train.offload.optimizer nvme needs DeepSpeed's async_io, which cannot be built here; libaio and its "
                "headers are what it needs. train.offload.optimizer: cpu does without"
            )
    if options.kernel == "torch" or (options.kernel == "auto" and not (offloaded and cuda)):
        return torch.optim.AdamW(groups, **common, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    try:
        if offloaded or not cuda:
            return DeepSpeedCPUAdam(groups, **common, adamw_mode=True)
        return FusedAdam(groups, **common, adam_w_mode=True)
    except Exception as error:
        if options.kernel == "auto":
            return torch.optim.AdamW(groups, **common, fused=True)
        raise UnclipError(
            f"DeepSpeed's AdamW cannot be built here ({str(error).splitlines()[0] if str(error) else error}); it needs "
            "a C++ compiler. train.optimizer.kernel: torch does without"
        ) from error


def _bound_waiting(config: TrainConfig) -> None:
    """DeepSpeed's own groups of processes wait as long as all the others do."""
    world = getattr(torch.distributed.distributed_c10d, "_world", None)
    bound = timedelta(minutes=config.guard.timeout_minutes)
    if hasattr(torch.distributed, "set_timeout") and world is not None:
        for group in list(world.pg_map):
            torch.distributed.set_timeout(bound, group)


def _group_of_one(backend: str) -> None:
    """A run without a launcher is a group of one. Its store is its own memory: a port that looks free now may be
    another run's a moment later."""
    if "WORLD_SIZE" in os.environ:
        return
    # The port is never opened; without these DeepSpeed looks for MPI.
    os.environ.update(zip(_LAUNCHED, ("0", "0", "1", "127.0.0.1", "29500"), strict=True))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
