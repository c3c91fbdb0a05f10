"""Options that would have been ignored, files that are not there, and embeddings of any length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.errors import UsageError
from unclip.inputs import check_embeddings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a picture, a mask and an empty folder."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "white").save("a.png")
    Image.linear_gradient("L").resize((64, 64)).save("mask.png")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["embed", "a.png", "--out", "e.npy", "--pixels", "64"], 2, "--pixels is of a whole data set; add --dataset"),
    (["embed", "a.png", "--out", "e.npy", "--split", "train"], 2, "--split is of a whole data set"),
    (["embed", "a.png", "--out", "e.npy", "--streaming"], 2, "--streaming is of a whole data set"),
    (["embed", "a.png", "--out", "e.npy", "--clip", "x", "--model", "y"], 2, "--model and --clip both name a CLIP"),
    (["embed", "--dataset", "synthetic", "--out", "e", "--set", "foo=1"], 2, "unclip: the data: unknown key 'foo'"),
    (["embed", "a.png", "--out", "e.npy", "--clip", "ViT-B-33"], 1, "no architecture of open_clip (nearest: ViT-B-32"),
    (["variations", "a.png", "--steps", "5"], 2, "are of the inversion, which --eta and --eta-sheet alone ask for"),
    (["variations", "a.png", "--refinements", "2"], 2, "are of the inversion"),
    (["variations", "--latents", "l", "--steps", "5"], 2, "are of an inversion, and --latents come from one"),
    (["variations", "--latents", "l", "--eta", "1", "--refinements", "2"], 2, "are of an inversion"),
    (["variations", "a.png", "--eta-sheet", "0", "1", "--grid"], 2, "--eta-sheet is one sheet already"),
    (["interpolate", "a", "b", "--animate", "b.gif", "--animate", "./b.gif"], 2, "--animate b.gif is given twice"),
    (["typographic", "a.png", "--texts", "fox", "猫 犬"], 2, "font has no letters for '猫', '犬'; name one"),
    (["sample", "--prompt"], 2, "option '--prompt' requires an argument (see `unclip sample --help`)"),
    (["reconstruct", "a.png", "--latents", "x.txt"], 2, "--latents x.txt is no .safetensors file"),
    (["inpaint", "a.png", "--mask", "mask.png", "-p", "a", "-p", "b"], 2, "2 prompts are given for one picture"),
    (["edit", "a.png", "-p", "a", "-p", "b"], 2, "2 prompts are given for one picture"),
    (["sample", "-p", "a", "--model", ""], 2, "the model's name is empty; name 'emoji', a folder, or a Hub id"),
    (["interpolate", "fox", "./folder"], 1, "./folder is a folder; name a picture's file, or a prompt"),
    (["mix", "--mix", "fox:1", "--mix", "./folder:1"], 1, "./folder is a folder"),
    (["plot", "a.png", "--out", "p.png"], 1, "a.png is no metrics.jsonl; name a run's folder"),
    (["statistics", "emoji", "--data", "synthetic"], 1, "there is no folder emoji; statistics are kept beside"),
    (["tally", "votes.csv", "--key", "none.json"], 1, "there is no key at none.json"),
    (["push", "--model", "emoji", "--to", "a/b", "--metrics", "none.json"], 1, "none.json cannot be read: No"),
])  # fmt: skip
def test_one_sentence(run_cli: Run, here: Path, arguments: list[str], code: int, message: str) -> None:
    before = sorted(here.rglob("*"))
    found, out, err = run_cli(*arguments)
    assert (found, out) == (code, ""), err
    assert message in err and err.count("\n") == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("option", "value"), [("--price-per-gpu-hour", "inf"), ("--bytes-per-image", "nan")])
def test_plans_are_of_finite_numbers(run_cli: Run, option: str, value: str) -> None:
    config = Path(__file__).parents[1] / "configs" / "prior" / "synthetic.yaml"
    code, out, err = run_cli("plan", config, "--gpus", 1, option, value, "--json")
    assert (code, out) == (2, "")
    assert f"{option} is {value}; expected a finite" in err or f"got {value!r}" in err


@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e300, 1e-300])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_embeddings_of_any_length_have_a_direction(factor: float, kind: Any) -> None:
    plain = np.random.default_rng(0).normal(size=(3, 8))
    rows = plain.copy()
    rows[1] *= factor
    rows = rows.astype(kind)
    if kind is np.float32 and not 1e-38 < factor < 1e38:
        with np.errstate(all="ignore"), pytest.raises(UsageError, match=r"holds NaN or infinity|is all zeros"):
            check_embeddings(rows, 8)
        return
    for given in (rows, torch.from_numpy(rows)):
        found = check_embeddings(given, 8)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, check_embeddings(plain, 8), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match=r"embedding 1 has elements of up to .* with the CLIP's own length"):
        check_embeddings(rows, 8, unit_length=False)
