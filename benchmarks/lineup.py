"""Who takes part in a contest, and how ours are built for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks import peer_dalle2
from benchmarks.contest import Contestant, parameters_of, training_step
from benchmarks.machine import has_bfloat16
from benchmarks.timing import Work
from unclip.bundle import save_part


class Bench(Protocol):
    """One set of weights and inputs, and who is built on it; `theirs` is None where diffusers is not installed."""

    theirs: Any

    def ours(self, name: str, reduced: bool, compiled: bool) -> Contestant: ...

    def diffusers(self) -> Contestant: ...


def lineup(
    bench: Bench, device: torch.device, compiled: bool, dalle2: Callable[[int], Contestant]
) -> list[Contestant]:
    """Ours in eager float32 and with its defaults, then the peers that are installed; `dalle2` builds one of so many
    parameters.
    """
    found = [
        bench.ours("unclip, eager float32", False, False),
        bench.ours("unclip, defaults", has_bfloat16(device), compiled),
    ]
    if bench.theirs is not None:
        found.append(bench.diffusers())
    if peer_dalle2.INSTALLED:
        found.append(dalle2(found[0].parameters))
    return found


def loaded(
    stage: type[Any], kind: str, config: Any, state: Mapping[str, Tensor], device: torch.device, reduced: bool
) -> Any:
    """A stage as its users get it: saved to a folder and loaded, in bfloat16 where `reduced`."""
    with TemporaryDirectory() as folder:
        save_part(Path(folder) / kind, kind, config, state)
        return stage.load(Path(folder) / kind, device, torch.bfloat16 if reduced else torch.float32)


def ours(
    name: str,
    network: nn.Module,
    training: nn.Module,
    compiled: bool,
    *,
    forward: Work,
    run: Callable[[nn.Module], Tensor],
    target: Tensor,
    reduced: bool,
    sampling: Work,
) -> Contestant:
    """`network` for forward passes and sampling, `training` with the same weights for the training step."""
    parameters = parameters_of(network)
    if compiled:
        network.compile(dynamic=False)
        training.compile(dynamic=False)
    works = {"forward": forward, "training step": training_step(training, run, target, reduced), "sampling": sampling}
    return Contestant(name, parameters, works, tuple(works))
