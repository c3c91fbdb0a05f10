"""How fast pictures come from tars, by how they are decoded, beside what a decoder's training step consumes."""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import describe
from benchmarks.report import give_out
from benchmarks.timing import Spread, in_turns, paired_ratio
from unclip.config import DataConfig, parse_config
from unclip.data import Batches, build_batches


def write_tars(folder: Path, shards: int, samples: int, edge: int) -> int:
    """Webdataset tars of JPEGs with the detail of photographs: smooth noise at several scales. Returns their bytes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(shard * samples, (shard + 1) * samples):
                picture = Image.new("RGB", (edge, edge))
                for scale in (4, 16, 64, edge):
                    layer = Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8))
                    weight = 0.5 if scale < edge else 0.1
                    picture = Image.blend(picture, layer.resize((edge, edge), Image.Resampling.BICUBIC), weight)
                stream = io.BytesIO()
                picture.save(stream, "JPEG", quality=90)
                for ending, content in (("jpg", stream.getvalue()), ("txt", f"picture {index}".encode())):
                    member = tarfile.TarInfo(f"{index:08d}.{ending}")
                    member.size = len(content)
                    total += len(content)
                    tar.addfile(member, io.BytesIO(content))
    return total


def loader(folder: Path, size: int, batch: int, workers: int) -> Batches:
    body = {"source": str(folder), "streaming": True, "image_size": size, "shuffle_buffer": 256, "workers": workers}
    return build_batches(parse_config(DataConfig, body), batch_size=batch)


def training_step(size: int, batch: int, device: torch.device) -> Any:
    """A step of the bundled model's decoder configuration on random pictures and embeddings."""
    from decoder import Decoder
    from decoder.config import DecoderConfig
    from decoder.objective import decoder_loss
    from unclip.bundle import BUNDLED, read_config, resolve_model
    from unclip.clip import TextFeatures
    from unclip.diffusion import GaussianDiffusion

    config = read_config(resolve_model(BUNDLED) / "decoder", "decoder", DecoderConfig)
    network = Decoder(config).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    process, generator = GaussianDiffusion(config.diffusion), torch.Generator(device).manual_seed(0)
    image = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    embedding = torch.nn.functional.normalize(torch.randn(batch, config.embedding_dim, device=device), dim=1)
    tokens = torch.randn(batch, config.text_length, config.token_dim, device=device)
    text = TextFeatures(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=device), embedding)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        decoder_loss(network, process, config, image, embedding, text, generator)["loss"].mean().backward()
        optimizer.step()

    return step


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks data-loading", description=__doc__)
    parser.add_argument("--edge", type=int, default=512, help="of the JPEGs in the tars, in pixels")
    parser.add_argument("--size", type=int, default=64, help="of the samples")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=16, help="read in a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of worker processes")
    parser.add_argument("--threads", type=int, help="of PyTorch, in the training step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        stored = write_tars(Path(folder), shards=8, samples=128, edge=options.edge)
        report = measure(Path(folder), options, device)
    report |= {"machine": describe(device), "bytes_an_image": stored // 1024, "edge": options.edge}
    give_out(report, to_text, options.json)


def measure(folder: Path, options: Any, device: torch.device) -> dict[str, Any]:
    """Images a second of each way to read, and of the training step, all taken in turns."""
    ways = {"threads": loader(folder, options.size, options.batch, 0)}
    ways |= {f"{n} processes": loader(folder, options.size, options.batch, n) for n in options.workers}
    works: dict[str, Any] = {}
    for name, batches in ways.items():
        next(batches)

        def read(batches: Batches = batches) -> None:
            for _ in range(options.batches):
                next(batches)

        works[name] = read
    works["training step"] = training_step(options.size, options.batch, device)
    # A loader goes on preparing a few batches while others are timed; against so many in a run that is little.
    seconds = in_turns(works, options.runs, device)
    images = {name: options.batch * (1 if name == "training step" else options.batches) for name in works}
    rates = {name: Spread.of([images[name] / one for one in times]) for name, times in seconds.items()}
    ratios = {}
    for name in ways:
        step = [one * options.batches for one in seconds["training step"]]
        ratios[name] = paired_ratio(step, seconds[name])
    return {
        "images_a_second": {name: vars(rate) for name, rate in rates.items()},
        "times_the_training_step": {name: vars(ratio) for name, ratio in ratios.items()},
        "size": options.size,
        "batch": options.batch,
        "runs": options.runs,
    }


def to_text(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, device {machine['device']}, load {machine['load'][0]}; "
        f"JPEGs of {report['edge']} px ({report['bytes_an_image'] / 1000:.0f} kB) to {report['size']} px, "
        f"{report['runs']} runs",
        "",
        "| | images/s | times what a training step consumes |",
        "|---|---|---|",
    ]
    for name, rate in report["images_a_second"].items():
        ratio = report["times_the_training_step"].get(name)
        told = "" if ratio is None else f"{ratio['median']:.1f} ({ratio['low']:.1f}–{ratio['high']:.1f})"
        lines.append(f"| {name} | {rate['median']:.0f} ({rate['low']:.0f}–{rate['high']:.0f}) | {told} |")
    return "\n".join(lines)
