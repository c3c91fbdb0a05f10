"""Decoders that work in the latents of a frozen autoencoder: training, drawing, and what they refuse."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import SMALL, config, rand, text, unit
from helpers_latent import FIXED, latent_of, make_autoencoders
from torch import Tensor

from decoder import DecoderConfig, DecoderRunConfig, DecoderStage
from decoder.sampling import build_network
from decoder.train import run
from unclip.autoencoder import FrozenAutoencoder
from unclip.clip import FrozenCLIP
from unclip.config import parse_config
from unclip.errors import UnclipError, UsageError
from unclip.parts import check_fit
from unclip.pipeline import UnCLIP
from unclip.training import current

SIZE, FACTOR = 8, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Autoencoders of two levels: pictures of 16 px are latents of 8."""
    return make_autoencoders(tmp_path_factory.mktemp("autoencoders"))


def latent_stage(name: str) -> DecoderStage:
    own = config(latent=latent_of(name), diffusion=FIXED)
    torch.manual_seed(1)
    network = build_network(own)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return DecoderStage(network.requires_grad_(False), own)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_are_the_autoencoders_own(folders: dict[str, str], kind: str) -> None:
    frozen = FrozenAutoencoder.load(folders[kind]).train()
    assert not frozen.model.training and not any(p.requires_grad for p in frozen.parameters())
    images = rand(2, 3, 16, 16).clamp(-1, 1)
    found = frozen.encode(images)
    with torch.no_grad():
        theirs = frozen.model.encode(images)
        plain = theirs.latent_dist.mean if kind == "kl" else theirs.latents
        scale, shift = (0.5, 0.25) if kind == "kl" else (0.7, 0.0)
        torch.testing.assert_close(found, (plain - shift) * scale)
        torch.testing.assert_close(frozen.decode(found), frozen.model.decode(plain).sample.clamp(-1, 1))
    assert frozen.facts == (4 if kind == "kl" else 3, FACTOR, scale, shift)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_pictures_are_decoded_latents(folders: dict[str, str], kind: str) -> None:
    """The chain runs unclamped in latents; its end goes through the autoencoder once."""
    stage = latent_stage(folders[kind])
    assert stage.config.image_size == SIZE * FACTOR
    z, caption = unit(2), text(2)
    seen: list[Tensor] = []
    drawn = stage.sample(z, [3, 4], text=caption, callback=lambda _n, _t, x: seen.append(x))
    assert drawn.shape == (2, 3, 16, 16) and drawn.abs().max() <= 1
    assert seen[-1].shape == (2, stage.config.channels, SIZE, SIZE) and seen[-1].abs().max() > 1
    assert stage.autoencoder is not None
    torch.testing.assert_close(drawn, stage.autoencoder.decode(seen[-1]))
    own: list[Tensor] = []
    stage.sample(z[1:], [4], text=caption[torch.tensor([1])], callback=lambda _n, _t, x: own.append(x))
    # Of the latents: where codes lie close to each other, rounding decides which a quantising autoencoder takes.
    torch.testing.assert_close(own[-1][0], seen[-1][1], atol=1e-2, rtol=1e-3)  # of sizes around 100


def recipe(clip: str, name: str, folder: Path, size: int = 16, **latent: Any) -> DecoderRunConfig:
    model = {key: value for key, value in SMALL.items() if key not in ("embedding_dim", "token_dim", "text_length")}
    train = {"run_dir": str(folder), "steps": 3, "batch_size": 2, "log_every": 1, "wandb": {"mode": "disabled"}}
    body = {
        "clip": clip,
        "model": {**model, "latent": {"name": name, **latent}, "diffusion": FIXED},
        "data": {"source": "synthetic", "image_size": size, "synthetic": {"size": 8}},
        "train": train,
    }
    return parse_config(DecoderRunConfig, body)


@pytest.mark.filterwarnings("ignore:the prompt is longer than CLIP's 12 tokens")
def test_the_same_training_makes_a_bundles_part(
    folders: dict[str, str], tiny_clip_folder: Path, tmp_path: Path
) -> None:
    part = run(recipe(str(tiny_clip_folder), folders["kl"], tmp_path / "run"), current())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    stage = DecoderStage.load(part)
    latent = stage.config.latent
    assert latent is not None and (latent.channels, latent.factor, latent.scale, latent.shift) == (4, 2, 0.5, 0.25)
    model = UnCLIP(FrozenCLIP.load(str(tiny_clip_folder)), stage)
    assert model.sizes == (16,)
    image = model.decode(model.embed_text("a red circle").embedding, output="tensor")
    assert image.shape == (1, 3, 16, 16)
    check_fit(model.clip, stage)


def test_what_does_not_fit_has_a_sentence(
    folders: dict[str, str], tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="likelihood of pixels"):
        config(latent={"name": "x"}, diffusion={"variance": "learned_range"})
    with pytest.raises(UsageError, match="inpainting keeps pixels"):
        config(latent={"name": "x"}, diffusion=FIXED, inpainting=True)
    with pytest.raises(UsageError, match=r"data\.image_size is 32, and latents of 8 with 2 pixels a side"):
        run(recipe(str(tiny_clip_folder), folders["kl"], tmp_path / "run", size=32), current())
    stage = latent_stage(folders["kl"])
    assert stage.config.latent is not None
    other = stage.config.model_copy(update={"latent": stage.config.latent.model_copy(update={"scale": 0.9})})
    with pytest.raises(UnclipError, match="name the one that it was trained with"):
        DecoderStage(stage.network, other).sample(unit(1), [0])
    broken = tmp_path / "broken"
    shutil.copytree(folders["kl"], broken)
    weights = next(broken.glob("*.safetensors"))
    torch.save({"x": torch.ones(1)}, broken / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UnclipError, match="cannot be loaded"):
        FrozenAutoencoder.load(str(broken))
    body = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**body, "_class_name": "UNet2DModel"}))
    with pytest.raises(UnclipError, match="is a 'UNet2DModel', expected an AutoencoderKL or a VQModel"):
        FrozenAutoencoder.load(str(broken))
    (broken / "config.json").unlink()
    with pytest.raises(UnclipError, match=r"config\.json is missing"):
        FrozenAutoencoder.facts_of(str(broken))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UnclipError, match=r"pip install 'unclip\[latent\]'"):
        FrozenAutoencoder.load(folders["kl"])


def test_pixels_are_as_before() -> None:
    plain = parse_config(DecoderConfig, SMALL)
    assert (plain.channels, plain.image_size, plain.latent) == (3, SIZE, None)
