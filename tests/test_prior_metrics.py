"""Figures of a prior beside their baselines: closed forms, and the same whatever the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from unclip.evaluation.prior_metrics import Embeddings, figures


def made(real: torch.Tensor, text: torch.Tensor, prediction: torch.Tensor, captions: list[str]) -> Embeddings:
    unit = (F.normalize(one.double(), dim=1) for one in (real, text, prediction))
    return Embeddings(*unit, tuple(captions))


def test_a_perfect_prior_and_orthogonal_samples() -> None:
    real, text = torch.eye(8)[:4], torch.eye(8)[4:]
    told = figures(made(real, text, real, list("abcd")))
    assert told["cos_prediction_real"].value == told["cos_prediction_real"].low == 1
    assert told["cos_text_real"].value == told["cos_prediction_unrelated"].value == told["squared_error"].value == 0
    assert told["squared_error_text"].value == pytest.approx(2)
    assert told["cos_constant_real"].value == pytest.approx(0.5)  # the mean of four orthogonal vectors
    assert told["gain"].value == pytest.approx(0.5) and told["gain"].low > 0
    ahead = figures(made(real, text, real, list("abcd")), train_mean=torch.eye(8)[0])
    assert ahead["cos_constant_real"].value == pytest.approx(0.25)


def test_figures_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    r, t, p = (torch.randn(9, 5, generator=generator) for _ in range(3))
    captions = list("aabbcdefg")
    told = figures(made(r, t, p, captions))
    found = made(r, t, p, captions)
    pairs = [(i, j) for i in range(9) for j in range(9) if captions[i] != captions[j]]
    for name, left, right in (
        ("cos_prediction_unrelated", found.prediction, found.text),
        ("cos_real_unrelated", found.real, found.text),
        ("cos_other_real", found.real, found.real),
    ):
        assert told[name].value == pytest.approx(sum(float(left[i] @ right[j]) for i, j in pairs) / len(pairs))
        assert told[name].low < told[name].value < told[name].high
    own = [float(found.text[i] @ found.prediction[i]) for i in range(9)]
    base = [float(found.text[i] @ found.real[i]) for i in range(9)]
    assert told["excess"].value == pytest.approx((sum(own) - sum(base)) / 9)
    assert "cos_other_real" not in figures(made(r, t, p, ["same"] * 9))


def test_command_and_batches(
    tmp_path: Path, tiny_bundle: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The figures do not depend on the batch, and a seed's prediction not on how many are measured."""
    common = ("--data", "synthetic", "--set", "synthetic.size=11", "--model", tiny_bundle, "--prior-steps", 2)
    told = []
    for size in (1, 4, 11):
        out = tmp_path / str(size)
        code, shown, error = run_cli("prior-metrics", *common, "--batch-size", size, "--out", out, "--json", "-q")
        assert code == 0, error
        told.append(json.loads(shown))
        assert json.loads((out / "report.json").read_text()) == told[-1]
    for other in told[1:]:
        assert {**other, "about": 0} == {**told[0], "about": 0}
    assert told[0]["about"]["samples"] == 11 and set(told[0]["intervals"]) >= {"cos_prediction_real", "gain", "excess"}
    assert "| cos(text, real) |" in (tmp_path / "4" / "report.md").read_text()
    code, shown, error = run_cli(
        "prior-metrics", *common, "--split", "test", "--train", "synthetic", "--out", tmp_path / "train", "--json"
    )
    about = json.loads(shown)["about"]
    assert code == 0 and about["data"]["split"] == "test" and about["best constant of"]["split"] == "train", error
    assert about["best constant of"]["synthetic"]["size"] == 11  # --set holds for both
    assert "real pictures" not in (tmp_path / "train" / "report.md").read_text()  # a column for nothing
    code, _, error = run_cli("prior-metrics", *common, "--set", "synthetic.size=1", "--out", tmp_path / "x")
    assert code == 1 and "1 samples to measure a prior on" in error
    code, _, error = run_cli("prior-metrics", *common, "--out", tmp_path / "4")
    assert code == 1 and "is there already" in error
