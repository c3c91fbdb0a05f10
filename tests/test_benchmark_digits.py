"""The learning proof on digits, made tiny: that it runs from end to end, and that its judges and its data are right."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from benchmarks import digits, digits_ours
from benchmarks.digits_data import HELD_OUT_PHRASING, PHRASINGS, Digits, captions_of, load_split, sheet, write_folder
from benchmarks.digits_judge import SupportVectors, accuracy, train_classifier

TINY = {
    "clip": {
        "model": {
            "embed_dim": 16, "vision": {"width": 32, "layers": 1},
            "text": {"width": 32, "layers": 1},
        },
        "train": {"steps": 2, "batch_size": 8},
    },
    "prior": {"model": {"width": 32, "depth": 1, "heads": 2, "steps": 2}, "train": {"steps": 2, "batch_size": 8}},
    "decoder": {
        "model": {"context_dim": 16, "steps": 2, "unet": {"model_channels": 32, "num_res_blocks": 1}},
        "train": {"steps": 2, "batch_size": 8},
    },
}  # fmt: skip


def test_digits_are_held_out_by_class(tmp_path: Path) -> None:
    train, held_out = load_split()
    assert (len(train), len(held_out)) == (1437, 360)
    for one in (train, held_out):
        shares = torch.bincount(one.labels, minlength=10) / len(one)
        assert float((shares - 0.1).abs().max()) < 0.01
        assert one.pictures.shape[1:] == (3, 16, 16) and float(one.pictures.min()) == -1
    seen = {picture.numpy().tobytes() for picture in train.pictures}
    assert sum(picture.numpy().tobytes() in seen for picture in held_out.pictures) == 0
    write_folder(train.first(3), tmp_path)
    stored = Image.open(tmp_path / "00000.png")
    levels = torch.tensor(list(stored.convert("L").getdata())).float().view(16, 16) / 127.5 - 1
    assert torch.allclose(levels, train.pictures[0, 0], atol=1e-6)
    assert HELD_OUT_PHRASING not in PHRASINGS and captions_of(7)[0] == "a handwritten seven"
    assert sheet(held_out, each=2).size == (2 * 68, 680)


def test_judges_know_digits_after_little_training() -> None:
    train, held_out = load_split()
    second = SupportVectors(train)
    assert second.accuracy(held_out) > 0.97
    classifier = train_classifier(train.first(400), epochs=3)
    found = accuracy(classifier, held_out)
    assert found["accuracy"] > 0.6 and len(found["by_digit"]) == 10
    turned = Digits(held_out.pictures, (held_out.labels + 1) % 10)
    assert accuracy(classifier, turned)["accuracy"] < 0.2 and second.accuracy(turned) < 0.05


def test_the_whole_proof_runs(tmp_path: Path) -> None:
    report = digits.run(tmp_path, "wall", [1.0], peer=False, changes=TINY, count=40, epochs=1)
    rows = report["rows"]
    assert set(rows) == {"real training digits", "unclip"} and rows["unclip"]["pictures"] == 20
    assert rows["unclip"]["stages"]["decoder"]["steps"] == 2 and 0 <= rows["unclip"]["other_phrasing"] <= 1
    # Noise is farther from digits than digits are.
    assert rows["unclip"]["fd_classifier"] > rows["real training digits"]["fd_classifier"]
    told = digits.to_markdown(report)
    assert "| unclip | decoder |" in told and "The goal of 95% by caption is not reached" in told
    assert {"unclip.png", "real.png", "model"} <= {file.name for file in tmp_path.iterdir()}
    again = digits_ours.train(tmp_path, tmp_path / "data", TINY)  # what has ended is not trained again
    assert again["prior"].wall == rows["unclip"]["stages"]["prior"]["wall"]
