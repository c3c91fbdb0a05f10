"""How good a model is: figures of its pictures against a data set's, sweeps of how it samples, and memorisation.

The libraries that measure (`pip install 'unclip[eval]'`) load when something is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import attach

if TYPE_CHECKING:
    from unclip.evaluation.measuring import Evaluation, evaluate
    from unclip.evaluation.memorisation import measure_memorisation
    from unclip.evaluation.sweeps import sweep

__all__ = [
    "Evaluation",
    "evaluate",
    "measure_memorisation",
    "sweep",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "unclip.evaluation.measuring": ["Evaluation", "evaluate"],
        "unclip.evaluation.memorisation": ["measure_memorisation"],
        "unclip.evaluation.sweeps": ["sweep"],
    },
)
