"""How good a model is: figures of its pictures against a data set's, sweeps of how it samples, and memorisation.

The libraries that measure (`pip install 'unclip[eval]'`) load when something is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unclip.evaluation.evaluate import Evaluation, evaluate
    from unclip.evaluation.memorisation import memorisation
    from unclip.evaluation.sweeps import sweep

__all__ = ["Evaluation", "evaluate", "memorisation", "sweep"]

_HOME = {
    **dict.fromkeys(("Evaluation", "evaluate"), "unclip.evaluation.evaluate"),
    "memorisation": "unclip.evaluation.memorisation",
    "sweep": "unclip.evaluation.sweeps",
}


def __getattr__(name: str) -> Any:
    """Import a name's module at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
