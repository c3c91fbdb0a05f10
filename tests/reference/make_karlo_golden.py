"""What diffusers 0.37.1, the last release that loads a whole Karlo, makes of the tiny one of `helpers_karlo`.

Run it in an environment with that release, this package and transformers; the default suite reads its result alone:

    python -m venv d037 && d037/bin/pip install 'diffusers==0.37.1' 'transformers<6' torch open_clip_torch …
    PYTHONPATH=.:tests d037/bin/python tests/reference/make_karlo_golden.py

It also exports the converted model, loads that with the same release, and stops unless its pictures are the same to the
last bit. `--check` compares with the stored file and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from helpers_karlo import IMAGE, make_karlo, noise
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip.diffusion import SeededNoise
from unclip.diffusion.schedule import betas
from unclip.interop.export import TEXT, VARIATIONS, export_diffusers
from unclip.interop.karlo import DiffusersKarlo, write_bundle

RELEASE = "0.37.1"
FILE = Path(__file__).parents[1] / "data" / "karlo_golden.safetensors"
SIZE = 16
PROMPTS = ["a red apple on a table", "rainbow"]
SEEDS = [11, 12]
STEPS = {"prior": 5, "decoder": 5, "super_res": 4}
STRANGE = {"exclamation": "stop! go", "long": "one two three four five six seven eight nine ten " * 12}
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def picture() -> Tensor:
    """What is varied: (1, 3, S, S) in [-1, 1], of the image encoder's own size."""
    return noise(5, 1, 3, IMAGE["image_size"], IMAGE["image_size"]).clamp(-1, 1)


@contextmanager
def our_noise(pipe: Any, seeds: dict[str, Sequence[int]], caught: dict[str, Tensor]) -> Iterator[None]:
    """Every stage starts from, and every step adds, what our samplers draw for `seeds`; results of stages are kept."""
    import diffusers.schedulers.scheduling_unclip as module

    current: list[SeededNoise] = []
    schedulers = {id(getattr(pipe, f"{name}_scheduler")): name for name in seeds}

    def prepare(shape: Any, dtype: Any, device: Any, generator: Any, latents: Any, scheduler: Any) -> Tensor:
        current[:] = [SeededNoise(seeds[schedulers[id(scheduler)]])]
        return current[0].draw(shape[1:], device)

    def draw(shape: Any, **_: Any) -> Tensor:
        return current[0].draw(shape[1:])

    def keeping(name: str, step: Any) -> Any:
        def kept(*given: Any, **options: Any) -> Any:
            result = step(*given, **options)
            caught[name] = result.prev_sample.clone()
            return result

        return kept

    for name in seeds:
        scheduler = getattr(pipe, f"{name}_scheduler")
        scheduler.step = keeping(name, type(scheduler).step.__get__(scheduler))
    with patch.object(pipe, "prepare_latents", prepare), patch.object(module, "randn_tensor", draw):
        yield


def exact_tables(pipe: Any) -> None:
    """float64 in the place of the schedulers' float32 tables, where 1 − ᾱ_0 keeps three digits."""
    table = torch.from_numpy(betas("cosine", 1000))
    for name in ("prior", "decoder", "super_res"):
        scheduler = getattr(pipe, f"{name}_scheduler", None)
        if scheduler is not None:
            scheduler.betas, scheduler.alphas = table, 1 - table
            scheduler.alphas_cumprod = torch.cumprod(1 - table, 0)


def text_to_image(folder: Path, exact: bool) -> dict[str, Tensor]:
    from diffusers import UnCLIPPipeline

    pipe = UnCLIPPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if exact:
        exact_tables(pipe)
    caught: dict[str, Tensor] = {}
    # The prior's candidates have seeds of their own.
    seeds = {"prior": [seed * 1_000_003 for seed in SEEDS], "decoder": SEEDS, "super_res": SEEDS}
    with our_noise(pipe, seeds, caught):
        images = pipe(
            PROMPTS,
            prior_num_inference_steps=STEPS["prior"],
            decoder_num_inference_steps=STEPS["decoder"],
            super_res_num_inference_steps=STEPS["super_res"],
            output_type="np",
        ).images
    embedding = pipe.prior.post_process_latents(caught["prior"].float())
    small = caught["decoder"].float().clamp(-1, 1)
    return {"embedding": embedding, "small": small, "image": plain(images)}


