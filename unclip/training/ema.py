"""Exponential moving average of the parameters, in float32, of which each process keeps its own part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unclip.training.partition import even, gather, local_part, numel_of, shape_of


class EMA:
    """θ' ← d·θ' + (1−d)·θ with d = min(decay, (1 + n)/(10 + n)) after n updates, so that short runs average too.

    Each of `world_size` processes averages and stores one part of every trainable parameter, at every ZeRO stage.
    Frozen parameters are their own average.
    """

    def __init__(self, network: nn.Module, decay: float, rank: int = 0, world_size: int = 1) -> None:
        self.decay = decay
        self.updates = 0
        self.rank, self.world_size = rank, world_size
        self.network = network
        self.parameters: dict[str, Any] = dict(network.named_parameters())
        self.shadow = {name: self._live(p).float().clone() for name, p in self.parameters.items() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = [self._live(self.parameters[name]).float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    @torch.no_grad()
    def state_dict_full(self, keep: bool = True) -> dict[str, Tensor]:
        """The whole averaged model on the CPU, put together one parameter at a time; empty where not to `keep`.

        All processes must call this together.
        """
        full: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            whole = self._whole(name, parameter)
            if keep:
                full[name] = whole.float().cpu().clone().view(shape_of(parameter))
        if keep:
            full |= {name: buffer.detach().cpu().clone() for name, buffer in self.network.named_buffers()}
        return full

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network with averaged weights, on every process; the live ones wait in the CPU's memory meanwhile."""
        with torch.no_grad():
            live = {name: self._live(self.parameters[name]).cpu().clone() for name in self.shadow}
            self._fill(self.shadow)
        try:
            yield
        finally:
            with torch.no_grad():
                self._fill(live)

    def _fill(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            parameter = self.parameters[name]
            if hasattr(parameter, "ds_tensor"):
                self._live(parameter).copy_(part)
            if not hasattr(parameter, "ds_tensor") or parameter.numel() == numel_of(parameter):
                # Also the small ones that ZeRO-3 keeps whole on every process.
                whole = gather(part.to(parameter.device), numel_of(parameter), self.world_size)
                parameter.data.copy_(whole.view(shape_of(parameter)))

    def _live(self, parameter: Any) -> Tensor:
        return local_part(parameter, self.rank, self.world_size).detach()

    def _whole(self, name: str, parameter: Any) -> Tensor:
        if name not in self.shadow and not hasattr(parameter, "ds_tensor"):
            return parameter.detach().reshape(-1)  # type: ignore[no-any-return]
        part = self.shadow[name] if name in self.shadow else self._live(parameter)
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
            part = part.cuda()  # an offloaded parameter's part lies on the CPU
        return gather(part, numel_of(parameter), self.world_size)

    def part_of(self, name: str) -> tuple[int, Tensor]:
        """Where this process's part of a trainable parameter begins, and its average."""
        start, _ = even(numel_of(self.parameters[name]), self.rank, self.world_size)
        return start, self.shadow[name]
