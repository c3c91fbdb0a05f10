"""Priors of DALLE2-pytorch: what its releases put out for the same weights (golden files), ours puts out too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_dalle2 as h
import numpy as np
import pytest
import torch
from packaging.version import parse
from torch import Tensor

from prior import Dalle2Prior, DiffusionPriorStage, PriorStage
from prior.sampling import KIND
from prior.start import read_part
from unclip.bundle import save_part
from unclip.clip import TextFeatures
from unclip.errors import UnclipError
from unclip.interop.containers import read_container
from unclip.interop.dalle2 import era_of, recognise
from unclip.interop.dalle2_parts import convert_dalle2
from unclip.interop.dalle2_prior import read_dalle2_prior
from unclip.interop.records import Record

DATA = Path(__file__).parent / "data" / "dalle2"
VERSIONS = sorted(file.stem.removeprefix("prior_") for file in DATA.glob("prior_*.npz"))


def golden(version: str, name: str, kind: str = "prior") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A release's state dict of one configuration, and its outputs."""
    file = np.load(DATA / f"{kind}_{version}.npz")
    own = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    tables = {key.removeprefix("table/"): torch.from_numpy(own[key]) for key in own if key.startswith("table/")}
    return h.weights(json.loads(str(own["shapes"])), tables), own


def checkpoint(folder: Path, state: dict[str, Tensor], config: Any, version: str, **more: Any) -> Path:
    """As its trainers write them: the moving average beside the model, which here is another."""
    plain = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    body = {"model": plain, "ema_model": state, "version": parse(version), "step": torch.tensor([3]), **more}
    torch.save(body, folder / "latest.pth")
    (folder / "prior_config.json").write_text(json.dumps({"prior": config, "train": {}}), encoding="utf-8")
    return folder


def features() -> TextFeatures:
    tokens, mask, embedding = h.caption()
    return TextFeatures(tokens, mask, embedding, torch.ones(h.BATCH))


@pytest.mark.parametrize("name", list(h.PRIORS))
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_outputs_are_those_of_the_release(tmp_path: Path, version: str, name: str) -> None:
    state, expected = golden(version, name)
    config, converted = read_dalle2_prior(checkpoint(tmp_path, state, h.PRIORS[name], version), text_length=h.TOKENS)
    network = Dalle2Prior(config)
    network.load_state_dict(converted)
    text = features()
    given = {"text_embedding": text.embedding, "text_tokens": text.tokens, "text_mask": text.mask}
    keep = torch.zeros(h.BATCH, dtype=torch.bool)
    x = h.drawn("x_t", (h.BATCH, h.CLIP_DIM))
    conditional = network(x, h.TIMES, **given, drop_text=keep)
    null = network(x, h.TIMES, **given, drop_text=~keep)
    wanted = torch.from_numpy(expected["conditional"])
    torch.testing.assert_close(conditional, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        null + 3 * (conditional - null), torch.from_numpy(expected["guided"]), atol=3e-4, rtol=1e-4
    )
    assert wanted.std() > 0.1


def test_the_goldens_tell_the_eras_apart() -> None:
    """The same weights, other numbers: renaming alone would not do."""
    assert len(VERSIONS) >= 4
    outputs = {version: golden(version, "plain")[1]["conditional"] for version in VERSIONS}
    assert np.abs(outputs["1.2.2"] - outputs["1.6.5"]).max() > 1e-2
    assert golden("1.10.2", "plain")[1]["guided"].shape == (h.BATCH, h.CLIP_DIM)
    assert np.abs(golden("1.10.2", "plain")[1]["guided"] - golden("1.15.6", "plain")[1]["guided"]).max() > 1e-2


def stage_of(tmp_path: Path, **changes: Any) -> PriorStage:
    state, _ = golden("1.15.6", "laion")
    config, converted = read_dalle2_prior(
        checkpoint(tmp_path, state, h.PRIORS["laion"], "1.15.6"), text_length=h.TOKENS, **changes
    )
    save_part(tmp_path / "part", KIND, config, converted)
    return PriorStage.load(tmp_path / "part")


