"""A prior's training step from stored embeddings, beside the same with the CLIP in the loop.

The CLIP is a ViT-B/32 with random weights: what it costs does not depend on what it has learned. Nothing is cached in
its way: every batch is embedded, as on a data set that is larger than memory. Both read the same samples from disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.data_loading import write_tars
from benchmarks.machine import describe
from benchmarks.report import give_out
from benchmarks.timing import Spread, in_turns, paired_ratio
from prior.config import PriorConfig
from prior.network import Prior
from prior.objective import prior_loss
from unclip.clip import FrozenCLIP, architecture, build_architecture
from unclip.config import DataConfig, parse_config
from unclip.data import build_batches
from unclip.data.embeddings import describe_embeddings
from unclip.diffusion import GaussianDiffusion
from unclip.precompute import embed_dataset
from unclip.training import EmbeddingMemo

CLIP = "ViT-B-32"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks embeddings", description=__doc__)
    parser.add_argument("--width", type=int, default=256, help="of the prior")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options, device)
    report["machine"] = describe(device)
    give_out(report, to_text, options.json)


def measure(folder: Path, options: Any, device: torch.device) -> dict[str, Any]:
    """Seconds of a step each way, in turns."""
    import open_clip

    torch.manual_seed(0)
    config = architecture(CLIP)
    assert config is not None
    clip = FrozenCLIP(build_architecture(config), open_clip.get_tokenizer(CLIP), CLIP).to(device)
    write_tars(folder / "tars", shards=2, samples=options.samples // 2, edge=256)
    images = parse_config(
        DataConfig, {"source": str(folder / "tars"), "streaming": True, "image_size": clip.image_size}
    )
    embed_dataset(images, f"{CLIP} (random)", clip, folder / "stored")
    stored = parse_config(DataConfig, {"source": str(folder / "stored"), "image_size": clip.image_size})
    model = PriorConfig(
        embedding_dim=clip.embedding_dim,
        token_dim=clip.token_dim,
        text_length=clip.context_length,
        width=options.width,
        depth=options.depth,
        heads=options.width // 64,
    )
    works = {
        "stored embeddings": stepper(model, EmbeddingMemo(None, 0, stored=describe_embeddings(stored), device=device),
                                     stored, options.batch),
        "CLIP in the loop": stepper(model, EmbeddingMemo(clip, 0), images, options.batch),
    }  # fmt: skip
    seconds = in_turns(works, options.runs, device)
    return {
        "seconds": {name: vars(Spread.of(times)) for name, times in seconds.items()},
        "times_as_fast": vars(paired_ratio(seconds["CLIP in the loop"], seconds["stored embeddings"])),
        "prior": {
            "width": options.width,
            "depth": options.depth,
            "parameters": sum(parameter.numel() for parameter in Prior(model).parameters()),
        },
        "batch": options.batch,
        "runs": options.runs,
    }


def stepper(model: PriorConfig, memo: EmbeddingMemo, data: DataConfig, batch: int) -> Any:
    """A whole training step: read, embed or look up, forward, backward, AdamW."""
    torch.manual_seed(0)
    network = Prior(model).to(memo.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    process, generator = GaussianDiffusion(model.diffusion), torch.Generator(memo.device).manual_seed(0)
    batches = build_batches(data, batch_size=batch)

    def step() -> None:
        drawn = next(batches)
        optimizer.zero_grad(set_to_none=True)
        losses = prior_loss(
            network, network, process, model, memo.image_of(drawn), memo.text_of(drawn), generator
        )
        losses["loss"].mean().backward()
        optimizer.step()

    return step


def to_text(report: dict[str, Any]) -> str:
    machine, prior, ratio = report["machine"], report["prior"], report["times_as_fast"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, device {machine['device']}, "
        f"load {machine['load'][0]}; prior of {prior['parameters'] / 1e6:.1f} M parameters, {CLIP} (random), "
        f"batch {report['batch']}, {report['runs']} runs",
        "",
        "| | seconds a step |",
        "|---|---|",
        *(f"| {name} | {s['median']:.3f} ({s['low']:.3f}–{s['high']:.3f}) |" for name, s in report["seconds"].items()),
        "",
        f"{ratio['median']:.1f} times as fast from stored embeddings ({ratio['low']:.1f}–{ratio['high']:.1f})",
    ]
    return "\n".join(lines)
