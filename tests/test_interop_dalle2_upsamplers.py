"""Enlarging U-Nets of DALLE2-pytorch: what a release puts out for the same weights (golden files), so does ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_dalle2 as h
import numpy as np
import pytest
import torch
from torch import Tensor

from unclip.bundle import read_part_json, save_part
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.errors import UnclipError, UsageError
from unclip.interop.dalle2 import Dalle2Checkpoint
from unclip.interop.dalle2_upsamplers import enlarging_unets, upsampler_from_dalle2
from upsamplers import Dalle2Upsampler, Dalle2UpsamplerConfig, UpsamplerStage, read_upsampler_config
from upsamplers import sampling as upsampling
from upsamplers.start import read_part

DATA = Path(__file__).parent / "data" / "dalle2"
CASES = [
    (file.stem.removeprefix("cascade_"), name, int(number))
    for file in sorted(DATA.glob("cascade_*.npz"))
    for name, number in sorted({tuple(key.split("/")[:2]) for key in np.load(file).files if key.endswith("/null")})
]
NEWEST = "1.15.6"


def golden(version: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = np.load(DATA / f"cascade_{version}.npz")
    own = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    shapes = json.loads(str(own["shapes"]))
    tables = {key.removeprefix("table/"): torch.from_numpy(own[key]) for key in own if key.startswith("table/")}
    # Tables that nothing here reads are not in the file.
    kept = {n: s for n, s in shapes.items() if "noise_scheduler" not in n or n in tables}
    return h.cascade_weights(kept, tables), own


def opened(version: str, name: str, **changes: Any) -> tuple[Dalle2Checkpoint, dict[str, Any]]:
    state, own = golden(version, name)
    config = {**h.CASCADES[name], **changes}
    return Dalle2Checkpoint(Path("latest.pth"), "decoder", state, config, version, False), own


def network_of(version: str, name: str, number: int, **changes: Any) -> tuple[Dalle2Upsampler, dict[str, Any]]:
    checkpoint, own = opened(version, name)
    config, state = upsampler_from_dalle2(checkpoint, number, **changes)
    network = Dalle2Upsampler(config)
    network.load_state_dict(state)
    return network.eval(), own


def caption() -> TextFeatures:
    tokens, mask, embedding = h.caption()
    return TextFeatures(tokens, mask, embedding, None)


@pytest.mark.parametrize(("version", "name", "number"), CASES)
@torch.no_grad()
def test_outputs_are_those_of_the_release(version: str, name: str, number: int) -> None:
    network, expected = network_of(version, name, number)
    size, text = network.config.high_size, caption()
    x = h.drawn(f"x_t {size}", (h.BATCH, 3, size, size))
    level = h.LEVELS + 1 if network.config.unet.low_res_noise else None  # one above theirs: 0 is none
    for key, mask in (("conditional", text.mask), ("null", torch.zeros_like(text.mask))):
        told = {} if network.config.text_dim is None else {"text_tokens": text.tokens, "text_mask": mask}
        wanted = torch.from_numpy(expected[f"{number}/{key}"])
        assert wanted.std() > 0.05
        ours = network(x, h.ENLARGED_TIMES, h.low_res(size // 2), level, **told)
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    if network.config.text_dim is not None:  # no caption is the learned null
        torch.testing.assert_close(network(x, h.ENLARGED_TIMES, h.low_res(size // 2)), wanted, atol=1e-4, rtol=1e-4)


class NamedNoise:
    """The noise that the golden file was made with, in the place of a stage's own."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def draw(self, shape: tuple[int, ...], device: Any = "cpu") -> Tensor:
        return h.drawn(f"{self.name} x_T", (h.BATCH, *shape))

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return h.drawn(f"{self.name} noise {self.count}", x.shape)


@pytest.mark.parametrize(("name", "number"), [(n, k) for v, n, k in CASES if v == NEWEST])
def test_pictures_are_those_of_its_decoder(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """By all of the timesteps its chain is `ddpm`: the same picture from the same noise."""
    network, expected = network_of(NEWEST, name, number, steps=40, sampler="ddpm", eta=1.0)
    monkeypatch.setattr(upsampling, "SeededNoise", lambda _seeds: NamedNoise(f"{name} {number}"))
    drawn = UpsamplerStage(network).sample(h.low_res(network.config.low_size), [0] * h.BATCH, text=caption())
    wanted = torch.from_numpy(expected[f"{number}/sampled"])
    assert wanted.std() > 0.1
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)


