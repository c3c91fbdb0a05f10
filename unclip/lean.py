"""Less to import for a process that is the command's own.

Libraries import what most of their users want: open_clip brings torchvision, timm and transformers, x-transformers
brings einx, and these bring torch's compiler. Together that takes longer than torch itself, and a picture of a bundle
needs none of it. What is done about it here touches `sys.modules`, and somebody else's thread that imports something at
that moment would notice. So nothing is done until the command says that the process is its own.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from types import ModuleType

_UNUSED = ("einx",)
"""Imported by x-transformers for what this project's networks do not ask of it: biases and masks of other kinds."""

_own = False


def claim_process() -> None:
    """Say that nobody else's code runs in this process."""
    global _own
    _own = True
    for name in _UNUSED:
        defer(name)


def is_own() -> bool:
    """Whether `claim_process` was called."""
    return _own


def defer(name: str) -> None:
    """Let `import name` give a module that runs its code when something of it is first asked for. Nothing happens
    where it is imported already, or not installed.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Deferred
    sys.modules[name] = module


class _Deferred(ModuleType):
    """importlib's LazyLoader will not do: it runs the module at the second `import` statement."""

    def __getattr__(self, name: str) -> object:
        with _lock:
            if type(self) is _Deferred:
                self.__class__ = ModuleType  # type: ignore[assignment]
                assert self.__spec__ is not None and self.__spec__.loader is not None  # as `defer` has seen
                try:
                    self.__spec__.loader.exec_module(self)
                except BaseException:
                    self.__class__ = _Deferred  # the next one to ask meets the error too
                    raise
        return getattr(self, name)


_lock = RLock()


@contextmanager
def skeleton(packages: Sequence[str], absent: Sequence[str] = ()) -> Iterator[None]:
    """Within the block the `packages`, outer ones first, can be imported from without their `__init__` having run, and
    importing one of the `absent` raises ImportError. What is in `sys.modules` already stays as it is.

    Afterwards none of these packages or their modules is in `sys.modules` that was not there before: who imports one
    later gets it whole and anew, and what the block has kept of them is the block's alone.

    Raises ImportError: a package is not installed.
    """
    before = set(sys.modules)
    new = {name.split(".")[0] for name in packages} - before
    try:
        for name in absent:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # documented: it cannot be imported then
        for name in packages:
            if name.split(".")[0] in new:
                sys.modules[name] = _without_init(name)
        yield
    finally:
        for name in set(sys.modules) - before:
            if name in absent or name.split(".")[0] in new:
                del sys.modules[name]


def _without_init(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"no package {name}")
    return importlib.util.module_from_spec(spec)
