"""How fast a run is: images a second, the share of the device's peak that this is (MFU), memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from unclip.config import TrainConfig
from unclip.gpus import gpu_of_device

_MEASURING_SECONDS = 0.1
_EDGE = 768


class ModelFlops(TorchDispatchMode):
    """Counts the FLOPs of a training step with the formulas of PyTorch's FlopCounterMode.

    As the MFU is defined (Chowdhery et al. 2022, PaLM, App. B), what counts is the network's forward and backward pass:
    not the frozen encoders beside it, nor what activation checkpointing computes again. Operations run as they would
    without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self.inside = 0  # of the network's forward pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and self._counts():
            self.total += formula(*args, **kwargs, out_val=result)
        return result

    def _counts(self) -> bool:
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            return self.inside > 0
        return not torch.is_grad_enabled()  # gradients are on where something is computed again


@contextmanager
def counting(network: nn.Module) -> Iterator[ModelFlops]:
    """Count what `network` computes inside, forward and backward."""
    counter = ModelFlops()

    def enter(*_: Any) -> None:
        counter.inside += 1

    def leave(*_: Any) -> None:
        counter.inside -= 1

    hooks = [network.register_forward_pre_hook(enter), network.register_forward_hook(leave, always_call=True)]
    try:
        with ExitStack() as stack:
            if hasattr(torch.compiler, "set_stance"):  # a compiled function cannot be looked into
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(counter)
            yield counter
    finally:
        for hook in hooks:
            hook.remove()


class Speed:
    """Images a second since the last question, MFU and memory of this process, for the lines of metrics.

    The peak of a device is `train.peak_tflops`, or its data sheet's, or on a CPU that of a matrix product measured now;
    None where a GPU is unknown.
    """

    def __init__(self, config: TrainConfig, device: torch.device, world_size: int, start: int) -> None:
        self.config, self.device, self.world_size = config, device, world_size
        self.flops_per_image: float | None = None
        self.peak, self.complaint = _peak(config, device)
        self._step, self._time = start, time.perf_counter()

    def counting(self, network: nn.Module) -> AbstractContextManager[Any]:
        """In the first step: count its FLOPs. Later nothing."""
        compiled_blindly = self.config.compile and not hasattr(torch.compiler, "set_stance")
        if self.flops_per_image is not None or self.peak is None or compiled_blindly:
            return nullcontext()
        return self._counted(network)

    @contextmanager
    def _counted(self, network: nn.Module) -> Iterator[None]:
        with counting(network) as counter:
            yield
        self.flops_per_image = counter.total * self.world_size / self.config.batch_size

    def measure(self, step: int) -> dict[str, float]:
        """images_per_second since the last call, over all processes and all that happened; mfu; memory_gib, the
        most this process has held (a GPU's allocator, or resident memory)."""
        now = time.perf_counter()
        speed = (step - self._step) * self.config.batch_size / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        told = {"images_per_second": speed}
        if self.flops_per_image and self.peak is not None:
            told["mfu"] = self.flops_per_image * speed / (self.world_size * self.peak * 1e12)
        memory = peak_memory(self.device)
        return told if memory is None else {**told, "memory_gib": memory / 2**30}


def peak_memory(device: torch.device) -> int | None:
    """The most bytes this process has held, on its GPU or resident in memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured_teraflops(dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product on this process's CPU threads: the best of a tenth of a second."""
    a = torch.full((_EDGE, _EDGE), 0.5, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + _MEASURING_SECONDS
    while True:
        begun = time.perf_counter()
        a @ a
        done = time.perf_counter()
        best = min(best, done - begun)
        if done > end:
            return 2 * _EDGE**3 / best / 1e12


def _peak(config: TrainConfig, device: torch.device) -> tuple[float | None, str]:
    """TFLOP/s, or None and why."""
    if config.peak_tflops is not None:
        return config.peak_tflops, ""
    if device.type != "cuda":
        return measured_teraflops(torch.bfloat16 if config.precision == "bfloat16" else torch.float32), ""
    name = torch.cuda.get_device_name(device)
    gpu = gpu_of_device(name)
    if gpu is None:
        return None, f"the peak of {name} is not known here; set train.peak_tflops to be told the MFU"
    return (gpu.float32 if config.precision == "float32" else gpu.bfloat16), ""
