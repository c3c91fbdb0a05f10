"""How many parameters a recipe's network has, by part, beside the number that its publication states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unclip.planning.recipe import Recipe
from unclip.planning.workload import build_network

_SMALL_PART = 0.01  # below this share parts are counted together


@dataclass(frozen=True)
class Stated:
    """A size that a publication names for a network."""

    parameters: int
    source: str


_PAPER = "unCLIP, App. C"
_KARLO = "Karlo v1"


def stated(recipe: Recipe) -> Stated | None:
    """What is published for a recipe called after the paper or Karlo; None for any other."""
    model: Any = recipe.config.model
    if recipe.name.startswith("paper"):
        if recipe.stage == "prior":
            return Stated(1_000_000_000, _PAPER)
        if recipe.stage == "decoder":
            return Stated(3_500_000_000, f"{_PAPER}, with its text transformer")
        if recipe.stage == "upsampler":
            return Stated(700_000_000 if model.high_size == 256 else 300_000_000, _PAPER)
    if recipe.name.startswith("karlo"):
        if recipe.stage == "prior":
            return Stated(1_022_028_544, _KARLO)
        if recipe.stage == "decoder":
            return Stated(893_318_086, _KARLO)
        if recipe.stage == "upsampler":
            networks = 2 if model.last_step_network else 1
            return Stated(networks * 691_579_523, f"{_KARLO}, {networks} × 691,579,523" if networks > 1 else _KARLO)
    return None


def count_parameters(recipe: Recipe, network: nn.Module | None = None) -> dict[str, Any]:
    """Count the network of a recipe, which is built without memory unless given -> {"total", "trainable", "parts",
    "stated", "stated_by", "difference_percent"}; the last three are None where nothing is published.
    """
    if network is None:
        with torch.device("meta"):
            network = build_network(recipe)
    total = sum(p.numel() for p in network.parameters())
    published = stated(recipe)
    return {
        "total": total,
        "trainable": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "parts": _parts(network, total),
        "stated": None if published is None else published.parameters,
        "stated_by": None if published is None else published.source,
        "difference_percent": None if published is None else round(100 * (total / published.parameters - 1), 2),
    }


def _parts(network: nn.Module, total: int) -> dict[str, int]:
    """Parameters by the network's own children, the small ones together, largest first."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in network.named_children()}
    parts = {name: count for name, count in counts.items() if count >= _SMALL_PART * total}
    if total > sum(parts.values()):
        parts["the rest"] = total - sum(parts.values())
    return dict(sorted(parts.items(), key=lambda part: -part[1]))
