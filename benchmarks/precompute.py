"""Embedding a whole data set (`unclip embed --dataset`), beside the same CLIP on the same pictures already in memory.

What the first takes longer is reading, decoding, the captions and writing. Both run a ViT-B/32 with random weights on
as many pictures in batches of the same size.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_loading import write_tars
from benchmarks.machine import describe
from benchmarks.report import give_out
from benchmarks.timing import Spread, in_turns, paired_ratio
from unclip.clip import FrozenCLIP, architecture, build_architecture
from unclip.config import DataConfig, parse_config
from unclip.precompute import embed_dataset


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks precompute", description=__doc__)
    parser.add_argument("--clip", default="ViT-B-32", help="an architecture of open_clip")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--edge", type=int, default=256, help="of the JPEGs, in pixels")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options, device)
    give_out(report, to_text, options.json)


def measure(folder: Path, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images a second of both, in turns."""
    import open_clip

    machine = describe(device)
    torch.manual_seed(0)
    config = architecture(options.clip)
    if config is None:
        raise SystemExit(f"open_clip knows no architecture {options.clip!r}")
    clip = FrozenCLIP(build_architecture(config), open_clip.get_tokenizer(options.clip), options.clip).to(device)
    write_tars(folder / "tars", shards=2, samples=options.samples // 2, edge=options.edge)
    data = parse_config(DataConfig, {"source": str(folder / "tars"), "streaming": True, "image_size": clip.image_size})
    pictures = torch.rand(options.batch, 3, clip.image_size, clip.image_size, device=device) * 2 - 1
    captions = [f"picture {index}" for index in range(options.batch)]
    batches = options.samples // options.batch

    def whole() -> None:
        shutil.rmtree(folder / "stored", ignore_errors=True)
        embed_dataset(data, f"{options.clip} (random)", clip, folder / "stored", batch_size=options.batch)

    def bare() -> None:
        for _ in range(batches):
            clip.encode_image(pictures)
            clip.encode_text(captions)

    seconds = in_turns({"unclip embed --dataset": whole, "the CLIP alone": bare}, options.runs, device)
    images = {"unclip embed --dataset": options.samples, "the CLIP alone": batches * options.batch}
    rates = {name: Spread.of([images[name] / one for one in times]) for name, times in seconds.items()}
    return {
        "machine": machine,
        "images_a_second": {name: vars(rate) for name, rate in rates.items()},
        "share_of_the_clip_alone": vars(paired_ratio(seconds["the CLIP alone"], seconds["unclip embed --dataset"])),
        "clip": options.clip,
        "batch": options.batch,
        "samples": options.samples,
        "runs": options.runs,
    }


def to_text(report: dict[str, Any]) -> str:
    machine, share = report["machine"], report["share_of_the_clip_alone"]
    rows = report["images_a_second"].items()
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s), device "
        f"{machine['device']}, load {machine['load'][0]}; {report['clip']} (random), "
        f"{report['samples']} pictures in batches of {report['batch']}, {report['runs']} runs",
        "",
        "| | images/s |",
        "|---|---|",
        *(f"| {name} | {rate['median']:.1f} ({rate['low']:.1f}–{rate['high']:.1f}) |" for name, rate in rows),
        "",
        f"{share['median']:.0%} of the CLIP's own pace ({share['low']:.0%}–{share['high']:.0%})",
    ]
    return "\n".join(lines)
