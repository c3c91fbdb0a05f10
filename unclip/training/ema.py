"""Exponential moving average of the parameters, in float32, on whatever part of them this process holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unclip.training.engine import gathered


class EMA:
    """θ' ← d·θ' + (1−d)·θ with d = min(decay, (1 + n)/(10 + n)) after n updates, so that short runs average too.

    Under ZeRO-3 each process averages its own partition; `state_dict_full` puts the parts together.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = dict(network.named_parameters())
        self.buffers = dict(network.named_buffers())
        self.shadow = {name: _local(p).detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = [_local(p).detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, tensor in state["shadow"].items():
            self.shadow[name].copy_(tensor)

    @torch.no_grad()
    def state_dict_full(self) -> dict[str, Tensor]:
        """The whole averaged model on the CPU, on every process; all of them must call this together."""
        full = {name: buffer.detach().cpu().clone() for name, buffer in self.buffers.items()}
        for name, parameter in self.parameters.items():
            if not hasattr(parameter, "ds_tensor"):
                full[name] = self.shadow[name].cpu().clone()
                continue
            live = _local(parameter).detach().clone()
            _local(parameter).copy_(self.shadow[name])
            with gathered(parameter):
                full[name] = parameter.detach().float().cpu().clone()
            _local(parameter).copy_(live)
        return full


def _local(parameter: Any) -> Tensor:
    """The part of a parameter that lives here: its ZeRO-3 partition, or all of it."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data  # type: ignore[no-any-return]