def test_a_converted_prior_is_a_part_and_samples(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, steps=5, candidates=1, guidance=2.0)
    assert isinstance(stage, DiffusionPriorStage) and isinstance(stage.network, Dalle2Prior)
    drawn = stage.sample(features(), [5, 6, 7])
    assert drawn.shape == (h.BATCH, h.CLIP_DIM)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(h.BATCH))
    one = features()
    single = TextFeatures(one.tokens[1:2], one.mask[1:2], one.embedding[1:2], None)
    torch.testing.assert_close(stage.sample(single, [6])[0], drawn[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(drawn, stage.sample(features(), [5, 6, 7], guidance=1.0))


@torch.no_grad()
def test_a_whole_ddpm_chain_is_the_references(tmp_path: Path) -> None:
    """All T steps with their posterior written out, from the same noise."""
    stage = stage_of(tmp_path, steps=100, candidates=1)
    seen: list[Tensor] = []
    drawn = stage.sample(features(), [1, 2, 3], callback=lambda _n, _t, x: seen.append(x))
    from unclip.diffusion import SeededNoise

    noise = SeededNoise([seed * 1_000_003 for seed in (1, 2, 3)])
    x = noise.draw((h.CLIP_DIM,))
    betas = torch.from_numpy(golden("1.15.6", "laion")[1]["table/noise_scheduler.betas"]).double()
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    text = features()
    given = {"text_embedding": text.embedding, "text_tokens": text.tokens, "text_mask": text.mask}
    keep = torch.zeros(h.BATCH, dtype=torch.bool)
    for t in reversed(range(100)):
        x_start = stage.network(x, torch.full((h.BATCH,), t), **given, drop_text=keep).double()
        before = alphas_cumprod[t - 1] if t else torch.tensor(1.0).double()
        first = betas[t] * before.sqrt() / (1 - alphas_cumprod[t])
        second = (1 - before) * (1 - betas[t]).sqrt() / (1 - alphas_cumprod[t])
        x = (first * x_start + second * x.double()).float()
        if t:
            deviation = (betas[t] * (1 - before) / (1 - alphas_cumprod[t])).sqrt().float()
            x = x + deviation * noise.draw((h.CLIP_DIM,))
    torch.testing.assert_close(drawn, torch.nn.functional.normalize(x / h.CLIP_DIM**0.5, dim=1), atol=1e-3, rtol=1e-3)


def test_moving_averages_are_found_in_every_container(tmp_path: Path) -> None:
    state, _ = golden("1.15.6", "plain")
    plain = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    inside = {f"ema_model.{key}": value for key, value in state.items()} | {"step": torch.tensor(1)}
    for number, body in enumerate(
        (
            {"model": plain, "ema": inside, "version": "1.15.6"},
            {"model": state, "version": "1.15.6", "config": {"prior": h.PRIORS["plain"]}},
            state,
        )
    ):
        torch.save(body, tmp_path / f"{number}.pth")
        config = None if "config" in body else h.PRIORS["plain"]
        assert recognise(tmp_path / f"{number}.pth")
        _, found = read_dalle2_prior(tmp_path / f"{number}.pth", config=config, version="1.15.6")
        assert torch.equal(found["query"], state["net.learned_query"])


def test_errors_have_a_sentence(tmp_path: Path) -> None:
    state, _ = golden("1.15.6", "plain")
    folder = checkpoint(tmp_path, state, h.PRIORS["plain"], "0.15.4")
    with pytest.raises(UnclipError, match=r"0\.15\.4, an unsupported era"):
        read_dalle2_prior(folder)
    torch.save({"model": state}, tmp_path / "latest.pth")
    with pytest.raises(UnclipError, match="pass the version"):
        read_dalle2_prior(folder)
    with pytest.raises(UnclipError, match="trained on a cosine schedule, and its configuration says 'linear'"):
        read_dalle2_prior(folder, {**h.PRIORS["plain"], "beta_schedule": "linear"}, "1.15.6")
    selfish = {**h.PRIORS["plain"], "net": {**h.PRIORS["plain"]["net"], "self_cond": True}}
    with pytest.raises(UnclipError, match="self-conditioned"):
        read_dalle2_prior(folder, selfish, "1.15.6")
    torch.save({"model": {k: v for k, v in state.items() if not k.endswith("1.5.weight")}}, tmp_path / "latest.pth")
    with pytest.raises(UnclipError, match=r"feedforward\.down\.weight is missing"):
        read_dalle2_prior(folder, version="1.15.6")
    torch.save({"model": {**state, "net.extra": torch.ones(2)}}, tmp_path / "latest.pth")
    with pytest.raises(UnclipError, match="extra, which no supported model"):
        read_dalle2_prior(folder, version="1.15.6")
    torch.save({"weights": {"a": torch.ones(2)}}, tmp_path / "latest.pth")
    with pytest.raises(UnclipError, match="no checkpoint of DALLE2-pytorch: it holds weights"):
        read_dalle2_prior(folder)
    (tmp_path / "second.pth").write_bytes(b"x")
    (tmp_path / "latest.pth").rename(tmp_path / "first.pth")
    with pytest.raises(UnclipError, match=r"first\.pth, second\.pth"):
        read_dalle2_prior(folder)
    with pytest.raises(UnclipError, match=r"is of DALLE2-pytorch 1\.10\.3"):
        era_of("1.10.3", "it")


def test_a_checkpoint_becomes_a_folder(tmp_path: Path) -> None:
    state, _ = golden("1.15.6", "plain")
    source = checkpoint(tmp_path, state, h.PRIORS["plain"], "1.15.6")
    assert convert_dalle2(source, tmp_path / "part", text_length=h.TOKENS, guidance=3.0) == "prior"
    assert PriorStage.load(tmp_path / "part").config.guidance == 3.0
    with pytest.raises(UnclipError, match="exists; pass --overwrite"):
        convert_dalle2(source, tmp_path / "part")
    convert_dalle2(source, tmp_path / "part", text_length=h.TOKENS, overwrite=True)
    with pytest.raises(UnclipError, match="which is run here and not trained"):
        read_part(tmp_path / "part")


def test_the_trainers_own_file_is_read() -> None:
    """Written by DiffusionPriorTrainer.save of 1.15.6, with its optimizer, schedulers and shared storages."""
    file = DATA / "trainer_prior_1.15.6.pth"
    stored = read_container(file)
    assert {"optimizer", "scheduler", "warmup_scheduler", "model", "version", "step", "ema", "ema_model"} <= set(stored)
    config, state = read_dalle2_prior(file, text_length=h.TOKENS)
    assert (config.version, config.depth, config.heads, config.head_dim) == ("1.15.6", 1, 3, 10)
    assert torch.equal(state["query"], stored["ema_model"]["net.learned_query"])
    assert isinstance(stored["warmup_scheduler"], Record)


def test_the_command_makes_a_part(tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    source = DATA / "trainer_prior_1.15.6.pth"
    code, out, err = run_cli("convert", source, "--out", tmp_path / "prior")
    assert (code, out.strip()) == (0, str(tmp_path / "prior")), err
    assert PriorStage.load(tmp_path / "prior").config.kind == "dalle2"
    code, _, err = run_cli("convert", source, "--out", tmp_path / "prior")
    assert code == 1 and "pass --overwrite" in err
    code, _, err = run_cli("convert", source, "--out", tmp_path / "old", "--written-by", "0.1.0")
    assert code == 1 and "unsupported era" in err and not (tmp_path / "old").exists()
    code, _, err = run_cli("convert", tmp_path, "--out", tmp_path / "none", "--written-by", "1.6.5")
    assert code == 2 and "--written-by" in err
