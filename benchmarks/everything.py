"""All measurements of speed and memory in one report: one process each, one after the other, nothing installed.

A measurement that fails is named with its last line, and the others go on; peers that are absent are named too.
`digits` and `kills` are not among them: the one takes most of an hour, the other is a test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peer_dalle2, peer_diffusers
from benchmarks.machine import describe

ROOT = Path(__file__).parents[1]
# Title -> the command, at its usual size and at the smallest that still runs everything.
WORKS: dict[str, tuple[list[str], list[str]]] = {
    "networks": (["networks", "--size", "small"], ["networks", "--size", "tiny", "--runs", "1"]),
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="report.md and report.json go there")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), metavar="NAME",
                        help=f"some of: {', '.join(WORKS)}")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="only to see that each works; the figures mean nothing")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": describe(torch.device("cpu")), "absent": absent(), "parts": {}}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        report["parts"][name] = run(WORKS[name][1 if options.tiny else 0])
        # After every part, so that a run that is cut off leaves what it has measured.
        (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "report.md").write_text(to_markdown(report))
        print(f"{name}: {report['parts'][name]['seconds']:.0f} s", flush=True)
    print("\n" + to_markdown(report))
    if any(part["error"] for part in report["parts"].values()):
        sys.exit(1)


def absent() -> list[str]:
    """The peers that are not installed here."""
    here = {"diffusers": peer_diffusers.INSTALLED, "dalle2-pytorch": peer_dalle2.INSTALLED}
    return [name for name, installed in here.items() if not installed]


def run(command: list[str]) -> dict[str, Any]:
    """One measurement in a process of its own: what it prints, its figures where it writes them, or how it failed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        written = ["--json", str(file)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", *command, *written],
            capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
        )  # fmt: skip
        figures = json.loads(file.read_text()) if file.is_file() else None
    lines = done.stderr.strip().splitlines()
    return {
        "command": " ".join(["python -m benchmarks", *command]),
        "seconds": time.perf_counter() - started,
        "figures": figures,
        "text": done.stdout.strip(),
        "error": (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else None,
    }


def to_markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in machine["versions"].items())
    lines = [
        "# Benchmarks",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s), load {machine['load'][0]} "
        f"at the start; Python {machine['python']}, {versions}.",
    ]
    if report["absent"]:
        lines += ["", f"Not installed here, and left out: {', '.join(report['absent'])}."]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}", "", f"`{part['command']}`, {part['seconds']:.0f} s", ""]
        lines.append(f"Failed: {part['error']}" if part["error"] else part["text"])
    return "\n".join(lines) + "\n"
