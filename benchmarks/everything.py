"""All measurements of speed and memory in one report: one process each, one after the other, nothing installed.

A measurement that fails or takes too long is named, and the others go on; peers that are absent are named too. What the
report of --out holds already is kept, so that a run goes on where it was stopped.
`digits` and `kills` are not among them: the one takes most of an hour, the other is a test.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peer_dalle2, peer_diffusers
from benchmarks.machine import describe
from benchmarks.timing import BUDGET, CUT

ROOT = Path(__file__).parents[1]
# Title -> the command, at its usual size and at the smallest that still runs everything.
WORKS: dict[str, tuple[list[str], list[str]]] = {
    **{
        f"networks, {stage}": (
            ["networks", "--stage", stage, "--size", "small"],
            ["networks", "--stage", stage, "--size", "tiny", "--runs", "1"],
        )
        for stage in ("prior", "decoder", "upsampler")
    },
    "memory of a training step": (["training-memory"], ["training-memory", "--size", "tiny", "--batch", "2"]),
    "batches of eight": (
        ["batches"], ["batches", "--runs", "1", "--size", "64", "--without-memory"],
    ),
    "cold start": (["cold-start"], ["cold-start", "--runs", "1", "--sizes", "64"]),
    "data loading": (
        ["data-loading"],
        ["data-loading", "--runs", "1", "--edge", "64", "--batches", "2", "--batch", "4", "--workers", "1"],
    ),
    "precompute": (
        ["precompute"], ["precompute", "--runs", "1", "--samples", "8", "--batch", "4", "--edge", "64"],
    ),
    "stored embeddings": (
        ["embeddings"],
        ["embeddings", "--runs", "1", "--samples", "8", "--batch", "2", "--width", "64", "--depth", "1"],
    ),
    "training loop, U-Net": (
        ["training-loop"],
        ["training-loop", "--channels", "16", "--size", "16", "--batch", "2", "--steps", "1", "--rounds", "2"],
    ),
    "training loop, prior": (
        ["training-loop", "--stage", "prior", "--batch", "64", "--steps", "2"],
        ["training-loop", "--stage", "prior", "--batch", "2", "--steps", "1", "--rounds", "2"],
    ),
}  # fmt: skip


# A row's process is ended after so many budgets: loading, counting and a first round are not in a round's time.
_PATIENCE = 3


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="report.md and report.json go there")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), metavar="NAME",
                        help=f"some of: {', '.join(WORKS)}")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="only to see that each works; the figures mean nothing")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="of each: no further round is begun after these (default: all rounds); after "
                        f"{_PATIENCE} times as many it is ended")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure anew what the report holds already")
    options = parser.parse_args(arguments)
    if options.budget is not None and options.budget <= 0:
        parser.error(f"--budget is {options.budget:g}; expected more than 0 seconds")
    kept = {} if options.again else read(options.out)
    report: dict[str, Any] = {"machine": describe(torch.device("cpu")), "absent": absent(), "parts": kept}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        command = WORKS[name][1 if options.tiny else 0]
        before = kept.get(name)
        if before is not None and not before["error"] and before["command"] == _shown(command):
            print(f"{name}: kept", flush=True)
            continue
        report["parts"][name] = run(command, options.budget)
        # After every part, so that a run that is cut off leaves what it has measured.
        _write(options.out / "report.json", json.dumps(report, indent=1) + "\n")
        _write(options.out / "report.md", to_markdown(report))
        print(f"{name}: {report['parts'][name]['seconds']:.0f} s", flush=True)
    print("\n" + to_markdown(report))
    if any(part["error"] for part in report["parts"].values()):
        sys.exit(1)


def read(folder: Path) -> dict[str, Any]:
    """The parts that a folder's report holds, in the order of WORKS."""
    file = folder / "report.json"
    if not file.is_file():
        return {}
    try:
        parts = json.loads(file.read_text())["parts"]
        return {name: parts[name] for name in WORKS if name in parts}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{file} is no report of these benchmarks; name another folder with --out") from error


def absent() -> list[str]:
    """The peers that are not installed here."""
    here = {"diffusers": peer_diffusers.INSTALLED, "dalle2-pytorch": peer_dalle2.INSTALLED}
    return [name for name, installed in here.items() if not installed]


def run(command: list[str], budget: float | None = None) -> dict[str, Any]:
    """One measurement in a process of its own: what it prints, its figures where it writes them, how it failed, and
    what the budget of seconds left out.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if budget is not None:
        environment[BUDGET] = str(budget)
    load, started = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", *command, "--json", str(file)], text=True, cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            out, err = process.communicate(timeout=None if budget is None else _PATIENCE * budget)
        except subprocess.TimeoutExpired:
            late = True
            _end(process)
            out, err = process.communicate()
        except BaseException:
            _end(process)
            raise
        figures = json.loads(file.read_text()) if file.is_file() else None
    lines = err.strip().splitlines()
    error = (lines[-1] if lines else f"exit code {process.returncode}") if process.returncode else None
    if late:
        error = f"ended after {_PATIENCE * budget:.0f} s, {_PATIENCE} times its budget" if budget is not None else None
    return {
        "command": _shown(command),
        "seconds": time.perf_counter() - started,
        "load": round(load, 1),
        "figures": figures,
        "text": out.strip(),
        "cut": [line.removeprefix(CUT) for line in lines if line.startswith(CUT)],
        "error": error,
    }


def _end(process: subprocess.Popen[str]) -> None:
    """The process and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def _shown(command: list[str]) -> str:
    return " ".join(["python -m benchmarks", *command])


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(text)
    temporary.replace(file)


def to_markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in machine["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s); "
        f"Python {machine['python']}, {versions}.",
    ]
    if report["absent"]:
        lines += ["", f"Not installed here, and left out: {', '.join(report['absent'])}."]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}", "", f"`{part['command']}`, {part['seconds']:.0f} s, load {part['load']} before", ""]
        lines.append(f"Failed: {part['error']}" if part["error"] else part["text"])
        lines += ["", *(f"- The budget cut this short: {line}" for line in part["cut"])] if part["cut"] else []
    return "\n".join(lines) + "\n"