def test_processes_are_each_networks_own() -> None:
    noised = upsampler_from_dalle2(opened(NEWEST, "noised")[0], 1)[0]
    assert (noised.noise_level, noised.noise_augmentation) == (301, 1000)
    assert noised.condition_process.schedule == "linear" and noised.condition_process.timesteps == 1000
    checkpoint = opened(NEWEST, "captioned", sample_timesteps=[None, 9, None])[0]
    assert enlarging_unets(checkpoint) == [1, 2]
    first, second = (upsampler_from_dalle2(checkpoint, number)[0] for number in (1, 2))
    processes = [one.diffusion for one in (noised, first, second)]
    assert [(one.schedule, one.prediction, one.variance) for one in processes] == [
        ("linear", "epsilon", "learned_range"),
        ("cosine", "x_start", "fixed_small"),
        ("linear", "epsilon", "fixed_small"),
    ]
    assert (first.low_size, first.high_size, second.low_size, second.high_size) == (8, 16, 16, 32)
    assert (first.steps, second.steps) == (9, 27)
    assert (noised.text_dim, first.text_dim, second.text_dim) == (None, None, h.CLIP_DIM)


def test_any_size_and_one_seed_a_picture() -> None:
    stage = UpsamplerStage(network_of(NEWEST, "noised", 1, steps=3)[0])
    low = h.drawn("any", (2, 3, 7, 5)).tanh()
    both = stage.sample(low, [1, 2])
    assert both.shape == (2, 3, 14, 10) and both.abs().max() <= 1
    # Another batch rounds otherwise, and an ε of a high timestep makes more of it.
    torch.testing.assert_close(stage.sample(low[1:], [2])[0], both[1], atol=1e-3, rtol=0)
    assert not torch.allclose(stage.sample(low, [1, 2], noise_level=0), both, atol=1e-3)
    with pytest.raises(UsageError, match="attention; leave it out"):
        stage.sample(low, [1, 2], memory_limit=2**30)


def test_conversion_writes_the_upsamplers_beside_the_decoder(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    state, _ = golden(NEWEST, "captioned")
    body = {"model": state, "version": NEWEST, "config": {"decoder": h.CASCADES["captioned"]}}
    torch.save(body, tmp_path / "latest.pth")
    out = tmp_path / "parts" / "decoder"
    code, printed, err = run_cli("convert", tmp_path / "latest.pth", "--out", out)
    assert (code, printed.strip()) == (0, str(out))
    assert [line.split(" is written")[0] for line in err.splitlines()] == [
        f"unclip: the enlarging U-Net unets.{number}, to {size} px" for number, size in ((1, 16), (2, 32))
    ]
    assert sorted(folder.name for folder in out.parent.iterdir()) == ["decoder", "upsampler_16", "upsampler_32"]
    stage = UpsamplerStage.load(out.parent / "upsampler_32")
    low = h.low_res(16)
    told, untold = stage.sample(low, [1, 2, 3], 2, text=caption()), stage.sample(low, [1, 2, 3], 2)
    assert told.shape == (3, 3, 32, 32) and not torch.allclose(told, untold, atol=1e-3)
    code, _, err = run_cli("convert", tmp_path / "latest.pth", "--out", out.with_name("another"))
    assert code == 1 and "upsampler_16 exists; pass --overwrite" in err
    assert not out.with_name("another").exists()
    code, _, err = run_cli("convert", tmp_path / "latest.pth", "--out", out.with_name("upsampler_16"), "--overwrite")
    assert code == 1 and "holds a 'upsampler', expected a 'decoder'" in err
    with pytest.raises(UnclipError, match="run here and not trained"):
        read_part(out.parent / "upsampler_16")


def test_what_is_not_supported_is_left_out_aloud(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    state, _ = golden(NEWEST, "noised")
    config = h.CASCADES["noised"]
    unets = [config["unets"][0], {**config["unets"][1], "self_cond": True}]
    told = {"decoder": {**config, "unets": unets}}
    torch.save({"model": state, "version": NEWEST, "config": told}, tmp_path / "a.pth")
    code, _, err = run_cli("convert", tmp_path / "a.pth", "--out", tmp_path / "decoder")
    assert code == 0 and err.startswith("unclip: left out: the enlarging U-Net unets.1, to 16 px: unets.1 of ")
    assert err.count("\n") == 1 and "self-conditioning" in err
    for changes, said in (
        ({"image_sizes": [8, 20]}, "not a multiple"),
        ({"image_sizes": [8]}, "no size in its configuration"),
        ({"unets": config["unets"][:1]}, "not in the configuration of its run"),
    ):
        with pytest.raises(UnclipError, match=said):
            upsampler_from_dalle2(opened(NEWEST, "noised", **changes)[0], 1)


def test_a_damaged_configuration_has_a_sentence(tmp_path: Path) -> None:
    config, state = upsampler_from_dalle2(opened(NEWEST, "noised")[0], 1)
    save_part(tmp_path / "part", "upsampler", config, state)
    assert read_upsampler_config(tmp_path / "part") == config
    body = read_part_json(tmp_path / "part", "upsampler")["config"]
    with pytest.raises(UnclipError, match="go together"):
        parse_config(Dalle2UpsamplerConfig, {**body, "noise_augmentation": None, "noise_level": 0}, "a part")