def variations(folder: Path, exact: bool) -> dict[str, Tensor]:
    from diffusers import UnCLIPImageVariationPipeline

    pipe = UnCLIPImageVariationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if exact:
        exact_tables(pipe)
    seeds = {"decoder": SEEDS[:1], "super_res": SEEDS[:1]}
    pixels = ((picture() + 1) / 2 - _MEAN) / _STD
    caught: dict[str, Tensor] = {}
    with our_noise(pipe, seeds, caught):
        images = pipe(
            pixels,
            decoder_num_inference_steps=STEPS["decoder"],
            super_res_num_inference_steps=STEPS["super_res"],
            output_type="np",
        ).images
    with torch.no_grad():
        embedding = pipe.image_encoder(pixels).image_embeds
    small = caught["decoder"].float().clamp(-1, 1)
    return {"varied_embedding": embedding, "varied_small": small, "varied": plain(images)}


def plain(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().mul(2).sub(1).contiguous()


def captions(folder: Path) -> dict[str, Tensor]:
    """Ids, mask, token features and embedding of ordinary and strange prompts, and the default timesteps."""
    from diffusers import UnCLIPPipeline

    pipe = UnCLIPPipeline.from_pretrained(folder)
    found: dict[str, Tensor] = {}
    for name, prompts in {"plain": PROMPTS, **{name: [text] for name, text in STRANGE.items()}}.items():
        read = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = pipe.text_encoder(read.input_ids)
        mask = read.attention_mask.bool()
        found |= {f"{name}.ids": read.input_ids, f"{name}.mask": mask, f"{name}.embedding": output.text_embeds}
        if name == "plain":
            found["plain.tokens"] = output.last_hidden_state * mask[..., None]
    for name, steps in (("prior", 25), ("decoder", 25), ("super_res", 7)):
        scheduler = getattr(pipe, f"{name}_scheduler")
        scheduler.set_timesteps(steps)
        found[f"timesteps.{name}"] = scheduler.timesteps
    return found


def make() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        text, varied = make_karlo(root / "text", SIZE), make_karlo(root / "variations", SIZE, variations=True)
        found |= captions(text)
        for label, exact in (("", True), ("float32.", False)):
            results = {**text_to_image(text, exact), **variations(varied, exact)}
            found |= {label + name: tensor for name, tensor in results.items()}
        write_bundle(DiffusersKarlo([text, varied]), root / "bundle")
        for pipeline, run in ((TEXT, text_to_image), (VARIATIONS, variations)):
            export_diffusers(root / "bundle", root / pipeline, pipeline=pipeline)
            for name, tensor in run(root / pipeline, False).items():
                if not torch.equal(tensor, found[f"float32.{name}"]):
                    raise SystemExit(f"the exported {pipeline} gives another {name} in diffusers {RELEASE}")
            print(f"diffusers {RELEASE} loads and runs the exported {pipeline}: the same to the last bit")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main() -> None:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored file, write nothing")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    if diffusers.__version__ != RELEASE:
        raise SystemExit(f"this is diffusers {diffusers.__version__}; the golden values are of {RELEASE}")
    found = make()
    if options.check:
        stored = load_file(options.out)
        worst = max(float((stored[name].double() - found[name].double()).abs().max()) for name in stored)
        print(f"largest difference from {options.out}: {worst:.1e}")
        sys.exit(0 if set(stored) == set(found) and worst <= 1e-5 else 1)
    options.out.parent.mkdir(exist_ok=True)
    save_file(found, options.out, metadata={"diffusers": RELEASE})
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
