"""Corruptions of many steps are made with the batches, beside the training, and are the sample's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip.config import DataConfig, parse_config
from unclip.data import build_batches
from unclip.training import Distributed
from upsamplers import objective
from upsamplers import train as upsampler_training
from upsamplers.config import BSRGANConfig, UpsamplerConfig, UpsamplerRunConfig
from upsamplers.objective import add_condition, downsample, make_condition_seeded, pair

CONFIG = UpsamplerConfig(low_size=8, high_size=32, corruption=BSRGANConfig(probability=0.6))
DATA = DataConfig(image_size=32)


def conditions(batch_size: int, count: int, config: DataConfig = DATA) -> tuple[Tensor, Tensor]:
    """Images and conditions of the first `count` samples."""
    complete = partial(add_condition, config=CONFIG)
    batches = build_batches(config, batch_size=batch_size, seed=3, complete=complete)
    found = [next(batches) for _ in range(count // batch_size)]
    return torch.cat([batch["image"] for batch in found]), torch.cat([batch["condition"] for batch in found])


def test_a_samples_corruption_is_its_own() -> None:
    images, expected = conditions(4, 12)
    assert expected.shape == (12, 3, 8, 8)
    untouched = [torch.equal(*pair) for pair in zip(expected, downsample(images, CONFIG), strict=True)]
    assert 0 < sum(untouched) < 12
    for size, change in ((6, {}), (3, {"workers": 1})):
        again, found = conditions(size, 12, DATA.model_copy(update=change))
        assert torch.equal(again, images) and torch.equal(found, expected)


def test_another_seed_brings_another_corruption_and_a_resumed_run_the_same() -> None:
    complete = partial(add_condition, config=CONFIG)
    batches = build_batches(DATA, batch_size=4, seed=3, complete=complete)
    next(batches)
    state, expected = batches.state_dict(), next(batches)
    again = build_batches(DATA, batch_size=4, seed=3, complete=complete)
    again.load_state_dict(state)
    assert torch.equal(next(again)["condition"], expected["condition"])
    other = build_batches(DATA, batch_size=4, seed=4, complete=complete)
    assert not torch.equal(next(other)["condition"], expected["condition"])


def test_what_has_a_picture_of_its_own_costs_no_corruption(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []  # an earlier test's batches may still be made in the background, from other seeds

    def spy(images: Tensor, config: UpsamplerConfig, seeds: list[int]) -> Tensor:
        asked.extend(seeds)
        return make_condition_seeded(images, config, seeds)

    monkeypatch.setattr(objective, "make_condition_seeded", spy)
    images, low = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 8, 8)
    batch = {"image": images, "low": low, "has_low": torch.tensor([True, False, True])}
    batch |= add_condition(batch, [5, 6, 7], config=CONFIG)
    assert {5, 6, 7} & set(asked) == {6} and batch["condition"][[0, 2]].abs().max() == 0
    assert torch.equal(batch["condition"][1:2], make_condition_seeded(images[1:2], CONFIG, [6]))
    given = (batch[name] for name in ("low", "has_low", "condition"))
    _, seen = pair(images, CONFIG, torch.Generator().manual_seed(0), None, *given)
    assert torch.equal(seen[[0, 2]], low[[0, 2]]) and torch.equal(seen[1], batch["condition"][1])
    add_condition({**batch, "has_low": torch.ones(3, dtype=torch.bool)}, [5, 8, 7], config=CONFIG)
    assert {5, 7, 8} & set(asked) == set()


@pytest.mark.parametrize("kind, ahead", [("none", False), ("blur", False), ("bsr", True), ("bsrgan", True)])
def test_a_run_corrupts_in_the_background(
    kind: str, ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fit(_network: Any, loss_fn: Any, batches: Any, *_args: Any, **_kwargs: Any) -> Path:
        batch = next(batches)
        seen.append(batch)
        if ahead:
            monkeypatch.setattr(objective, "make_condition", lambda *_: pytest.fail("corrupted while training"))
        assert loss_fn(_network, batch, torch.Generator().manual_seed(0))["loss"].shape == (2,)
        return tmp_path

    monkeypatch.setattr(upsampler_training, "fit", fit)
    unet = {"image_size": 32, "model_channels": 8, "channel_mult": [1, 1], "num_res_blocks": 1}
    body = {
        "model": {"low_size": 8, "high_size": 32, "corruption": {"kind": kind}, "unet": unet},
        "data": {"image_size": 32},
        "train": {"run_dir": str(tmp_path / "run"), "batch_size": 2, "steps": 1, "sample_every": 0},
    }
    upsampler_training.run(parse_config(UpsamplerRunConfig, body), Distributed(0, 1, torch.device("cpu")))
    assert ("condition" in seen[0]) == ahead
