"""Values that cannot be meant, and sizes that do not go together: one sentence, before anything loads or is written."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_training import refused_before_loading

from decoder.config import DecoderConfig, DecoderRunConfig
from decoder.start import read_shape, with_start
from decoder.train import run as run_decoder
from prior.config import PriorConfig, PriorRunConfig
from unclip.config import Config, DataConfig, TrainConfig, load_config, parse_config
from unclip.data.embeddings import check_pixels
from unclip.errors import UsageError
from unclip.nn import UNetConfig
from unclip.training import Distributed, main_for
from unclip.training.clip import run as run_clip
from unclip.training.clip_config import ClipRunConfig
from upsamplers.config import UpsamplerRunConfig

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES: dict[str, tuple[type[Config], str]] = {
    "clip": (ClipRunConfig, "clip/synthetic.yaml"),
    "prior": (PriorRunConfig, "prior/synthetic.yaml"),
    "decoder": (DecoderRunConfig, "decoder/synthetic_64.yaml"),
    "upsampler": (UpsamplerRunConfig, "upsampler/synthetic_64_to_256.yaml"),
}


def load(stage: str, *overrides: str) -> Any:
    config_cls, recipe = RECIPES[stage]
    return load_config(config_cls, CONFIGS / recipe, list(overrides))


@pytest.mark.parametrize(("stage", "overrides", "message"), [
    ("upsampler", ["model.unet.channel_mult=[]"], r"model\.unet\.channel_mult: .*at least 1"),
    ("upsampler", ["model.unet.model_channels=15"], r"model\.unet\.model_channels: .*multiple of 2 \(got 15\)"),
    ("upsampler", ["model.unet={kind: efficient, model_channels: 15}"], r"model_channels: .*multiple of 2 \(got 15\)"),
    ("upsampler", ["model.unet.num_res_blocks=-1"], r"num_res_blocks must be 0 or more"),
    ("upsampler", ["train.optimizer.betas=[1,1]"], r"train\.optimizer\.betas\.0: .*less than 1 \(got 1\)"),
    ("upsampler", ["train.optimizer.betas=[0.9,1.5]"], r"train\.optimizer\.betas\.1: .*less than 1 \(got 1\.5\)"),
    ("upsampler", ["train.optimizer.betas=[-0.1,0.9]"], r"train\.optimizer\.betas\.0: .*\(got -0\.1\)"),
    ("upsampler", ["train.seed=18446744073709551616"], r"train\.seed: .*10000000000000 \(got 18446744073709551616\)"),
    ("upsampler", ["train.guard.timeout_minutes=1e300"], r"train\.guard\.timeout_minutes: .*525600 \(got 1e\+300\)"),
    ("upsampler", ["model.steps=1001", "model.lowest_timestep=0"], "1001 sampling steps asked for; the process has"),
    ("upsampler", ["model.steps=990", "model.lowest_timestep=20"], "990 steps from timestep 20 up do not fit"),
    ("decoder", ["model.steps=1001"], "1001 sampling steps asked for; the process has 1000"),
    ("decoder", ["model.steps=[0,1000]"], "the timestep 1000 does not exist; the process has 0 to 999"),
    ("prior", ["model.steps=5000"], "5000 sampling steps asked for; the process has 1000"),
    ("prior", ["model.diffusion.timesteps=20", "model.steps=ddim21"], "21 sampling steps asked for"),
    ("decoder", ["data.image_size=32"], r"data\.image_size is 32, expected model\.unet\.image_size 64"),
    ("decoder", ["model.unet.image_size=32"], r"data\.image_size is 64, expected model\.unet\.image_size 32"),
    ("decoder", ["data.crop_size=32"], r"data\.crop_size is 32, and a decoder draws whole pictures"),
    ("decoder", ["data.image_size=96", "data.crop_size=64"], r"data\.crop_size is 64, and a decoder draws whole"),
    ("decoder", ["data.image_size=32", "data.sources=[{source: synthetic}, {source: there}]"], "data.image_size is 32"),
    ("decoder", ["model.unet.image_size=60", "data.image_size=60"], r"unet\.image_size 60 is not divisible by 16"),
    ("clip", ["model.text.heads=5"], r"model\.text: heads 5 does not divide width 64"),
    ("clip", ["model.vision.width=65"], r"model\.vision: heads 2 does not divide width 65"),
    ("clip", ["model.patch_size=65"], "patch_size 65 is larger than image_size 64"),
    ("clip", ["data.image_size=32"], r"data\.image_size is 32, expected model\.image_size 64"),
    ("clip", ["data.crop_size=32"], r"data\.crop_size is 32, expected model\.image_size 64"),
    ("clip", ["train.batch_size=1"], "a CLIP learns by telling the pictures of a batch apart"),
    ("clip", ["train.batch_size=4", "train.accumulation=4"], "a CLIP learns by telling the pictures of a batch apart"),
])  # fmt: skip
def test_one_sentence(stage: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(stage, *overrides)
    assert "\n" not in str(caught.value)


def test_the_bounds_themselves_are_possible() -> None:
    load("upsampler", "model.unet.model_channels=16", "train.optimizer.betas=[0,0.9999]", "model.steps=940")
    load("decoder", "model.steps=1000", "data.crop_size=64")
    load("clip", "train.batch_size=2", "data.image_size=72", "data.crop_size=64")
    train = load("prior", "model.steps=1000", f"train.seed={10**13}", "train.guard.timeout_minutes=525600").train
    torch.Generator().manual_seed((train.seed + 10**9) * 1_000_003 + 10_000)  # as begin_random_state does


def test_a_decoders_pictures_are_of_its_size_before_torch_loads() -> None:
    said = refused_before_loading("decoder", "--config", str(CONFIGS / RECIPES["decoder"][1]), "data.image_size=32")
    assert "expected model.unet.image_size 64" in said


def test_a_decoder_that_starts_from_another_has_its_size() -> None:
    body: dict[str, Any] = {"clip": "none", "init_from": "emoji"}
    fits = parse_config(DecoderRunConfig, {**body, "model": {"drop_text": 0.2}})
    filled, _ = with_start(fits, read=read_shape)
    assert parse_config(DecoderRunConfig, filled.model_dump()) == filled  # as the run does
    small = parse_config(DecoderRunConfig, {**body, "data": {"image_size": 32}})  # the checkpoint's size is not known
    with pytest.raises(UsageError, match=r"data\.image_size is 32, expected model\.unet\.image_size 64"):
        run_decoder(small, Distributed(0, 1, torch.device("cpu")))


def test_latents_wait_for_their_factor() -> None:
    model = {"latent": {"name": "none"}, "unet": {"image_size": 8}, "diffusion": {"variance": "fixed_small"}}
    body: dict[str, Any] = {"clip": "none", "model": model, "data": {"image_size": 32}}
    parse_config(DecoderRunConfig, body)
    model["latent"] = {"name": "none", "factor": 8}
    with pytest.raises(UsageError, match=r"data\.image_size is 32, and latents of 8 with 8 pixels a side"):
        parse_config(DecoderRunConfig, body)


def test_steps_that_do_not_exist_are_refused_in_a_models_folder_too() -> None:
    for config_cls in (PriorConfig, DecoderConfig):
        with pytest.raises(UsageError, match="5000 sampling steps asked for; the process has 1000"):
            parse_config(config_cls, {"steps": 5000})


def test_what_is_said_of_stored_pictures_that_are_too_small() -> None:
    info: Any = SimpleNamespace(folder="there", pixels=32)
    with pytest.raises(UsageError, match=r"data\.image_size=32, which must be the size of a decoder or an upsampler"):
        check_pixels(info, DataConfig(image_size=64))


def test_a_network_knows_what_divides_its_input() -> None:
    from unclip.nn import UNet

    for shape in ({}, {"patch_size": 4, "image_size": 64, "channel_mult": (1, 2)}, {"channel_mult": (1,)}):
        config = parse_config(UNetConfig, {"model_channels": 8, **shape})
        with torch.device("meta"):
            assert UNet(config, 3, 3).multiple == config.multiple


def test_processes_share_a_clips_batch(tmp_path: Path) -> None:
    train = TrainConfig(run_dir=str(tmp_path / "run"), batch_size=2)
    with pytest.raises(UsageError, match="a CLIP learns by telling the pictures of a batch apart"):
        run_clip(ClipRunConfig(train=train), Distributed(0, 2, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


def test_what_nobody_foresaw_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    arguments = ["--config", str(CONFIGS / RECIPES["clip"][1])]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train_clip.py"])
    with pytest.raises(SystemExit) as ended:
        main_for(ClipRunConfig, run, "", arguments)
    told = "train_clip.py: unexpected ZeroDivisionError: division; --debug shows where\n"
    assert (ended.value.code, capsys.readouterr().err) == (1, told)
    with pytest.raises(ZeroDivisionError):
        main_for(ClipRunConfig, run, "", [*arguments, "--debug"])
