"""What a foreign checkpoint may hold beside tensors: a named list of classes, each read as an inert record.

A pickle names classes and functions, and loading it calls them. `torch.load(weights_only=True)` refuses every name that
it is not told of. Here the names that trainers leave in their checkpoints are told of, and none of them is imported:
under each stands a class of ours that keeps what was stored and does nothing.
"""

from __future__ import annotations

import collections
from typing import Any


class Record:
    """Arguments and state of an object that was stored; its own class is never loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


ALLOWED = (
    "packaging.version.Version",  # DALLE2-pytorch: the `version` of a prior's checkpoint
    "packaging.version._Version",
    "packaging._structures.InfinityType",
    "packaging._structures.NegativeInfinityType",
    "pytorch_warmup.base.LinearWarmup",  # its `warmup_scheduler`, which drags the optimizer along
    "accelerate.optimizer.AcceleratedOptimizer",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
)
"""Every class that a checkpoint may name beside tensors and plain containers."""
CONTAINERS = (collections.defaultdict, dict)
"""Containers that an optimizer's pickle names; what they may call to fill themselves is of these lists too."""


def _record(name: str) -> type[Record]:
    module, _, cls = name.rpartition(".")
    # torch compares the name that the class itself tells.
    return type(cls, (Record,), {"__module__": module, "__qualname__": cls})


RECORDS = tuple(_record(name) for name in ALLOWED)


def version_text(stored: Any) -> str | None:
    """The version of a package as a checkpoint tells it, '1.15.6': text, or a record of `packaging`'s Version as its
    releases of 2018 to 2026 pickle it. None where it is neither.
    """
    if isinstance(stored, str):
        return stored.strip() or None
    if not isinstance(stored, Record):
        return None
    state = stored.state
    if isinstance(state, dict):  # before packaging 26: {"_version": _Version(epoch, release, …)}
        inner = state.get("_version")
        fields = inner.args if isinstance(inner, Record) else ()
    elif isinstance(state, tuple):
        fields = state
    else:
        fields = stored.args
    if len(fields) == 1 and isinstance(fields[0], str):
        return fields[0]
    release = fields[1] if len(fields) > 1 else None
    if isinstance(release, tuple) and release and all(isinstance(number, int) for number in release):
        return ".".join(str(number) for number in release)
    return None
