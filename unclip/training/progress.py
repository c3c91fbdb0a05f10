"""The line that tells how a run is going: a bar on a terminal, else a plain line at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """Step, loss, images a second, MFU, memory and the time left; now and then what is measured on fixed samples."""

    def __init__(self, steps: int, start: int) -> None:
        self.steps, self.start, self.step = steps, start, start
        self._begun = time.perf_counter()
        self._shown: dict[str, float] = {}
        self.bar: tqdm | None = None  # type: ignore[type-arg]
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        self.step += 1
        if self.bar is not None:
            self.bar.update(1)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what a line of metrics tells: on the bar from now on, or as a line of its own."""
        parts = describe(metrics)
        if self.bar is not None:
            self._shown.update(metrics)  # a line of another kind does not take the loss away
            self.bar.set_postfix_str(", ".join(describe(self._shown)), refresh=False)
        elif parts:
            print("  ".join([f"step {step}/{self.steps}", *parts, f"{self._left(step)} left"]), flush=True)

    def say(self, text: str) -> None:
        if self.bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _left(self, step: int) -> str:
        seconds = (time.perf_counter() - self._begun) / max(step - self.start, 1) * (self.steps - step)
        return str(tqdm.format_interval(seconds))


def describe(metrics: Mapping[str, float]) -> list[str]:
    """What a line of metrics tells in a few words, without what it does not tell."""
    words = {
        "loss": "loss {:.4g}",
        "images_per_second": "{:,.1f} images/s",
        "mfu": "MFU {:.1%}",
        "memory_gib": "{:.2f} GiB",
        "validation_loss": "validation {:.4g}",
        "cos_prediction_real": "cos(prediction, real) {:.3f}",
    }
    return [text.format(metrics[name]) for name, text in words.items() if name in metrics]
