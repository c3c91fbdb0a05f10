"""The three networks beside their peers, in one process and in turns.

For each: one forward pass, one training step (forward, backward, AdamW) and a whole sampling, against diffusers with
the same weights and against dalle2-pytorch at equal numbers of parameters. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import peer_dalle2, peer_diffusers, stage_decoder, stage_prior, stage_upsampler
from benchmarks.contest import Row, compete
from benchmarks.machine import describe
from benchmarks.report import to_json, to_markdown
from benchmarks.shapes import SIZES, PriorShape, UNetShape

STAGES = {
    "prior": stage_prior.contestants,
    "decoder": stage_decoder.contestants,
    "upsampler": stage_upsampler.contestants,
}


def _work(shape: PriorShape | UNetShape) -> str:
    """What a sampling is, in words."""
    guided = isinstance(shape, PriorShape) or shape.image <= 64
    told = f"batch {shape.batch}, sampling of {shape.steps} steps"
    return f"{told}, guidance {shape.guidance:g}" if guided else told


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks networks", description=__doc__)
    parser.add_argument("--stage", nargs="+", choices=sorted(STAGES), default=list(STAGES))
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--runs", type=int, default=5, help="rounds of every work")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile in the rows called defaults")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1:
        parser.error(f"--runs is {arguments.runs}; expected 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda asked for, and there is no CUDA device here")
    device = torch.device(arguments.device)
    machine = describe(device)  # before its own work adds to the load
    notes = [
        f"{name} is not installed and was left out"
        for name, here in (("diffusers", peer_diffusers.INSTALLED), ("dalle2-pytorch", peer_dalle2.INSTALLED))
        if not here
    ]
    rows: list[Row] = []
    peaks: list[float] = []
    for name in arguments.stage:
        contestants = STAGES[name](getattr(SIZES[arguments.size], name), device, arguments.compile)
        notes += [
            f"{name}: {contestants[0].parameters:,} parameters; {_work(getattr(SIZES[arguments.size], name))}",
            *(f"{name}: {note}" for one in contestants for note in one.notes),
        ]
        found, peak = compete(name, contestants, arguments.runs, device)
        rows += found
        peaks.append(peak)
        settings = {
            "size": arguments.size,
            "shapes": asdict(SIZES[arguments.size]),
            "runs": arguments.runs,
            "compiled": arguments.compile,
            "peak": max(peaks),
        }
        table = to_markdown(machine, settings, rows, notes)
        # After every stage, so that a run that is cut off leaves what it has measured.
        if arguments.markdown:
            arguments.markdown.write_text(table)
        if arguments.json:
            arguments.json.write_text(json.dumps(to_json(machine, settings, rows, notes), indent=1) + "\n")
        print(f"{name} done", flush=True)
    print("\n" + table)
