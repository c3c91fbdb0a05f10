"""What a training run will need: parameters, FLOPs, memory, time and data, counted on networks without weights.

Nothing here computes a value: networks are built and run on tensors that have a shape, a type and a lifetime, and no
memory behind them. So a laptop plans the largest run within a minute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from unclip.gpus import GPUS, Gpu, find_gpu
    from unclip.planning.parameters import count_parameters
    from unclip.planning.recipe import Recipe, read_recipe
    from unclip.planning.report import PlanOptions, plan

__all__ = [
    "GPUS",
    "Gpu",
    "PlanOptions",
    "Recipe",
    "count_parameters",
    "find_gpu",
    "plan",
    "read_recipe",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "unclip.gpus": ["GPUS", "Gpu", "find_gpu"],
        "unclip.planning.parameters": ["count_parameters"],
        "unclip.planning.recipe": ["Recipe", "read_recipe"],
        "unclip.planning.report": ["PlanOptions", "plan"],
    },
)
