"""Analytic-DPM's statistics in model folders: measured, kept, loaded, carried into bundles, refused when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prior.train
from prior import PriorConfig, PriorStage
from prior.config import PriorRunConfig
from unclip.assemble import assemble
from unclip.bundle import STATISTICS, read_statistics, save_statistics
from unclip.clip import FrozenCLIP
from unclip.config import EpsilonStatistics, parse_config
from unclip.data import build_batches
from unclip.errors import UnclipError, UsageError
from unclip.training import Distributed

KNOWN = EpsilonStatistics(
    timesteps=(0, 500, 999), epsilon_square=(0.2, 0.7, 1.0), data_variance=0.9, noise_limit=0.02, samples=8
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    assert read_statistics(tmp_path) is None
    save_statistics(tmp_path, KNOWN)
    assert read_statistics(tmp_path) == KNOWN
    assert [file.name for file in tmp_path.iterdir()] == [STATISTICS]
    with pytest.raises(UnclipError, match="cannot write"):
        save_statistics(tmp_path / "nowhere", KNOWN)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, r"another format; measure it again with `unclip statistics`"),
        ({"epsilon_square": [0.2, 0.7]}, r"3 timesteps and 2 values; expected as many"),
        ({"timesteps": [0, 999, 500]}, r"timesteps must ascend"),
        ({"epsilon_square": [0.2, -1, 0.5]}, r"negative or infinite"),
        ({"data_variance": 0}, r"data_variance"),
        ({"gamma": 1}, r"unknown key 'gamma'"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_statistics(tmp_path, KNOWN)
    file = tmp_path / STATISTICS
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UnclipError, match=message):
        read_statistics(tmp_path)


def test_a_prior_samples_with_them_and_says_how_to_get_them(bundle: Path) -> None:
    folder, clip = bundle / "prior", FrozenCLIP.load(str(bundle / "clip"))
    text = clip.encode_text(["pizza", "rainbow"])
    with pytest.raises(UnclipError, match=r"`unclip statistics MODEL --data SOURCE`"):
        PriorStage.load(folder).sample(text, [1, 2], sampler="analytic")
    save_statistics(folder, KNOWN)
    stage = PriorStage.load(folder)
    both = stage.sample(text, [1, 2], sampler="analytic")
    alone = stage.sample(text[1:], [2], sampler="analytic")
    assert torch.allclose(both[1], alone[0], atol=1e-6)
    assert not torch.allclose(both, stage.sample(text, [1, 2], sampler="ddpm"), atol=1e-3)


@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_the_command_measures_a_part(bundle: Path, run_cli: Run, part: str) -> None:
    command = ["statistics", bundle, "--part", part, "--data", "synthetic", "--samples", 6, "--batch-size", 4]
    code, out, err = run_cli(*command, "--steps", "0,400,999", "--device", "cpu")
    assert code == 0, err
    assert out.strip() == str(bundle / part / STATISTICS)
    found = read_statistics(bundle / part)
    assert found is not None and found.timesteps == (0, 400, 999) and found.samples == 6
    assert (found.noise_limit is None) == (part == "prior")
    first = (bundle / part / STATISTICS).read_bytes()
    code, _, err = run_cli(*command, "--steps", "0,400,999")
    assert code == 1 and "exists; pass --overwrite to measure again" in err
    single = ["statistics", bundle / part, "--part", part, "--clip", bundle / "clip", *command[4:], "--overwrite"]
    assert run_cli(*single, "--steps", "0,400,999", "--device", "cpu")[0] == 0
    assert (bundle / part / STATISTICS).read_bytes() == first
    changed = [*single, "--set", "synthetic.max_objects=3", "--set", "synthetic.size=8"]
    assert run_cli(*changed, "--steps", "0,400,999", "--device", "cpu")[0] == 0
    assert (bundle / part / STATISTICS).read_bytes() != first


def test_the_command_says_what_is_missing(bundle: Path, run_cli: Run, tmp_path: Path) -> None:
    code, _, err = run_cli("statistics", bundle / "prior", "--data", "synthetic")
    assert code == 2 and "its CLIP must be named: add --clip" in err
    for change in ("image_size=8", "crop_size=8"):
        code, _, err = run_cli("statistics", bundle, "--data", "synthetic", "--set", change)
        assert code == 2 and "leave image_size and crop_size out of --set" in err
    manifest = json.loads((bundle / "unclip.json").read_text())
    del manifest["parts"]["prior"]
    (bundle / "unclip.json").write_text(json.dumps(manifest))
    code, _, err = run_cli("statistics", bundle, "--data", "synthetic")
    assert code == 2 and "has no prior; it has clip, decoder" in err
    code, _, err = run_cli("statistics", bundle, "--data", "synthetic", "--steps", "some")
    assert code == 2 and "'some'; expected a number such as 50" in err


def test_a_bundle_carries_them(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    measured = Path(shutil.copytree(tiny_parts["prior"], tmp_path / "prior"))
    save_statistics(measured, KNOWN)
    parts = {"clip": tiny_parts["clip"], "decoder": tiny_parts["decoder"], "prior": measured}
    assemble(tmp_path / "bundle", parts)
    assert read_statistics(tmp_path / "bundle" / "prior") == KNOWN
    assert read_statistics(tmp_path / "bundle" / "decoder") is None


@pytest.mark.parametrize("sampler", ["analytic", "ddpm"])
def test_training_an_analytic_prior_ends_with_its_statistics(
    sampler: str, tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(network: Any, *_: Any, export: Any, **__: Any) -> Path:
        export(network.state_dict(), tmp_path / "model")
        return tmp_path / "model"

    monkeypatch.setattr(prior.train, "fit", untrained)
    model = {"width": 16, "depth": 1, "heads": 2, "sampler": sampler, "diffusion": {"timesteps": 20}, "steps": 5}
    model["diffusion"] = {"timesteps": 20, "prediction": "x_start"}
    run = {
        "clip": str(tiny_clip_folder),
        "clip_cache": 64,
        "statistics_batches": 1,
        "model": model,
        "data": {"source": "synthetic", "image_size": 16, "synthetic": {"size": 64}},
        "train": {"run_dir": str(tmp_path / "run"), "batch_size": 4},
    }
    config = parse_config(PriorRunConfig, run)
    assert isinstance(config.model, PriorConfig)
    folder = prior.train.run(config, Distributed(0, 1, torch.device("cpu")))
    found = read_statistics(folder)
    if sampler == "ddpm":
        assert found is None
        return
    assert found is not None and found.samples == 64 and found.timesteps == tuple(range(20))
    text = FrozenCLIP.load(str(tiny_clip_folder)).encode_text(["red circle"])
    assert bool(torch.isfinite(PriorStage.load(folder).sample(text, [0])).all())


def test_an_autoregressive_priors_codes_are_of_exact_embeddings(
    tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in bfloat16 keeps the CLIP out of autocast, as rounded embeddings fall into other buckets."""
    seen: list[torch.Tensor] = []

    def spy(*arguments: Any) -> dict[str, torch.Tensor]:
        seen.append(arguments[3])
        return {"loss": arguments[3].square().mean(1)}

    def one_step(_network: Any, loss_fn: Any, batches: Any, *_: Any, **__: Any) -> Path:
        with torch.autocast("cpu", torch.bfloat16):
            loss_fn(None, next(batches), torch.Generator())
        return tmp_path / "model"

    monkeypatch.setattr(prior.train, "autoregressive_loss", spy)
    monkeypatch.setattr(prior.train, "fit", one_step)
    model = {"kind": "autoregressive", "width": 16, "depth": 1, "heads": 2, "components": 4, "buckets": 8}
    run = {
        "clip": str(tiny_clip_folder),
        "statistics_batches": 1,
        "model": model,
        "data": {"source": "synthetic", "image_size": 16, "synthetic": {"size": 64}},
        "train": {"run_dir": str(tmp_path / "run"), "batch_size": 4, "precision": "bfloat16"},
    }
    config = parse_config(PriorRunConfig, run)
    prior.train.run(config, Distributed(0, 1, torch.device("cpu")))
    batch = next(build_batches(config.data, batch_size=4, seed=config.train.seed))
    exact = FrozenCLIP.load(str(tiny_clip_folder)).encode_image(batch["image"])
    assert torch.equal(seen[0], exact)


def test_what_cannot_be_measured_is_refused(tiny_clip_folder: Path) -> None:
    from prior import AutoregressivePriorConfig
    from prior.analytic import measure_statistics
    from prior.sampling import build_stage
    from unclip.training import EmbeddingMemo
    from upsamplers import UpsamplerConfig

    clip = FrozenCLIP.load(str(tiny_clip_folder))
    sizes = {"embedding_dim": 16, "token_dim": 24, "text_length": 12, "width": 16, "depth": 1, "heads": 2}
    codes = parse_config(AutoregressivePriorConfig, {**sizes, "kind": "autoregressive", "components": 4})
    with pytest.raises(UsageError, match="autoregressive, so there is no noise prediction"):
        measure_statistics(build_stage(codes), EmbeddingMemo(clip, 0), [], 4)
    with pytest.raises(UsageError, match="no samples to measure"):
        measure_statistics(build_stage(parse_config(PriorConfig, sizes)), EmbeddingMemo(clip, 0), [], 4)
    with pytest.raises(UsageError, match="upsamplers do not keep; use ddim or ddpm"):
        parse_config(UpsamplerConfig, {"sampler": "analytic"})
