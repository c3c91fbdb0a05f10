"""Time `unclip sample` as a user meets it: a new process each run, wall seconds and peak memory.

    python -m benchmarks cold-start [--runs 5] [--sizes 64 1024] [--model emoji]

The share that importing the libraries takes is measured in the same run, because machines differ and are shared:
compare ratios, not seconds.
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
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    _find_the_package()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompt", default="pizza")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)

    rows = {"import torch": measure([sys.executable, "-c", "import torch"], arguments.runs)}
    rows["import open_clip"] = measure([sys.executable, "-c", "import open_clip"], arguments.runs)
    rows["unclip --help"] = measure([sys.executable, "-m", "unclip", "--help"], arguments.runs)
    for size in arguments.sizes:
        command = [sys.executable, "-m", "unclip", "sample", "--prompt", arguments.prompt, "--model", arguments.model]
        rows[f"unclip sample --size {size}"] = measure([*command, "--size", str(size)], arguments.runs)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{arguments.runs} runs each\n"
    )
    print("| command | median s | min s | max s | peak MB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| `{name}` | {row['median']:.2f} | {row['min']:.2f} | {row['max']:.2f} | {row['megabytes']:.0f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + json.dumps(rows))


def measure(command: list[str], runs: int) -> dict[str, float]:
    """Wall seconds of `runs` new processes and the largest resident set among them."""
    seconds, peaks = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            _, status, usage = os.wait4(process.pid, 0)
            seconds.append(time.perf_counter() - start)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                assert process.stderr is not None
                sys.exit(f"{' '.join(command)} failed: {process.stderr.read().decode().strip()}")
            peaks.append(usage.ru_maxrss / 1024)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "megabytes": max(peaks)}


def _find_the_package() -> None:
    """The new processes run elsewhere, and may not have the package installed."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


if __name__ == "__main__":
    main()
