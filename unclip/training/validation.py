"""The EMA model's loss on samples that training never sees."""

from __future__ import annotations

from typing import Any

import torch

from unclip.config import DataConfig, TrainConfig
from unclip.data import build_batches
from unclip.errors import UsageError
from unclip.training.distributed import Distributed
from unclip.training.ema import EMA
from unclip.training.metrics import Window
from unclip.training.settings import micro_batch
from unclip.training.step import Step, random_state, restore_random_state

_SEED = 7_777_777


class Validation:
    """Mean losses of the EMA model on `train.validate_batches` micro-batches a process, held out of the data.

    Batches, timesteps and noise are the same every time, so that two values differ by the weights alone.
    Raises UsageError: data.holdout is 0.
    """

    def __init__(self, data: DataConfig, config: TrainConfig, distributed: Distributed) -> None:
        if not data.holdout:
            raise UsageError(
                f"train.validate_every is {config.validate_every}, but data.holdout is 0: no sample is held out of "
                "training. Set data.holdout to a share such as 0.02, or train.validate_every to 0"
            )
        part = data.model_copy(update={"part": "validation"}).unchanged()
        source = build_batches(
            part,
            batch_size=micro_batch(config, distributed.world_size),
            rank=distributed.rank,
            world_size=distributed.world_size,
            seed=_SEED,
        )
        self.batches: list[Any] = [next(source) for _ in range(config.validate_batches)]
        self.config, self.distributed = config, distributed

    @torch.no_grad()
    def __call__(self, step: Step, ema: EMA) -> dict[str, float]:
        """`validation_loss` and the objective's other terms; all processes must call this together."""
        generator = torch.Generator(self.distributed.device)
        before = random_state(generator)
        window = Window(self.distributed)
        step.engine.eval()
        try:
            with ema.applied():
                for index, batch in enumerate(self.batches):
                    generator.manual_seed((_SEED + index) * 1_000_003 + self.distributed.rank)
                    torch.manual_seed(_SEED + index)
                    window.add(step.forward(batch, generator))
        finally:
            step.engine.train()
            restore_random_state(before, generator)
        return {f"validation_{name}": value for name, value in window.means().items()}
