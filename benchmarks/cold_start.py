"""Time `unclip sample` as a user meets it: a new process each run, its CPU and wall seconds and its peak memory.

    python -m benchmarks cold-start [--runs 5] [--sizes 64 1024] [--model emoji]

Importing torch is the yardstick: nothing that draws a picture can do without it. It takes its turn in every round,
because machines differ and are shared, and the last column is the median of the rounds' ratios of CPU seconds. What
else a machine does changes CPU seconds by some tenths, wall seconds by anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

YARDSTICK = "import torch"


class Run(NamedTuple):
    """One process: CPU seconds of user and system together, wall seconds, largest resident set."""

    cpu: float
    wall: float
    megabytes: float


def main(argv: list[str] | None = None) -> None:
    _find_the_package()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompt", default="pizza")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)

    commands = {
        YARDSTICK: ["-c", YARDSTICK],
        "import open_clip": ["-c", "import open_clip"],
        "unclip --help": ["-m", "unclip", "--help"],
    }
    sample = ["-m", "unclip", "sample", "--prompt", arguments.prompt, "--model", arguments.model, "--size"]
    commands |= {f"unclip sample --size {size}": [*sample, str(size)] for size in arguments.sizes}
    rows = summary(measure(commands, arguments.runs))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{arguments.runs} runs each\n"
    )
    print("| command | CPU s | least | most | wall s | peak MB | times `import torch` |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| `{name}` | {row['cpu_median']:.2f} | {row['cpu_min']:.2f} | {row['cpu_max']:.2f} | "
            f"{row['wall_median']:.2f} | {row['megabytes']:.0f} | {row['times_torch']:.2f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[Run]]:
    """`runs` new Python processes for each command's arguments, in turns."""
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            found[name].append(run([sys.executable, *command]))
    return found


def run(command: Sequence[str]) -> Run:
    """What one new process takes; ends this one where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    with process.stderr as errors:
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed: {errors.read().decode().strip()}")
    return Run(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024)


def summary(found: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, float]]:
    """A row of figures for each command; `times_torch` is the median of the ratios within a round."""
    rows = {}
    for name, runs in found.items():
        cpu = [one.cpu for one in runs]
        ratios = [one.cpu / torch.cpu for one, torch in zip(runs, found[YARDSTICK], strict=True)]
        rows[name] = {
            "cpu_median": statistics.median(cpu),
            "cpu_min": min(cpu),
            "cpu_max": max(cpu),
            "wall_median": statistics.median(one.wall for one in runs),
            "megabytes": max(one.megabytes for one in runs),
            "times_torch": statistics.median(ratios),
        }
    return rows


def _find_the_package() -> None:
    """The new processes run elsewhere, and may not have the package installed."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


if __name__ == "__main__":
    main()
