"""Progress bars on stderr, one a stage."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


def hush_datasets(quiet: bool) -> None:
    """No bars of `datasets` while it prepares a data set, where none are wanted or stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()


class Bars:
    """Hears `(stage, steps done, steps in all)` and draws a bar for each stage; silent where stderr is no
    terminal.
    """

    def __init__(self, quiet: bool) -> None:
        self.silent = quiet or not sys.stderr.isatty()
        self.prefix = ""
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def batch(self, number: int, count: int) -> None:
        """The next bars belong to batch `number` of `count`."""
        self.close()
        self.prefix = f"{number}/{count} " if count > 1 else ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.silent:
            return
        if stage != self._stage:
            self.close()
            from tqdm import tqdm

            self._stage = stage
            self._bar = tqdm(
                total=total, desc=f"{self.prefix}{stage.replace('_', ' ')}", file=sys.stderr, leave=False
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""
