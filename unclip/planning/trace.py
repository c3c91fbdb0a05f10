"""One training step on tensors without memory: how many FLOPs it takes, and which of its tensors live at what time.

The network runs forward and backward on PyTorch's fake tensors, which have shape, type and lifetime and no contents. A
dispatch mode sees every operation: it counts FLOPs with the formulas of PyTorch's FlopCounterMode, and follows each
storage from its birth to its death, which CPython's reference counts place where they fall in a real step. Activation
checkpointing, autocast's copies of the weights and the temporaries of the backward pass are so counted as they occur,
and whatever network a stage builds is followed without a word about it here.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from unclip.planning.rules import GpuRules

# Two batch sizes that take the same path through every objective give all others: sizes are affine in the batch.
_PROBES = (3, 4)


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch: the frozen encoders, the network's forward and backward pass, and within the backward pass
    what activation checkpointing computes again."""

    frozen: float
    forward: float
    backward: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.frozen + self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class _Probe:
    """One traced micro-batch. Series run over all births and deaths of storages: live bytes after each."""

    flops: Flops
    activations: np.ndarray  # everything but weights and their gradients
    gradients: np.ndarray
    forward_end: int  # index into the series


class StepTrace:
    """FLOPs and memory of a training step as functions of the micro-batch.

    `run(batch, frozen_done)` computes the mean loss of `batch` samples with `network` and calls `frozen_done()` when
    the frozen encoders have spoken; call this under `planning_tensors()`.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Callable[[int, Callable[[], None]], Tensor],
        *,
        bfloat16: bool,
        gpu: bool = True,
    ) -> None:
        self._network, self._run, self._bfloat16, self._gpu = network, run, bfloat16, gpu
        self._probes = {batch: self._trace(batch) for batch in _PROBES}
        first, second = self._probes.values()
        self.affine = len(first.activations) == len(second.activations) and first.forward_end == second.forward_end

    def flops(self, batch: int) -> Flops:
        """FLOPs of a micro-batch; a multiplication and an addition are two."""
        probe = self._at(batch)
        return probe.flops

    def saved(self, batch: int) -> float:
        """Bytes that the forward pass leaves for the backward pass, the batch itself included."""
        probe = self._at(batch)
        return float(probe.activations[probe.forward_end])

    def peak(self, batch: int, gradient_share: float = 0.0) -> float:
        """Most bytes alive at any moment of a step beside weights and optimizer, with this share of the gradients."""
        probe = self._at(batch)
        return float((probe.activations + gradient_share * probe.gradients).max())

    def _at(self, batch: int) -> _Probe:
        if batch in self._probes:
            return self._probes[batch]
        if not self.affine:
            self._probes[batch] = self._trace(batch)
            return self._probes[batch]
        (low, first), (high, second) = self._probes.items()
        share = (batch - low) / (high - low)

        def between(a: Any, b: Any) -> Any:
            return a + share * (b - a)

        flops = Flops(*(between(getattr(first.flops, n), getattr(second.flops, n)) for n in Flops.__dataclass_fields__))
        return _Probe(
            flops,
            between(first.activations, second.activations),
            between(first.gradients, second.gradients),
            first.forward_end,
        )

    def _trace(self, batch: int) -> _Probe:
        for parameter in self._network.parameters():
            parameter.grad = None
        gc.collect()
        watch = _Watch()
        watch.ignore(self._network)
        with ExitStack() as stack:
            if self._gpu:
                stack.enter_context(GpuRules())
            stack.enter_context(watch)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
                watch.phase = "frozen"
                loss = self._run(batch, lambda: watch.enter("forward"))
            end = len(watch.events) - 1
            watch.enter("backward")
            # Tensor.backward would switch off the rules, under which checkpointed parts run again.
            engine = cast(Any, torch.autograd.Variable)._execution_engine
            engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
            kept = {watch.serial(p.grad) for p in self._network.parameters() if p.grad is not None}
        serials = np.array([serial for serial, _ in watch.events])
        sizes = np.array([size for _, size in watch.events], dtype=np.float64)
        of_gradients = np.isin(serials, list(kept))
        probe = _Probe(
            Flops(*(watch.flops[name] for name in ("frozen", "forward", "backward", "recomputed"))),
            np.where(of_gradients, 0.0, sizes).cumsum(),
            np.where(of_gradients, sizes, 0.0).cumsum(),
            end,
        )
        for parameter in self._network.parameters():
            parameter.grad = None
        return probe


class _Watch(TorchDispatchMode):
    """Counts FLOPs by phase and records the birth (+bytes) and death (−bytes) of every storage."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.flops = dict.fromkeys(("frozen", "forward", "backward", "recomputed"), 0.0)
        self.phase = "frozen"
        self._alive: dict[int, tuple[int, Any]] = {}
        self._count = 0

    def enter(self, phase: str) -> None:
        self.phase = phase

    def ignore(self, network: nn.Module) -> None:
        """Leave out storages that are there before and after."""
        for tensor in [*network.parameters(), *network.buffers()]:
            self._alive[id(tensor.untyped_storage())] = (-1, tensor)

    def serial(self, tensor: Tensor) -> int:
        return self._alive[id(tensor.untyped_storage())][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            # In the backward pass gradients are off, unless a checkpointed part is computed again.
            again = self.phase == "backward" and torch.is_grad_enabled()
            self.flops["recomputed" if again else self.phase] += formula(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                if func is torch.ops.aten.lift_fresh.default:
                    self._alive[id(value.untyped_storage())] = (-1, value)  # a constant table, made once
                else:
                    self._follow(value)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        serial, size = self._count, storage.nbytes()
        self._count += 1
        self._alive[key] = (serial, weakref.ref(storage, lambda _: self._die(key, serial, size)))
        self.events.append((serial, size))

    def _die(self, key: int, serial: int, size: int) -> None:
        self._alive.pop(key, None)
        self.events.append((serial, -size))


@contextmanager
def planning_tensors() -> Iterator[None]:
    """Inside, tensors that are made have no memory. Garbage collection waits, so that lifetimes repeat exactly."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        if collecting:
            gc.enable()

