"""Peak memory of converting a Karlo, from diffusers' folders and from the published files, beside the weights' size.

    python -m benchmarks conversion

The weights are random, of Karlo's shape and about 190 million parameters (`--times 2`), and are written to a temporary
folder once: the folders of `UnCLIPPipeline`, each network in shards as the Hub has it, and from them the three `.ckpt`
files with the CLIP's statistics. Each conversion is a process of its own. Counted is the rise of its largest resident
set above what the imports took, which Linux alone lets be measured. Pages of the files that are mapped count as
resident, though the system may take them back at any time; what cannot be taken back is given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.karlo import build
from benchmarks.machine import describe
from benchmarks.report import give_out
from benchmarks.training_memory import RESET, status

LAYOUTS = ("diffusers", "original")
_NETWORKS = ("prior", "decoder", "super_res_first", "super_res_last")
_MEGABYTE = 2**20
_SHARD = 64 * _MEGABYTE
_EVERY = 0.005  # seconds between two looks at what is resident


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--times", type=int, default=2, help="as wide as the 50 million parameters of `karlo`")
    parser.add_argument("--dtype", choices=("as-is", "float16"), default="as-is", help="what the weights are stored in")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "CLIP", "OUT"), help=argparse.SUPPRESS)  # a row's process
    options = parser.parse_args(arguments)
    if options.times < 1:
        parser.error(f"--times is {options.times}; expected 1 or more")
    if not RESET.exists():
        parser.error("the peak of a process can be set back on Linux alone")
    if options.one:
        print(json.dumps(convert_one(*map(Path, options.one), options.dtype)))
        return
    with TemporaryDirectory() as scratch:
        give_out(measure(Path(scratch), options), to_text, options.json)


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A row a layout: megabytes of all weights, of the largest part and tensor, and how far the process rose."""
    machine = describe(torch.device("cpu"))
    build(root / "bundle", root / "diffusers", options.times)
    for name in _NETWORKS:
        into_shards(root / "diffusers" / name)
    if "original" in options.layout:
        write_original(root / "diffusers", root / "original")
    rows = []
    for layout in options.layout:
        out = root / f"{layout}-out"
        # The published files hold no CLIP; it is copied from the bundle there.
        clip = root / "bundle" / "clip" if layout == "original" else Path()
        row = _in_a_process(root / layout, clip, out, options.dtype)
        rows.append({"layout": layout, **sizes(root / "bundle", with_clip=layout == "diffusers"), **row})
    return {"machine": machine, "dtype": options.dtype, "times": options.times, "rows": rows}


def sizes(bundle: Path, with_clip: bool) -> dict[str, float]:
    """Megabytes of what is converted, in the type in which it is read."""
    from unclip.interop.tensors import read_tensors

    parts = {name: read_tensors(bundle / name) for name in ("prior", "decoder", "upsampler_256")}
    found = {name: sum(_megabytes(one) for one in part.values()) for name, part in parts.items()}
    if with_clip:
        found["clip"] = (bundle / "clip" / "open_clip_model.safetensors").stat().st_size / _MEGABYTE
    largest = max(_megabytes(one) for part in parts.values() for one in part.values())
    return {"weights": sum(found.values()), "part": max(found.values()), "tensor": largest}


def convert_one(folder: Path, clip: Path, out: Path, dtype: str) -> dict[str, float]:
    """In this process: megabytes that the imports left resident, and how far above that the conversion rose."""
    import open_clip  # noqa: F401
    import x_transformers  # noqa: F401
    from huggingface_hub import split_torch_state_dict_into_shards  # noqa: F401

    from unclip.interop.detect import convert
    from unclip.interop.karlo import ConvertOptions

    options = ConvertOptions(
        clip=None if clip == Path() else str(clip), dtype=torch.float16 if dtype == "float16" else None
    )
    RESET.write_text("5")  # proc(5): the largest resident set
    before, own = status("VmRSS"), status("RssAnon")
    with Watch() as watch:
        convert([folder], out, options)
    return {"imports": before, "rise": status("VmHWM") - before, "own": watch.largest - own}


class Watch:
    """The largest anonymous resident set while it is entered: what no file on the disk holds."""

    def __init__(self) -> None:
        self.largest, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_EVERY):
            self.largest = max(self.largest, status("RssAnon"))


def _in_a_process(folder: Path, clip: Path, out: Path, dtype: str) -> dict[str, float]:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "benchmarks", "conversion", "--dtype", dtype]
    command += ["--one", str(folder), str(clip), str(out)]
    # What is given back goes to the system at once, so that one part's memory is not the next one's.
    own = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, **own}, check=False)
    if done.returncode:
        sys.exit(f"converting {folder.name} failed: {done.stderr.strip()}")
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def _megabytes(tensor: Tensor) -> float:
    return tensor.numel() * tensor.element_size() / _MEGABYTE


def to_text(report: Mapping[str, Any]) -> str:
    lines = [
        f"{report['machine']['processor']}; stored {'as it is' if report['dtype'] == 'as-is' else report['dtype']}",
        "",
        "| layout | MB of weights | largest part | largest tensor | MB above the imports | of the weights | "
        "of the largest part | not mapped from files |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['layout']} | {row['weights']:.0f} | {row['part']:.0f} | {row['tensor']:.0f} | {row['rise']:.0f} | "
            f"**{row['rise'] / row['weights']:.2f}** | {row['rise'] / row['part']:.2f} | {row['own']:.0f} |"
        )
    return "\n".join(lines)


