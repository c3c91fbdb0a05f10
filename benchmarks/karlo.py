"""A whole Karlo of about 50 million parameters: text to 256 px, ours beside diffusers' UnCLIPPipeline 0.37.1.

    python -m benchmarks karlo --peer d037/bin/python

`--peer` is a Python that has diffusers 0.37.1 and transformers; without it ours is timed alone. Each side is a process
of its own, which holds its model and draws when it is told, so that they take turns; the same weights (exported by
unclip.interop.export), steps, guidance and noise. Peak memory is each process' own, loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

RELEASE = "0.37.1"
PROMPT, SEED = "a red apple on a wooden table", 3
DIM = 256
FAST: dict[str, Any] = {"prior_steps": 8, "decoder_steps": 8, "upsampler_steps": 3, "sampler": "dpmpp_2m"}
"""Fewer steps of a better solver: 8 + 8 + 3 in the place of 25 + 25 + 7."""


def build(folder: Path, out: Path, times: int = 1) -> int:
    """A bundle of random networks of Karlo's shape at `folder`, and its export at `out`; returns the parameters.
    `times` as wide, and so about the square of it as large.
    """
    import torch

    from decoder import Decoder, DecoderConfig
    from prior import Prior, PriorConfig
    from unclip.bundle import save_part, write_json
    from unclip.clip import FrozenCLIP, build_architecture
    from unclip.config import parse_config
    from unclip.interop.clip_part import preprocessing, write_clip
    from unclip.interop.export import export_diffusers
    from upsamplers import Upsampler, UpsamplerConfig

    torch.manual_seed(0)
    folder.mkdir()
    clip = {
        "embed_dim": DIM,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": DIM, "heads": 4, "layers": 4},
    }
    state = {name: tensor.detach() for name, tensor in build_architecture(clip).state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    write_clip(folder / "clip", clip, state, None, preprocessing(None, 32))
    null = FrozenCLIP.load(str(folder / "clip")).encode_text([""])
    shared = {"embedding_dim": DIM, "token_dim": DIM, "embedding_length": "raw", "null_text": "clip"}
    unet = {"channel_mult": [1, 2, 3, 4], "num_res_blocks": 2}
    prior = Prior(
        parse_config(
            PriorConfig,
            {
                **shared, "width": 384 * times, "depth": 6, "heads": 6 * times,
                "attention_bias": True, "norm_bias": True, "clip_range": 5.0, "steps": 25,
                "guidance": 4.0, "candidates": 1,
            },
        )
    )  # fmt: skip
    decoder = Decoder(
        parse_config(
            DecoderConfig,
            {
                **shared, "context_dim": 384, "image_tokens_first": True, "image_tokens_interleaved": True,
                "text_embedding_to_time": True, "steps": 25, "guidance": 8.0,
                "unet": {**unet, "image_size": 64, "model_channels": 64 * times, "head_channels": 64,
                         "attention_resolutions": [32, 16, 8]},
            },
        )
    )  # fmt: skip
    upsampler = Upsampler(
        parse_config(
            UpsamplerConfig,
            {
                "unet": {**unet, "image_size": 256, "model_channels": 32 * times, "scale_shift_norm": False},
                "corruption": {"kind": "none"}, "last_step_network": True, "clamp_condition": False,
                "steps": 7, "sampler": "ddpm", "eta": 1.0,
            },
        )
    )  # fmt: skip
    prior.store_null(null, "raw")
    decoder.set_null_text(null)
    parts = {"prior": ("prior", prior), "decoder": ("decoder", decoder), "upsampler_256": ("upsampler", upsampler)}
    count = sum(tensor.numel() for tensor in state.values())
    for name, (kind, network) in parts.items():
        with torch.no_grad():
            for parameter in network.parameters():  # zero-initialised layers would leave work out of the comparison
                parameter.add_(0.005 * torch.randn_like(parameter))
                count += parameter.numel()
        save_part(folder / name, kind, network.config, network.state_dict())  # type: ignore[attr-defined]
    write_json(folder / "unclip.json", {"format": 1, "parts": {name: name for name in ("clip", *parts)}})
    export_diffusers(folder, out)
    return count


def serve(side: str, folder: Path) -> None:
    """Load, say so, and draw once for every line that comes; answers are JSON, a line each."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    draw = _theirs(folder) if side == "theirs" else _ours(folder, side == "fast")
    print("ready", flush=True)
    for line in sys.stdin:
        start, worked = time.perf_counter(), time.process_time()
        picture = draw()
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        torch.save(picture, line.strip())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "cpu": worked, "peak": peak}), flush=True)


