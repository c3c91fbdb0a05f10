"""A small unCLIP that has learned some drawn shapes, quickly: what personalisation is tried on."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_CLIP
from PIL import Image
from torch import Tensor, nn

from decoder import Decoder, DecoderConfig
from decoder.objective import decoder_loss
from prior import Prior, PriorConfig
from prior.objective import prior_loss
from unclip.bundle import save_part, write_json
from unclip.clip import FrozenCLIP, build_trainable, clip_loss, save_folder, write_vocabulary
from unclip.config import parse_config
from unclip.data.synthetic import RADII, Scene, Shape, render
from unclip.diffusion import GaussianDiffusion
from unclip.training.clip_config import ClipConfig

SIZE = 16
WIDTHS = {"embedding_dim": 16, "token_dim": 24, "text_length": 12}
COLOURS = ("red", "blue", "green", "yellow", "black")
KINDS = ("circle", "square", "cross", "diamond")


def drawing(colour: str, kind: str, right: float = 0.0, background: str = "white") -> Tensor:
    """A large shape a little `right` of the centre, (3, S, S) in [-1, 1]."""
    shape = Shape(colour, kind, "large", 0.5 + right, 0.5, 1.5 * RADII[1]["large"])
    pixels = torch.from_numpy(render(Scene((shape,), background, ""), SIZE))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def known(without: tuple[str, str] | None = None) -> tuple[Tensor, list[str]]:
    """All colours and kinds but one, each at three places, with captions."""
    pairs = [pair for pair in product(COLOURS, KINDS) if pair != without]
    places = (-0.04, 0.0, 0.04)
    images = [drawing(*pair, right=place) for pair in pairs for place in places]
    return torch.stack(images), [f"{colour} {kind}" for colour, kind in pairs for _ in places]


def fit_quickly(network: nn.Module, loss: Callable[[Tensor], Tensor], count: int, steps: int, lr: float) -> None:
    """AdamW over random batches of 16 of `count` samples."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, (0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(1)
    for _ in range(steps):
        value = loss(torch.randint(count, (16,), generator=order))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def make_system(root: Path, without: tuple[str, str], steps: tuple[int, int, int]) -> Path:
    """A bundle whose CLIP, prior and decoder have learned `known(without)`, in so many steps each."""
    images, captions = known(without)
    torch.manual_seed(0)
    clip = FrozenCLIP.load(str(_train_clip(root, images, captions, steps[0])))
    with torch.no_grad():
        embedding, text = clip.encode_image(images), clip.encode_text(captions)
    generator = torch.Generator().manual_seed(0)
    body: dict[str, Any] = {**WIDTHS, "width": 32, "depth": 2, "heads": 2, "steps": 4}
    body |= {"clip_range": 10.0, "normalisation": "standardise"}
    process = {"prediction": "x_start", "timestep_bias": 1.5}
    own = parse_config(PriorConfig, {**body, "diffusion": process})
    prior = Prior(own)
    prior.mean.copy_(embedding.mean(0))  # type: ignore[operator]
    prior.std.copy_(embedding.std(0))  # type: ignore[operator]
    diffusion = GaussianDiffusion(own.diffusion)
    fit_quickly(
        prior,
        lambda rows: prior_loss(prior, prior, diffusion, own, embedding[rows], text[rows], generator)["loss"].mean(),
        len(images), steps[1], 3e-3,
    )  # fmt: skip
    unet = {"channel_mult": [1], "num_res_blocks": 1, "model_channels": 32, "head_channels": 32}
    unet |= {"image_size": SIZE, "patch_size": 4, "attention_resolutions": [4]}
    shape: dict[str, Any] = {**WIDTHS, "context_dim": 16, "unet": unet, "steps": 6, "sampler": "ddim", "guidance": 1.0}
    shape |= {"spatial_seed": True, "embedding_noise": 0.2, "embedding_noise_shape": "data", "diffusion": process}
    config = parse_config(DecoderConfig, shape)
    decoder, steps_of = Decoder(config), GaussianDiffusion(config.diffusion)
    fit_quickly(
        decoder,
        lambda rows: decoder_loss(
            decoder, steps_of, config, images[rows], embedding[rows], text[rows], generator
        )["loss"].mean(),
        len(images), steps[2], 3e-3,
    )  # fmt: skip
    save_part(root / "bundle" / "prior", "prior", own, prior.state_dict())
    save_part(root / "bundle" / "decoder", "decoder", config, decoder.state_dict())
    parts = {"clip": "clip", "prior": "prior", "decoder": "decoder"}
    write_json(root / "bundle" / "unclip.json", {"format": 1, "name": "shapes", "version": "1", "parts": parts})
    return root / "bundle"


def _train_clip(root: Path, images: Tensor, captions: list[str], steps: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    model_config = parse_config(ClipConfig, TINY_CLIP).open_clip_config()
    vocabulary = root / model_config["text_cfg"]["tokenizer_kwargs"]["bpe_path"]
    write_vocabulary(vocabulary, TINY_CLIP["vocabulary_merges"])  # type: ignore[arg-type]
    model, tokenizer = build_trainable(model_config, root)
    every = 3  # one place each, so that no caption comes twice in a batch
    ids = tokenizer(captions[::every])

    def loss(rows: Tensor) -> Tensor:
        pictures = images[torch.arange(len(ids)) * every + rows[torch.arange(len(ids)) % len(rows)] % every]
        out: Any = model(pictures, ids)
        return clip_loss(out["image_features"], out["text_features"], out["logit_scale"])

    fit_quickly(model, loss, len(images), steps, 3e-3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    save_folder(root / "bundle" / "clip", model_config, state, vocabulary)
    return root / "bundle" / "clip"


def write_pictures(folder: Path, images: Tensor, captions: list[str]) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
