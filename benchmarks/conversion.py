"""Peak memory of `unclip convert` beside the size of the weights that it converts.

    python -m benchmarks conversion

converts a Karlo of random weights and about 50 million parameters, in diffusers' layout; `--folder DIR` takes another
one. Each is a process of its own: the conversion, and the same program that imports all of it and converts nothing. A
process' peak counts the pages of files that it has mapped, as far as they were in memory at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

_IMPORTS = "import torch, safetensors.torch, unclip.cli, unclip.pipeline, unclip.interop.detect, open_clip"


def peak_of(command: list[str]) -> float:
    """Most memory in MiB that a command has had resident. SystemExit: it failed."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks conversion", description=__doc__)
    parser.add_argument("--folder", type=Path, help="a checkpoint to convert, in the place of random weights")
    asked = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        source: Path | None = asked.folder
        if source is None:
            source = Path(scratch) / "diffusers"
            # In a process of its own, whose memory would otherwise be inherited.
            building = f"build(Path({scratch!r}) / 'bundle', Path({str(source)!r}))"
            program = f"from pathlib import Path; from benchmarks.karlo import build; {building}"
            subprocess.run([sys.executable, "-c", program], check=True)
        files = {str(file.relative_to(source)): file.stat().st_size for file in source.rglob("*.safetensors")}
        sizes: dict[str, float] = {}
        for name, size in files.items():
            folder = name.partition("/")[0]
            sizes[folder] = sizes.get(folder, 0.0) + size / 2**20
        out = Path(scratch) / "converted"
        before = peak_of(["-c", _IMPORTS])
        peak = peak_of(["-m", "unclip", "convert", str(source), "--out", str(out), "--quiet"])
    total = sum(sizes.values())
    told = ", ".join(f"{name} {size:.0f}" for name, size in sorted(sizes.items(), key=lambda one: -one[1]))
    print(f"weights {total:.0f} MiB ({told})")
    print(f"peak of unclip convert {peak:.0f} MiB; imports alone {before:.0f} MiB")
    print(f"so the conversion adds {peak - before:.0f} MiB, {(peak - before) / total:.2f} times the weights")
