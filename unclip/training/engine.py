"""DeepSpeed behind one door: engine, optimizer, schedule. The only module that imports deepspeed, with `ema`."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.config import OptimizerConfig, TrainConfig
from unclip.errors import UsageError
from unclip.training.distributed import Distributed


def micro_batch_size(config: TrainConfig, distributed: Distributed) -> int:
    """Samples a process sees at once; UsageError when the batch does not divide evenly."""
    parts = distributed.world_size * config.accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"train.batch_size {config.batch_size} does not divide over {distributed.world_size} processes × "
            f"{config.accumulation} accumulation steps; use a multiple of {parts}"
        )
    return config.batch_size // parts


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor on the learning rate at an optimizer step: linear warm-up, then constant or half a cosine down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def start_engine(network: nn.Module, config: TrainConfig, distributed: Distributed) -> Any:
    """Wrap the network in a DeepSpeed engine with AdamW and the schedule of `config`. Parameters stay float32."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    backend = "nccl" if distributed.device.type == "cuda" else "gloo"
    _group_of_one(backend)
    import deepspeed

    if not deepspeed.comm.is_initialized():
        if distributed.device.type == "cpu":
            # Compiling this op takes minutes and a C++ compiler at the first start; gloo alone is as good on a few
            # cores.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    network = network.to(distributed.device)
    options = config.optimizer
    # ZeRO-3 replaces the parameters, so their groups must be plain lists made before; norms and biases do not decay.
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=options.lr, betas=options.betas, eps=options.eps, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(options, step, config.steps)
    )
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config={
            "train_micro_batch_size_per_gpu": micro_batch_size(config, distributed),
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": options.grad_clip,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    return engine


def barrier() -> None:
    """Wait for all processes."""
    import deepspeed

    if deepspeed.comm.is_initialized():
        deepspeed.comm.barrier()


def save_engine(engine: Any, folder: Path) -> None:
    """Write the engine's shards into `folder`; every process calls this."""
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)


def load_engine(engine: Any, folder: Path) -> None:
    """Read what `save_engine` wrote; every process calls this."""
    engine.load_checkpoint(str(folder.parent), tag=folder.name)


def gathered(parameter: Any) -> Any:
    """Context manager in which a ZeRO-3 parameter is whole on every process."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _group_of_one(backend: str) -> None:
    """A run without a launcher is a group of one. Its store is its own memory: a port that looks free now may be
    another run's a moment later."""
    if "WORLD_SIZE" in os.environ:
        return
    # The port is never opened; without these DeepSpeed looks for MPI.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
