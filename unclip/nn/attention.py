"""Attention maps of a U-Net, read and changed while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from unclip.nn.blocks import AttentionBlock


@dataclass(frozen=True)
class AttentionMaps:
    """What one attention layer attends to in one pass.

    layer: its dotted name. probabilities: (B, heads, H·W, N + H·W), whose rows sum to 1; the first N columns are the
    context tokens, the others the feature map's own places. context: N, 0 without. size: (H, W).

    B counts all rows of the pass: under guidance the batch stands there several times, the condition's rows last
    (unclip.diffusion.make_denoiser).
    """

    layer: str
    probabilities: Tensor
    context: int
    size: tuple[int, int]


def is_watched(network: nn.Module) -> bool:
    """Whether anybody is told the attention maps of `network`."""
    return any(isinstance(module, AttentionBlock) and module.watcher is not None for module in network.modules())


@contextmanager
def watch_attention(network: nn.Module, hear: Callable[[AttentionMaps], Tensor | None]) -> Iterator[None]:
    """Let `hear` have the maps of every attention layer of `network` (a U-Net, or a decoder around one) within the
    block. What it returns takes the maps' place; None leaves them as they are.

    Maps are made explicitly meanwhile, which takes more time and memory; the outputs are the same but for rounding.
    """
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, AttentionBlock)]

    def told(name: str, probabilities: Tensor, context: int, size: tuple[int, int]) -> Tensor:
        changed = hear(AttentionMaps(name, probabilities, context, size))
        return probabilities if changed is None else changed.to(probabilities)

    before = [layer.watcher for _, layer in layers]
    try:
        for name, layer in layers:
            layer.watcher = partial(told, name)
        yield
    finally:
        for (_, layer), watcher in zip(layers, before, strict=True):
            layer.watcher = watcher