# ---- the published layouts ---------------------------------------------------------------------------------


def into_shards(folder: Path, largest: int = _SHARD) -> None:
    """A network's one file -> numbered shards and their index, as large repositories have them."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    file = folder / "diffusion_pytorch_model.safetensors"
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size=largest)


def write_original(folders: Path, out: Path) -> None:
    """A Karlo in diffusers' folders -> the files in which it was published, under their names."""
    from unclip.interop.tensors import read_tensors

    out.mkdir()
    state = read_tensors(folders / "prior")
    torch.save((state["clip_mean"][0], state["clip_std"][0]), out / "ViT-L-14_stats.th")
    _save(out / "prior-ckpt-step=01000000-of-01000000.ckpt", _original_prior(state))
    unet = _original_unet(folders / "decoder")
    _save(out / "decoder-ckpt-step=01000000-of-01000000.ckpt", unet | _original_projection(folders / "text_proj"))
    steps = {"super_res_first": "model_first_steps.", "super_res_last": "model_last_step."}
    both = {
        name.replace("model.", prefix, 1): tensor
        for network, prefix in steps.items()
        for name, tensor in _original_unet(folders / network).items()
    }
    _save(out / "improved-sr-ckpt-step=1.2M.ckpt", both)


def _save(file: Path, state: Mapping[str, Tensor]) -> None:
    torch.save({"state_dict": {name: tensor.clone() for name, tensor in state.items()}}, file)


def _original_prior(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from unclip.interop import karlo_original as original

    blocks = {name.split(".")[1] for name in theirs if name.startswith("transformer_blocks.")}
    found = {"model.positional_embedding": theirs["positional_embedding"], "model.prd_emb": theirs["prd_embedding"]}
    for kind in ("weight", "bias"):
        found |= {f"model.{ours}.{kind}": theirs[f"{there}.{kind}"] for ours, there in original.PRIOR.items()}
        for block in blocks:
            here, there = f"model.transformer.resblocks.{block}", f"transformer_blocks.{block}"
            found |= {
                f"{here}.{a}.{kind}": theirs[f"{there}.{b}.{kind}"] for a, b in original.PRIOR_BLOCK.items()
            }
            found[f"{here}.attn.c_qkv.{kind}"] = _interleaved(theirs, f"{there}.attn1", ("to_q", "to_k", "to_v"), kind)
    return found


def _original_projection(folder: Path) -> dict[str, Tensor]:
    from unclip.interop import karlo_original as original
    from unclip.interop.tensors import read_tensors

    theirs = read_tensors(folder)
    found = {"model.cf_param": theirs["learned_classifier_free_guidance_embeddings"]}
    for kind in ("weight", "bias"):
        found |= {f"model.{ours}.{kind}": theirs[f"{there}.{kind}"] for ours, there in original.PROJECTION.items()}
    return found


def _original_unet(folder: Path) -> dict[str, Tensor]:
    """guided-diffusion's names; attention is 1×1 convolutions there, query, key and value of a head together."""
    from unclip.bundle import read_json
    from unclip.interop import karlo_original as original
    from unclip.interop.tensors import read_tensors
    from unclip.interop.unet import modules_of, unet_config_from_diffusers

    theirs, config = read_tensors(folder), unet_config_from_diffusers(read_json(folder / "config.json"))
    attending = {ours for ours, _, sort in modules_of(config) if sort == "attention"}
    found: dict[str, Tensor] = {}
    for ours, there, sort in modules_of(config):
        attends = f"{ours.rsplit('.', 1)[0]}.attention" in attending
        here = f"model.{original.original_name(ours, attends)}"
        for kind in ("weight", "bias"):
            if sort == "plain":
                found[f"{here}.{kind}"] = theirs[f"{there}.{kind}"]
            elif sort == "residual":
                for a, b in original.RESIDUAL.items():
                    if f"{there}.{b}.{kind}" in theirs:
                        found[f"{here}.{a}.{kind}"] = theirs[f"{there}.{b}.{kind}"]
            else:
                own = _interleaved(theirs, there, ("to_q", "to_k", "to_v"), kind)
                context = _interleaved(theirs, there, ("add_k_proj", "add_v_proj"), kind)
                out = theirs[f"{there}.to_out.0.{kind}"]
                for name, tensor in (("qkv", own), ("encoder_kv", context), ("proj_out", out)):
                    found[f"{here}.{name}.{kind}"] = tensor[..., None] if kind == "weight" else tensor
                found[f"{here}.norm.{kind}"] = theirs[f"{there}.group_norm.{kind}"]
    return found


def _interleaved(theirs: Mapping[str, Tensor], there: str, names: tuple[str, ...], kind: str) -> Tensor:
    """Of each head of 64 rows first the queries, then the keys, …"""
    heads = [theirs[f"{there}.{name}.{kind}"].unflatten(0, (-1, 64)) for name in names]
    return torch.stack(heads, dim=1).flatten(0, 2)


if __name__ == "__main__":
    main(sys.argv[1:])
