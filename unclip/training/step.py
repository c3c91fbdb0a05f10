"""One optimizer step, and what its result depends on beside the weights: random states and the place in the data."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.config import TrainConfig
from unclip.data import Batches
from unclip.training.distributed import Distributed
from unclip.training.engine import apply_gradients
from unclip.training.metrics import Window

LossFunction = Callable[[Any, Any, torch.Generator], dict[str, Tensor]]


class Step:
    """All micro-batches of a step through loss, backward and the engine's step."""

    def __init__(
        self,
        engine: Any,
        loss_fn: LossFunction,
        batches: Batches,
        config: TrainConfig,
        generator: torch.Generator,
        distributed: Distributed,
        window: Window,
    ) -> None:
        self.window = window
        self.engine, self.loss_fn, self.batches, self.config = engine, loss_fn, batches, config
        self.generator, self.device = generator, distributed.device
        self._norm: Any = None
        self.applied = True

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping; 0 where it was not finite."""
        norm = 0.0 if self._norm is None else float(self._norm)
        return norm if self.applied else 0.0

    def __call__(self) -> Callable[[], dict[str, float]]:
        """Returns a function that reads the last micro-batch's mean losses (reading waits for the device).

        `applied` tells afterwards whether the weights changed: a loss or gradient that is not finite on one process
        leaves them as they are on all.
        """
        losses: dict[str, Tensor] = {}
        for _ in range(self.config.accumulation):
            losses = self.forward(next(self.batches), self.generator)
            self.window.add(losses)
            loss = losses["loss"].mean()
            # A loss may overflow and its gradient be finite, and wrong. This way the gradient tells of it, without
            # waiting for the device; a factor of 1 changes no bit.
            self.engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            if self.engine.is_gradient_accumulation_boundary():
                self._norm, self.applied = apply_gradients(self.engine, self.config)
            else:
                self.engine.step()
        return lambda: {name: value.float().mean().item() for name, value in Window.told(losses).items()}

    def forward(self, drawn: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Per-sample losses of a batch, which is moved to the device."""
        batch: dict[str, Any] = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in drawn.items()
        }
        # For what stands beside the network, as the loss and the CLIP; around it start_engine has it.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.loss_fn(self.engine, batch, generator)


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """Every source of randomness in this process, as tensors and plain numbers."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(cached)),
    }


def same_kind(state: dict[str, Any], generator: torch.Generator) -> bool:
    """Whether a random state is of such a generator: those of a CPU and of a GPU are not alike."""
    return bool(state["generator"].shape == generator.get_state().shape)


def restore_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))


def begin_random_state(seed: int, step: int, generator: torch.Generator, distributed: Distributed) -> None:
    """Random states of a process that has none from before: another noise in each, and at each step begun from."""
    generator.manual_seed((seed + step) * 1_000_003 + distributed.rank)
    torch.manual_seed(seed + step + distributed.rank)
    random.seed(seed + step + distributed.rank)
    np.random.seed((seed + step + distributed.rank) % 2**32)
