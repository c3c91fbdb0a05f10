"""Memory of a training step, each implementation in a process of its own: ours, diffusers', dalle2-pytorch's.

A step is that of `networks`: forward, mean squared error, backward, AdamW in float32. Counted is what two of them add
to the network at their peak: gradients, moments of the optimizer and what the backward pass keeps. On the CPU it is the
rise of the largest resident set, which Linux alone lets be measured; with CUDA the peak of the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.networks import STAGES
from benchmarks.report import give_out
from benchmarks.shapes import SIZES

NAMES = ("unclip, eager float32", "diffusers", "dalle2-pytorch")
RESET = Path("/proc/self/clear_refs")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training-memory", description=__doc__)
    parser.add_argument("--stage", nargs="+", choices=sorted(STAGES), default=list(STAGES))
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)  # one figure's process
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch is {options.batch}; expected 1 or more")
    if options.device == "cpu" and not RESET.exists():
        parser.error("the peak of a process can be set back on Linux alone; use --device cuda")
    if options.one:
        print(json.dumps(step_memory(options.stage[0], options.one, options)))
        return
    report = measure(options)
    give_out(report, to_text, options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A row a stage and implementation: megabytes of the network, and what a step adds; peers that are absent lack."""
    machine = describe(torch.device(options.device))
    rows = [row for stage in options.stage for name in NAMES if (row := _in_a_process(stage, name, options))]
    return {"machine": machine, "size": options.size, "batch": options.batch, "rows": rows}


def step_memory(stage: str, name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """In this process: what two training steps add at their peak; None where the implementation is not installed."""
    device = torch.device(options.device)
    shape = dataclasses.replace(getattr(SIZES[options.size], stage), batch=options.batch)
    found = {one.name: one for one in STAGES[stage](shape, device, False)}
    if name not in found:
        return None
    parameters, step = found[name].parameters, found[name].works["training step"]
    found.clear()  # the others' weights
    gc.collect()
    before = _mark(device)
    for _ in range(2):  # the second meets the moments that the first has made
        step()
    return {"stage": stage, "name": name, "parameters": parameters, "megabytes": _peak(device) - before}


def _in_a_process(stage: str, name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "benchmarks", "training-memory", "--stage", stage, "--one", name]
    command += ["--size", options.size, "--batch", str(options.batch), "--device", options.device]
    # What is given back goes to the system at once, so that a step cannot hide in what building has left.
    own = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, **own}, check=False
    )
    if done.returncode:
        sys.exit(f"measuring the memory of {name}, {stage}, failed: {done.stderr.strip()}")
    row: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    return row


def _mark(device: torch.device) -> float:
    """Set the peak back to what is in use; gives that in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    RESET.write_text("5")  # proc(5): the largest resident set
    return status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return status("VmHWM")


def status(key: str) -> float:
    """A line of Linux' /proc/self/status that is given in kB, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def to_text(report: dict[str, Any]) -> str:
    machine = report["machine"]
    ours = {row["stage"]: row["megabytes"] for row in report["rows"] if row["name"] == NAMES[0]}
    lines = [
        f"{machine['processor']}, device {machine['device']}; size {report['size']}, batch {report['batch']}, float32",
        "",
        "| stage | | parameters | MB that a training step adds | of that ours takes |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        share = "" if row["name"] == NAMES[0] else f"**{ours[row['stage']] / row['megabytes']:.0%}**"
        lines.append(
            f"| {row['stage']} | {row['name']} | {row['parameters']:,} | {row['megabytes']:.0f} | {share} |"
        )
    return "\n".join(lines)
