"""Whole runs that tune: every ZeRO stage, gone on with, under the launcher; what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_launcher import launch
from torch import Tensor

from decoder import DecoderRunConfig
from decoder.train import run as run_decoder
from prior import PriorStage
from unclip.adapters import read_adapter, target_layers
from unclip.bundle import load_weights
from unclip.config import parse_config
from unclip.errors import UsageError
from unclip.pipeline import UnCLIP
from unclip.training import current, loop

pytestmark = pytest.mark.filterwarnings("ignore:the prompt is longer than CLIP's 12 tokens")

STEPS = 3


def tune(bundle: Path, folder: Path, model: dict[str, Any] | None = None, **train: Any) -> Path:
    """A decoder run of STEPS steps on a few drawn pictures, from the bundle's own decoder."""
    body: dict[str, Any] = {"run_dir": str(folder), "steps": STEPS, "batch_size": 2, "log_every": 1, "ema_decay": 0.5}
    body |= {"checkpoint_every": 2, "optimizer": {"lr": 1e-2}, "wandb": {"mode": "disabled"}, **train}
    data = {"source": "synthetic", "image_size": 64, "synthetic": {"size": 8}}
    recipe = {"clip": str(bundle), "init_from": str(bundle), "data": data, "train": body}
    config = parse_config(DecoderRunConfig, recipe if model is None else {**recipe, "model": model})
    return run_decoder(config, current())


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapters(folder: Path) -> dict[str, Tensor]:
    return dict(read_adapter(folder / "adapter").state)


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> dict[str, Tensor]:
    return load_weights(tiny_bundle / "decoder")


def test_adapters_at_every_zero_stage_and_gone_on_with(
    tiny_bundle: Path, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """The same curve at every stage; and a run that stopped after two steps ends where the other did, to the bit."""
    lora = {"rank": 2, "dropout": 0.1}
    for stage in range(4):
        folder = tmp_path / f"zero-{stage}"
        assert tune(tiny_bundle, folder, lora=lora, zero_stage=stage) == folder / "model"
        assert losses(folder) == pytest.approx(losses(tmp_path / "zero-0"), rel=1e-4)
        for name, value in adapters(folder).items():
            assert torch.allclose(value, adapters(tmp_path / "zero-0")[name], atol=1e-4), (stage, name)
        merged = load_weights(folder / "model")
        assert set(merged) == set(plain)
        changed = {name for name, value in merged.items() if not torch.equal(value, plain[name])}
        assert changed == {f"{name}.weight" for name in read_adapter(folder / "adapter").modules}
    folder = tmp_path / "stopped"
    tune(tiny_bundle, folder, lora=lora, zero_stage=3, steps=2)
    tune(tiny_bundle, folder, lora=lora, zero_stage=3)
    assert losses(folder) == losses(tmp_path / "zero-3")
    assert all(torch.equal(value, adapters(tmp_path / "zero-3")[name]) for name, value in adapters(folder).items())
    # And the adapter by itself gives the merged model.
    model = UnCLIP.from_pretrained(tiny_bundle, size=64, adapters=[folder / "adapter"])
    state = model.decoder.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in load_weights(folder / "model").items())
    text = model.embed_text("a red circle")
    drawn = model.decoder.sample(text.embedding, [1], text=text)
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_parts_keep_every_bit_and_take_no_optimizer_memory(
    stage: int, tiny_bundle: Path, plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Any] = []
    start_engine = loop.start_engine
    monkeypatch.setattr(loop, "start_engine", lambda *given: engines.append(start_engine(*given)) or engines[-1])
    freeze = ["unet.down.*", "*.attention", "embedding_to_*"]
    folder = tune(tiny_bundle, tmp_path / "run", freeze=freeze, zero_stage=stage)
    state = load_weights(folder)
    frozen = {n for n in plain if n.startswith(("unet.down.", "embedding_to_")) or ".attention." in n}
    assert {name for name, value in state.items() if torch.equal(value, plain[name])} >= frozen
    moved = {name for name in set(plain) - frozen if not torch.equal(state[name], plain[name])}
    assert len(moved) > 0.5 * len(set(plain) - frozen)
    if stage == 0:
        held = [id(p) for group in engines[0].optimizer.param_groups for p in group["params"]]
        learning = [p for p in engines[0].module.parameters() if p.requires_grad]
        assert sorted(held) == sorted(map(id, learning)) and len(learning) < len(list(engines[0].module.parameters()))


def test_only_the_adapter_is_written_where_that_is_asked(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tune(tiny_bundle, folder, lora={"rank": 1, "export": "adapter"}, steps=1)
    assert (folder / "adapter").is_dir() and not (folder / "model").exists()
    with pytest.raises(UsageError, match="this decoder's new input channels would stay at zero"):
        tune(tiny_bundle, tmp_path / "other", model={"inpainting": True}, lora={"rank": 1})


def test_a_decoder_learns_to_inpaint(tiny_bundle: Path, plain: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tune(tiny_bundle, tmp_path / "run", model={"inpainting": True, "drop_both": 0.2})
    state = load_weights(folder)
    first = state["unet.conv_in.weight"]
    known = plain["unet.conv_in.weight"].shape[1]
    assert first.shape[1] == known * 7 // 3 and bool((first[:, known:] != 0).any())


@pytest.mark.launcher
def test_a_prior_is_tuned_by_two_processes(tiny_bundle: Path, tmp_path: Path) -> None:
    """The launcher, ZeRO 3, the bundle as CLIP and as start, no section model, adapters, both ways to write them."""
    bundle = str(tiny_bundle)
    train = ("train.zero_stage=3", "train.lora={rank: 2, target: [attention, feedforward]}")
    run_dir = launch("prior", {"clip": bundle, "init_from": bundle}, tmp_path, *train)
    plain = PriorStage.load(tiny_bundle / "prior")
    merged, before = load_weights(run_dir / "model"), load_weights(tiny_bundle / "prior")
    changed = {name.removesuffix(".weight") for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == set(target_layers(plain.network, ["attention", "feedforward"]))
    assert torch.equal(merged["mean"], before["mean"])  # not measured anew
    model = UnCLIP.from_pretrained(tiny_bundle, size=64, adapters=[run_dir / "adapter"])
    assert model.prior is not None
    state = model.prior.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merged.items())
