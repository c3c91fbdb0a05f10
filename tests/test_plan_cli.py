"""`unclip params` and `unclip plan`: what they print, and what they say to those who ask for the impossible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unclip.planning import find_gpu

CONFIGS = Path(__file__).parents[1] / "configs"
UPSAMPLER = CONFIGS / "upsampler" / "synthetic_64_to_256.yaml"
Cli = Callable[..., tuple[int, str, str]]


def numbers(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def test_params_beside_what_is_published(run_cli: Cli) -> None:
    configs = [CONFIGS / "upsampler" / "paper_256_to_1024.yaml", CONFIGS / "prior" / "synthetic.yaml"]
    code, out, _ = run_cli("params", *configs, "--json")
    paper, tutorial = json.loads(out)
    assert code == 0
    assert (paper["stage"], paper["total"], paper["stated"]) == ("upsampler", 282_059_139, 300_000_000)
    assert paper["difference_percent"] == pytest.approx(-5.98, abs=0.005)
    assert (tutorial["stage"], tutorial["total"], tutorial["stated"]) == ("prior", 665_792, None)
    for counted in (paper, tutorial):
        assert sum(counted["parts"].values()) == counted["total"] == counted["trainable"]
    _, table, _ = run_cli("params", configs[0])
    assert "282,059,139  300,000,000     -5.98 %" in table


def test_plan_as_json(run_cli: Cli) -> None:
    asked = ["--gpus", 2, "--gpu", "RTX4090", "--mfu", 0.5, "--micro-batch", 4, "--price-per-gpu-hour", 3]
    code, out, _ = run_cli("plan", UPSAMPLER, "train.steps=1000", *asked, "--json")
    body = json.loads(out)
    assert code == 0
    assert body["batch"] == {"batch_size": 16, "micro_batch": 4, "accumulation": 2}
    assert body["parameters"]["total"] == 211_712
    flops, time, data = body["flops"], body["time"], body["data"]
    assert all(numbers(value) for part in (flops, time, data) for value in part.values())
    assert flops["training_step"] == flops["forward"] + flops["backward"] + flops["recomputed"] + flops["frozen"]
    # 8 images a GPU and step on half of 82.6 TFLOP/s
    assert time["step_seconds"] == pytest.approx(8 * flops["training_step"] / (0.5 * 82.6e12))
    assert time["days"] == pytest.approx(1000 * time["step_seconds"] / 86_400)
    assert time["gpu_hours"] == pytest.approx(48 * time["days"])
    assert time["cost"] == pytest.approx(3 * time["gpu_hours"])
    assert time["model_mfu"] == pytest.approx(0.5)
    assert data["images"] == 16_000
    assert data["bytes"] == pytest.approx(16_000 * (1500 + 0.38 * 256**2))
    assert set(body["memory"]["by_stage"]) == {"0", "1", "2", "3"}
    for row in body["memory"]["by_stage"].values():
        assert row["total"] >= row["weights"] + row["optimizer"] + row["ema"] + row["activations"]
        assert (row["fits"], row["largest_micro_batch"]) == (True, 8)
    assert any("corruption" in text for text in body["assumptions"])


def test_plan_as_table_says_what_would_fit(run_cli: Cli) -> None:
    huge = ["data.crop_size=256", "model.unet.image_size=256", "train.batch_size=4096", "model.unet.patch_size=1"]
    code, out, _ = run_cli("plan", UPSAMPLER, *huge, "--gpus", 1, "--gpu", "v100-16")
    assert code == 0
    assert "does not fit; train.accumulation=" in out
    accumulation = int(out.split("train.accumulation=")[1].split()[0])
    assert 4096 % accumulation == 0 < accumulation - 1
    assert str(4096 // accumulation) in out.split("0*")[1].splitlines()[0]


def test_the_stage_is_found_by_folder_keys_or_option(run_cli: Cli, tmp_path: Path) -> None:
    text = (CONFIGS / "prior" / "synthetic.yaml").read_text(encoding="utf-8")
    loose = tmp_path / "mine.yaml"
    loose.write_text(text, encoding="utf-8")
    code, out, _ = run_cli("params", loose, "--json")
    assert (code, json.loads(out)[0]["stage"]) == (0, "prior")
    empty = tmp_path / "train.yaml"
    empty.write_text("train: {steps: 5}", encoding="utf-8")
    code, _, err = run_cli("params", empty)
    assert code == 2
    assert "fits clip and upsampler" in err and "pass --stage clip|prior|decoder|upsampler" in err
    code, out, _ = run_cli("params", empty, "--stage", "upsampler", "--json")
    assert (code, json.loads(out)[0]["stage"]) == (0, "upsampler")
    empty.write_text("weather: fine", encoding="utf-8")
    code, _, err = run_cli("params", empty)
    assert code == 2
    assert "fits no stage" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h10"], "no GPU called 'h10'; did you mean"),
        (["--gpu", "a100"], "did you mean a100-80 or a100-40?"),
        (["--gpu", "abacus"], "known: b200, h200, h100"),
        (["--gpus", 0], "--gpus is 0; at least one GPU"),
        (["--gpus", 3], "train.batch_size 16 does not divide over 3 processes"),
        (["--gpus", 2, "--micro-batch", 9], "a GPU's share of the batch is 8 samples"),
        (["--gpus", 2, "--micro-batch", 3], "must divide it: 1, 2, 4, 8"),
        (["--gpus", 2, "--micro-batch", 0], "must divide it: 1, 2, 4, 8"),
        (["--gpus", 3, "--micro-batch", 1], "16 does not divide over 3 GPUs"),
        (["--mfu", 1.5], "--mfu is 1.5; expected a share"),
        (["--reserve", 1], "--reserve is 1.0; expected a share"),
        (["--zero", 4], "ZeRO has the stages 0, 1, 2 and 3"),
        (["train.precision=bfloat16", "--gpu", "v100"], "v100 has no bfloat16"),
        (["another.yaml"], "'another.yaml' is no key=value"),
        (["--stage", "painter"], "no stage 'painter'; known: clip, prior, decoder, upsampler"),
    ],
)
def test_bad_requests_end_in_one_sentence(run_cli: Cli, arguments: list[object], said: str) -> None:
    code, out, err = run_cli("plan", UPSAMPLER, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_missing_files(run_cli: Cli, tmp_path: Path) -> None:
    code, _, err = run_cli("plan", tmp_path / "nothing.yaml")
    assert code == 2
    assert "no configuration file at" in err


def test_gpus_by_any_spelling() -> None:
    assert find_gpu(" A100 80 ").name == "a100-80"
    assert find_gpu("h100").teraflops("bfloat16") > find_gpu("h100").teraflops("float32")