def _ours(folder: Path, fast: bool) -> Any:
    from unclip import UnCLIP

    model = UnCLIP.from_pretrained(folder)
    options = FAST if fast else {}
    return lambda: model.sample(PROMPT, seed=SEED, output="tensor", **options)


def _theirs(folder: Path) -> Any:
    """Their pipeline on our noise: each stage starts and goes on with what our samplers draw."""
    import diffusers.schedulers.scheduling_unclip as module
    import torch
    from diffusers import UnCLIPPipeline

    pipe = UnCLIPPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators: list[Any] = []

    def prepare(shape: Any, dtype: Any, device: Any, generator: Any, latents: Any, scheduler: Any) -> Any:
        seed = SEED * 1_000_003 if scheduler is pipe.prior_scheduler else SEED
        generators[:] = [torch.Generator().manual_seed(seed)]
        return torch.randn(*shape[1:], generator=generators[0])[None]

    pipe.prepare_latents = prepare
    module.randn_tensor = lambda shape, **_: torch.randn(*shape[1:], generator=generators[0])[None]

    def draw() -> Any:
        images = pipe(PROMPT, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1

    return draw


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help=f"a Python with diffusers {RELEASE}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]))
        return
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        count = build(root / "bundle", root / "diffusers")
        print(f"{count / 1e6:.1f} million parameters, steps 25 + 25 + 7, guidance 4 and 8, {options.rounds} rounds")
        sides = {"ours": (sys.executable, root / "bundle"), "fast": (sys.executable, root / "bundle")}
        if options.peer and _has_release(options.peer):
            sides["theirs"] = (options.peer, root / "diffusers")
        else:
            print(f"no Python with diffusers {RELEASE} (--peer); it is left out")
        _report(_compete(sides, options.rounds, root), root)


def _has_release(python: str) -> bool:
    asked = [python, "-c", "import diffusers; print(diffusers.__version__)"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip().endswith(RELEASE)


def _compete(sides: dict[str, tuple[str, Path]], rounds: int, root: Path) -> dict[str, list[dict[str, float]]]:
    """Every side once a round, after one round that does not count."""
    processes = {}
    for side, (python, folder) in sides.items():
        command = [python, "-m", "benchmarks.karlo", "--serve", side, str(folder)]
        pipe = subprocess.PIPE
        processes[side] = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    try:
        for side, process in processes.items():
            if not any(line.strip() == "ready" for line in iter(process.stdout.readline, "")):  # type: ignore[union-attr]
                raise SystemExit(f"{side} could not be loaded")
        for number in range(rounds + 1):
            order = list(processes) if number % 2 else list(processes)[::-1]
            for side in order:
                process = processes[side]
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(f"{root / side}.pt\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                if number:
                    found[side].append(answer)
                told = f"{answer['seconds']:.2f} s, {answer['cpu']:.2f} s of CPU, peak {answer['peak']:.0f} MiB"
                print(f"round {number} {side}: {told}", file=sys.stderr, flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return found


def _report(found: dict[str, list[dict[str, float]]], root: Path) -> None:
    import torch

    for side, answers in found.items():
        seconds = median(one["seconds"] for one in answers)
        text = f"{side}: {seconds:.2f} s, peak {max(one['peak'] for one in answers):.0f} MiB"
        if side != "theirs" and "theirs" in found:
            for kind, name in (("seconds", "times as fast"), ("cpu", "by CPU time, where other work runs beside it")):
                pairs = zip(found["theirs"], answers, strict=True)
                text += f", {median(their[kind] / own[kind] for their, own in pairs):.2f} {name}"
        print(text)
    if "theirs" in found:
        difference = (torch.load(root / "ours.pt") - torch.load(root / "theirs.pt")).abs()
        print(f"difference of the pictures: median {difference.median():.1e}, largest {difference.max():.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
