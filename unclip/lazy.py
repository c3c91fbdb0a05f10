"""Packages whose names load when they are first used (PEP 562), so that importing them costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attach(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`; `names` gives what it offers, by the module that holds it.

    `__dir__` lists, for completion, what is not loaded yet too.
    """
    homes = {name: module for module, held in names.items() for name in held}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    def listing() -> list[str]:
        return sorted({*vars(import_module(package)), *homes})

    return get, listing
