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
from dataclasses import astuple, dataclass
from functools import partial
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
_PHASES = ("frozen", "forward", "backward", "recomputed")
Run = Callable[[int, Callable[[], None]], Tensor]


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
class Probe:
    """One traced micro-batch. Series run over all births and deaths of storages: live bytes after each."""

    flops: Flops
    activations: np.ndarray  # everything but weights and their gradients
    gradients: np.ndarray
    forward_end: int  # index into the series

    @property
    def saved(self) -> float:
        """Bytes that the forward pass leaves for the backward pass, the batch itself included."""
        return float(self.activations[self.forward_end])

    def peak(self, gradient_share: float = 0.0) -> float:
        """Most bytes alive at any moment of a step beside weights and optimizer, with this share of the gradients."""
        return float((self.activations + gradient_share * self.gradients).max())


class StepTrace:
    """A training step as a function of the micro-batch; use this under `planning_tensors()`. Arguments as of
    `trace_step`."""

    def __init__(self, network: nn.Module, run: Run, *, bfloat16: bool, gpu: bool = True) -> None:
        self._trace = partial(trace_step, network, run, bfloat16=bfloat16, gpu=gpu)
        self._probes = {batch: self._trace(batch) for batch in _PROBES}
        first, second = self._probes.values()
        self.affine = len(first.activations) == len(second.activations) and first.forward_end == second.forward_end

    def at(self, batch: int) -> Probe:
        """The step of a micro-batch of this size, worked out from two others."""
        if batch in self._probes:
            return self._probes[batch]
        if not self.affine:  # another path at another size: walk it
            self._probes[batch] = self._trace(batch)
            return self._probes[batch]
        (low, first), (high, second) = self._probes.items()
        share = (batch - low) / (high - low)

        def between(a: Any, b: Any) -> Any:
            return a + share * (b - a)

        return Probe(
            Flops(*map(between, astuple(first.flops), astuple(second.flops))),
            between(first.activations, second.activations),
            between(first.gradients, second.gradients),
            first.forward_end,
        )


def trace_step(network: nn.Module, run: Run, batch: int, *, bfloat16: bool, gpu: bool = True) -> Probe:
    """Trace one step of `batch` samples; call this under `planning_tensors()`.

    `run(batch, frozen_done)` computes the mean loss with `network` and calls `frozen_done()` when the frozen encoders
    have spoken. `bfloat16` is autocast; `gpu` takes a GPU's rules for it instead of a CPU's.
    """
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.grad = None
    watch = _Watch()
    with ExitStack() as stack:
        if gpu:
            stack.enter_context(GpuRules())
        stack.enter_context(watch)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = run(batch, lambda: watch.enter("forward"))
        end = len(watch.events) - 1
        watch.enter("backward")
        # Tensor.backward would switch off the rules, under which checkpointed parts run again.
        engine = cast(Any, torch.autograd.Variable)._execution_engine
        seed = (torch.ones_like(loss),)
        engine.run_backward((loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)
        kept = {watch.serial(p.grad) for p in parameters if p.grad is not None}
    serials = np.array([serial for serial, _ in watch.events])
    sizes = np.array([size for _, size in watch.events], dtype=np.float64)
    of_gradients = np.isin(serials, list(kept))
    for parameter in parameters:
        parameter.grad = None
    return Probe(
        Flops(*(watch.flops[name] for name in _PHASES)),
        np.where(of_gradients, 0.0, sizes).cumsum(),
        np.where(of_gradients, sizes, 0.0).cumsum(),
        end,
    )


class _Watch(TorchDispatchMode):
    """Counts FLOPs by phase and records the birth (+bytes) and death (−bytes) of every storage."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.flops = dict.fromkeys(_PHASES, 0.0)
        self.phase = "frozen"
        self._alive: dict[int, tuple[int, Any]] = {}
        self._count = 0

    def enter(self, phase: str) -> None:
        self.phase = phase

    def serial(self, tensor: Tensor) -> int:
        return self._alive[id(tensor.untyped_storage())][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._follow(value, born=False)  # unknown until now: weights and tables, there before and after
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            # In the backward pass gradients are off, unless a checkpointed part is computed again.
            again = self.phase == "backward" and torch.is_grad_enabled()
            self.flops["recomputed" if again else self.phase] += formula(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._follow(value, born=func is not torch.ops.aten.lift_fresh.default)  # which wraps a constant
        return result

    def _follow(self, tensor: Tensor, *, born: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        serial, size = -1, 0
        if born:
            serial, size = self._count, storage.nbytes()
            self._count += 1
            self.events.append((serial, size))
        self._alive[key] = (serial, weakref.ref(storage, lambda _: self._die(key, serial, size)))

    def _die(self, key: int, serial: int, size: int) -> None:
        self._alive.pop(key, None)
        if serial >= 0:
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

