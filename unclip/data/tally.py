"""What was left out of a data set, and why."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_NAMES_SHOWN = 5
_REMEMBERED = 2000


@dataclass
class Tally:
    """Counts what was skipped, each sample once: broken ones, with the names of the first, and those that the
    configuration leaves out, by reason. It is saved with the position in the data.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set, repr=False)

    def add(self, key: object, name: str, reason: str, epoch: int = 0) -> None:
        """Count the broken sample known by `key` unless it was counted before. Beyond the first thousands, which are
        remembered, only an epoch's first reading counts."""
        number = zlib.crc32(repr(key).encode())
        if number in self._seen or (len(self._seen) >= _REMEMBERED and epoch > 0):
            return
        if len(self._seen) < _REMEMBERED:
            self._seen.add(number)
        self.count += 1
        if len(self.first) < _NAMES_SHOWN:
            self.first.append(reason if name in reason else f"{name}: {reason}")

    def leave_out(self, reason: str, epoch: int = 0) -> None:
        """Count a sample that the configuration does not want, in its first epoch."""
        if epoch == 0:
            self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def report(self) -> str:
        """What was skipped, in a sentence or two; empty when nothing was."""
        parts = []
        if self.count:
            plural = "sample was" if self.count == 1 else "samples were"
            more = "" if self.count <= len(self.first) else f", and {self.count - len(self.first)} more"
            parts.append(f"{self.count} broken {plural} skipped ({'; '.join(self.first)}{more})")
        if self.left_out:
            reasons = "; ".join(f"{reason}: {number}" for reason, number in sorted(self.left_out.items()))
            parts.append(f"{sum(self.left_out.values())} left out in the first epoch ({reasons})")
        return "; ".join(parts)

    def metrics(self) -> dict[str, float]:
        """The counts that are not zero, for metrics.jsonl."""
        figures = {"data_broken": float(self.count), "data_left_out": float(sum(self.left_out.values()))}
        return {name: value for name, value in figures.items() if value}

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "first": list(self.first),
            "left_out": dict(self.left_out),
            "seen": sorted(self._seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.first = state["count"], list(state["first"])
        self.left_out, self._seen = dict(state["left_out"]), set(state["seen"])

    @classmethod
    def sum(cls, states: Iterable[dict[str, Any]]) -> Tally:
        """One tally of several workers' or processes'."""
        whole = cls()
        for state in states:
            whole.count += state["count"]
            whole.first = (whole.first + list(state["first"]))[:_NAMES_SHOWN]
            whole._seen |= set(state["seen"])
            for reason, number in state["left_out"].items():
                whole.left_out[reason] = whole.left_out.get(reason, 0) + number
        return whole
