"""Contestants, what they do, and what comes of letting them do it in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import Spread, Work, count_flops, in_turns, matrix_product, paired_ratio

WORKS = ("forward", "training step", "sampling")
TOLERANCE = 1e-4


@dataclass
class Contestant:
    """One implementation of one network, and the three things that are asked of it. A work that it leaves out is not
    timed; `notes` says why. `equal` names the works whose results must be the reference's.
    """

    name: str
    parameters: int
    works: dict[str, Work]
    equal: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """Ours beside a peer in one work."""

    stage: str
    work: str
    ours: str
    peer: str
    seconds: Spread
    peer_seconds: Spread
    ratio: Spread
    difference: float | None
    peak: float
    peer_peak: float
    equal: str
    """What of the work is the same, in words."""
    flops: int
    peer_flops: int


def training_step(network: nn.Module, run: Callable[[nn.Module], Tensor], target: Tensor, amp: bool = False) -> Work:
    """Forward, mean squared error, backward and one step of AdamW on a copy of the network; gives the loss before it.

    `amp`: the forward pass under bfloat16 autocast.
    """
    own = copy.deepcopy(network).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-4, weight_decay=0.01)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=amp):
            output = run(own)
        loss = F.mse_loss(output.float(), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def compete(
    stage: str, contestants: Sequence[Contestant], runs: int, device: torch.device, edge: int = 1024
) -> tuple[list[Row], float]:
    """All works in turns -> rows of ours (names that begin with 'unclip') beside every peer, and the machine's measured
    peak in FLOP/s. The first peer is the reference of those whose results must be equal. Raises RuntimeError where
    they differ by more than TOLERANCE.
    """
    rows: list[Row] = []
    product, operations = matrix_product(device, torch.float32, edge)
    peaks: list[float] = []
    for work in WORKS:
        takers = [one for one in contestants if work in one.works]
        if work == "training step":  # its second loss is the first that gradients and optimizer have a say in
            for one in takers:
                one.works[work]()
        counted = {one.name: count_flops(one.works[work]) for one in takers}
        results = {name: _plain(result) for name, (result, _) in counted.items()}
        flops = {name: count for name, (_, count) in counted.items()}
        works: dict[str, Work] = {one.name: one.works[work] for one in takers}
        # Counting has warmed all of them up.
        seconds = in_turns({**works, "": product}, runs, device, warm_up=0)
        fastest = operations / min(seconds.pop(""))
        peaks.append(fastest)
        for ours in takers:
            if not ours.name.startswith("unclip"):
                continue
            for peer in takers:
                if peer.name.startswith("unclip"):
                    continue
                difference = None
                if work in ours.equal and work in peer.equal:
                    difference = _difference(results[ours.name], results[peer.name])
                    if ours.name.endswith("float32") and difference > TOLERANCE:
                        raise RuntimeError(
                            f"{stage}, {work}: {ours.name} and {peer.name} differ by {difference:.1e}, more than "
                            f"{TOLERANCE:.0e}; their times are not comparable"
                        )
                mine, theirs = seconds[ours.name], seconds[peer.name]
                rows.append(
                    Row(
                        stage, work, ours.name, peer.name, Spread.of(mine), Spread.of(theirs),
                        paired_ratio(theirs, mine), difference,
                        flops[ours.name] / Spread.of(mine).median / fastest,
                        flops[peer.name] / Spread.of(theirs).median / fastest,
                        "weights and results" if difference is not None else "parameters and passes",
                        flops[ours.name],
                        flops[peer.name],
                    )
                )
    return rows, max(peaks)


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _plain(result: Any) -> Any:
    return result.detach().float().cpu() if isinstance(result, Tensor) else result


def _difference(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        raise RuntimeError(f"results of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be compared")
    return float((first - second).abs().max())
