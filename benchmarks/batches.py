"""How much less eight pictures drawn together cost than eight times one, stage by stage, and the memory each takes.

Both draw with the model's own steps and guidance and the same weights; the batch of eight does eight times the work in
floating-point operations, which is counted. Memory is the largest resident set of a new process that draws once, less
that of one that only loads the model; with CUDA the device's peak.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.report import give_out
from benchmarks.timing import Spread, count_flops, in_turns, paired_ratio
from unclip.pipeline import UnCLIP

BATCH = 8
PROMPT = "pizza"


def works(model: UnCLIP) -> dict[str, Callable[[int], Any]]:
    """Stage -> what draws so many samples with it."""
    text = model.embed_text([PROMPT] * BATCH)
    generator = torch.Generator().manual_seed(0)
    embedding = text.embedding
    found: dict[str, Callable[[int], Any]] = {}
    prior = model.prior
    if prior is not None:
        found["prior"] = lambda count: prior.sample(text[:count], range(count))
    found["decoder"] = lambda count: model.decoder.sample(embedding[:count], range(count), text=text[:count])
    for stage in model.upsamplers:
        low = torch.rand(BATCH, 3, stage.config.low_size, stage.config.low_size, generator=generator) * 2 - 1
        low = low.to(model.device)

        def enlarge(count: int, stage: Any = stage, low: Any = low) -> Any:
            return stage.sample(low[:count], range(count))

        found[f"upsampler {stage.config.high_size}"] = enlarge
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks batches", description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--size", type=int, help="largest edge (default: the model's)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--without-memory", action="store_true", help="which takes a new process for each figure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", nargs=2, metavar=("STAGE", "COUNT"), help=argparse.SUPPRESS)  # one figure's process
    options = parser.parse_args(arguments)
    if options.draw:
        _draw_once(options, options.draw[0], int(options.draw[1]))
        return
    report = measure(options)
    give_out(report, to_text, options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of 1 and of 8 in turns, their ratio round by round, operations and memory."""
    device = torch.device(options.device)
    machine = describe(device)
    model = UnCLIP.from_pretrained(options.model, device=device, size=options.size)
    rows = []
    for stage, draw in works(model).items():
        one, eight = partial(draw, 1), partial(draw, BATCH)
        flops = {1: count_flops(one)[1], BATCH: count_flops(eight)[1]}  # which warms both up
        seconds = in_turns({"one": one, "eight": eight}, options.runs, device, warm_up=0)
        row = {
            "stage": stage,
            "one": vars(Spread.of(seconds["one"])),
            "eight": vars(Spread.of(seconds["eight"])),
            "ratio": vars(paired_ratio(seconds["eight"], seconds["one"])),
            "flops": flops,
        }
        rows.append(row)
    if not options.without_memory:
        base = _peak(options, "none", 1)
        for row in rows:
            row["megabytes"] = {count: _peak(options, str(row["stage"]), count) - base for count in (1, BATCH)}
        machine["loaded_megabytes"] = base
    return {"machine": machine, "model": model.name, "runs": options.runs, "rows": rows}


def _draw_once(options: argparse.Namespace, stage: str, count: int) -> None:
    """In a process of its own: draw once, and print the peak of its memory in MB."""
    import resource

    device = torch.device(options.device)
    model = UnCLIP.from_pretrained(options.model, device=device, size=options.size)
    draw = works(model).get(stage)
    if draw is not None:
        draw(count)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device) / 2**20)
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (2**20 if sys.platform == "darwin" else 2**10))


def _peak(options: argparse.Namespace, stage: str, count: int) -> float:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "benchmarks", "batches", "--model", options.model, "--device", options.device]
    command += ["--size", str(options.size)] if options.size else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "--draw", stage, str(count)], capture_output=True, text=True, cwd=root, env=environment, check=False
    )
    if done.returncode:
        sys.exit(f"measuring the memory of {stage} failed: {done.stderr.strip()}")
    return float(done.stdout.split()[-1])


def to_text(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s), device "
        f"{machine['device']}, load {machine['load'][0]}; model {report['model']}, {report['runs']} runs",
        "",
        "| stage | s, one | s, eight | eight over one | GFLOP, one | eight | MB, one | eight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ratio, memory = row["ratio"], row.get("megabytes", {})
        told = [f"{memory[count]:.0f}" if memory else "—" for count in (1, BATCH)]
        lines.append(
            f"| {row['stage']} | {row['one']['median']:.3g} | {row['eight']['median']:.3g} | "
            f"**{ratio['median']:.2f}** ({ratio['low']:.2f}–{ratio['high']:.2f}) | {row['flops'][1] / 1e9:.3g} | "
            f"{row['flops'][BATCH] / 1e9:.3g} | {' | '.join(told)} |"
        )
    return "\n".join(lines)
