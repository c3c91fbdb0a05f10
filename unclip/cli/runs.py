"""`unclip runs`: which training runs there are, and how each is doing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from unclip.runs import Run


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    json_output: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List training runs: stage, state, step, last loss, images a second, age, size on the disk.

    A run that was killed is told from one that trains: its process is looked for, and on another machine its last sign
    of life.
    """
    from unclip.runs import find_runs

    found = find_runs(folder)
    if json_output:
        print(json.dumps([run.to_json() for run in found], indent=2))
    elif found:
        print(table(found, folder, time.time()))
    else:
        print(f"no runs in {folder}")


def table(found: list[Run], folder: Path, now: float) -> str:
    """One line a run; what went wrong stands at the line's end. `age` is since the start, `seen` since the last sign of
    life."""
    rows = [["run", "stage", "state", "step", "loss", "images/s", "age", "seen", "size", ""]]
    for run in found:
        path = Path(run.path)
        rows.append(
            [
                str(path.relative_to(folder)) if path != folder else path.name or str(path),
                run.stage,
                run.state,
                f"{run.step}/{'?' if run.steps is None else run.steps}",
                "" if run.loss is None else f"{run.loss:.4g}",
                "" if run.images_per_second is None else f"{run.images_per_second:,.1f}",
                duration(now - run.started),
                duration(now - run.updated),
                _bytes(run.bytes),
                run.reason if len(run.reason) <= 100 else f"{run.reason[:97]}…",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit: '45 s', '12 min', '3.5 h', '4.2 days'."""
    seconds = max(seconds, 0.0)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86_400:.1f} days"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit in ("B", "KiB") else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
