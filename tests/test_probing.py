"""Zero-shot labels, typographic attacks, the decoder's conditions compared, and guidance sheets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from unclip import UnCLIP, UnclipError, UsageError
from unclip.cli.several import spread
from unclip.data.lettering import check_letters, labelled_sheet, stick_label

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=64)


def picture(edge: int = 300) -> Image.Image:
    return Image.new("RGB", (edge, edge), "orange")


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


# ---- zero-shot ---------------------------------------------------------------------------------------------


def test_zero_shot_is_clips_softmax(model: UnCLIP) -> None:
    labels = ["pizza", "red apple", "rainbow"]
    shares = model.zero_shot([picture(), Image.new("RGB", (20, 20), "blue")], labels, template="a {}")
    texts = model.embed_text(["a pizza", "a red apple", "a rainbow"]).embedding
    cosines = model.embed_image([picture(), Image.new("RGB", (20, 20), "blue")]) @ texts.T
    scale = model.clip.model.logit_scale.exp()
    assert torch.allclose(shares, torch.softmax(scale * cosines, dim=1), atol=1e-6)
    assert model.clip.logit_scale == pytest.approx(float(scale))


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        (["pizza"], "{}", "1 label .'pizza'. leaves CLIP no choice"),
        (["pizza", "pizza"], "{}", "the label 'pizza' is given twice"),
        (["pizza", " "], "{}", "label 2 is empty"),
        (["pizza", "fox"], "a photo", "the template 'a photo' has no {}"),
    ],
)
def test_labels_that_cannot_be(model: UnCLIP, labels: list[str], template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.zero_shot(picture(), labels, template=template)


# ---- typographic attacks -----------------------------------------------------------------------------------


def test_a_label_covers_its_place_and_nothing_else() -> None:
    before = picture()
    after = stick_label(before, "pizza", width=0.6, height=0.5)
    changed = (np.asarray(after) != np.asarray(before)).any(axis=2)
    rows, columns = np.where(changed)
    assert before.tobytes() == picture().tobytes(), "the picture given stays as it was"
    middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    assert abs(middle[0] - 149.5) < 2 and abs(middle[1] - 149.5) < 2
    assert 0.4 * 300 < columns.max() - columns.min() <= 0.7 * 300
    ink = (np.asarray(after) < 60).all(axis=2)
    assert 0.02 < ink.mean() < 0.2, "letters are there"
    assert not np.array_equal(np.asarray(after), np.asarray(stick_label(before, "fox", width=0.6)))


def test_small_pictures_are_enlarged_and_edges_are_kept() -> None:
    assert stick_label(picture(64), "pizza").size == (256, 256)
    assert stick_label(Image.new("RGB", (64, 128)), "pizza").size == (256, 512)
    for height, side in ((0.0, slice(0, 2)), (1.0, slice(-2, None))):
        after = np.asarray(stick_label(picture(), "pizza", height=height))
        assert (after[side] != np.asarray(picture())[side]).any(), "at the edge, and whole"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (" ", {}, "the text to stick on is empty"),
        ("pizza", {"width": 0}, "shares of the picture"),
        ("pizza", {"height": 1.5}, "shares of the picture"),
        ("pizza " * 60, {}, "too long to be read"),
    ],
)
def test_labels_that_cannot_be_stuck_on(text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stick_label(picture(), text, **options)


def test_a_font_that_is_none() -> None:
    with pytest.raises(UnclipError, match=r"test_probing\.py cannot be read: .*; expected a TrueType or OpenType file"):
        stick_label(picture(), "pizza", font=Path(__file__))


def test_typographic_rows(model: UnCLIP) -> None:
    rows = model.typographic(picture(), ["pizza", "iPod"], num_images=2, seed=5)
    assert [row.text for row in rows] == [None, "pizza", "iPod"]
    # The texts and the prompts that the model knows, the likeliest first.
    assert set(rows[0].probabilities) == {"pizza", "iPod", "red apple", "rainbow"}
    for row in rows:
        shares = list(row.probabilities.values())
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)
        assert pixels(row.variations) == pixels(model.variations(row.image, num_images=2, seed=5))
    assert rows[1].image.tobytes() == stick_label(picture(), "pizza").tobytes()
    chosen = model.typographic(picture(), "pizza", labels=["fox", "owl"], num_images=1)
    assert set(chosen[0].probabilities) == {"fox", "owl"}


# ---- conditions and guidance -------------------------------------------------------------------------------


def test_three_conditions_from_the_same_noise(model: UnCLIP) -> None:
    found = model.compare_conditioning("pizza", num_images=2, seed=7)
    assert list(found) == ["caption", "text embedding", "prior"]
    assert pixels(found["prior"]) == pixels(model.sample("pizza", num_images=2, seed=7))
    text = model.embed_text(["pizza", "pizza"])
    for name, embedding in (("caption", None), ("text embedding", text.embedding)):
        images = model.decoder.sample(embedding, [7, 8], text=text)
        assert pixels(found[name]) == pixels(model._finish(images, "pil"))
    assert len({image.tobytes() for images in found.values() for image in images}) == 6


def test_a_guidance_sheet_is_made_of_samples(model: UnCLIP) -> None:
    sheet = model.guidance_sheet("pizza", (1, 3), prior_scales=(1, 2), num_images=2, seed=4)
    for row, prior in zip(sheet, (1, 2), strict=True):
        for cell, scale in zip(row, (1, 3), strict=True):
            alone = model.sample("pizza", num_images=2, seed=4, guidance=scale, prior_guidance=prior)
            assert pixels(cell) == pixels(alone)
    (row,) = model.guidance_sheet("pizza", (2,), seed=4)
    assert pixels(row[0]) == pixels(model.sample("pizza", seed=4, guidance=2))


def test_scales_that_cannot_be(model: UnCLIP) -> None:
    with pytest.raises(UsageError, match="scales is empty"):
        model.guidance_sheet("pizza", [])
    with pytest.raises(UsageError, match="guidance is -1, expected a number of 0 or more"):
        model.guidance_sheet("pizza", [1, -1])
    with pytest.raises(UsageError, match="guidance is what the sheet varies"):
        model.guidance_sheet("pizza", [1], guidance=2)
    with pytest.raises(UnclipError, match="has no prior"):
        UnCLIP(model.clip, model.decoder).compare_conditioning("pizza")


# ---- sheets and the command line ---------------------------------------------------------------------------


def test_sheets_name_their_rows_and_columns() -> None:
    cells = [[picture(64), "says\npizza"], [None, picture(64)]]
    sheet = labelled_sheet(cells, ["first", "second"], ["a", "b"])
    plain = labelled_sheet([[picture(64), None], [None, picture(64)]])
    assert plain.size == (132, 132) and sheet.width > 150 and sheet.height > 140
    assert plain.getpixel((10, 10)) == (255, 165, 0) and plain.getpixel((100, 10)) == (255, 255, 255)
    assert plain.getpixel((100, 100)) == (255, 165, 0)
    with pytest.raises(ValueError, match="at least one picture"):
        labelled_sheet([["text"]])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--dims 2 8 a.png", "--dims 2 --dims 8 a.png"),
        ("a.png --dims 2 -8 1e3 --seed 3", "a.png --dims 2 --dims -8 --dims 1e3 --seed 3"),
        ("--texts a b --seed 3 c", "--texts a --texts b --seed 3 c"),
        ("--texts a b -- c", "--texts a --texts b c"),
        ("c -- --texts a b", "c -- --texts a b"),
        ("--texts --seed 3 4", "--texts --seed 3 4"),
        ("--seed 1 2", "--seed 1 2"),
    ],
)
def test_options_of_several_values(arguments: str, expected: str) -> None:
    assert spread(arguments.split(), {"--dims": True, "--texts": False}) == expected.split()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    picture(80).save(tmp_path / "orange.png")
    return tmp_path / "orange.png"


def test_letters_that_a_font_has_not_are_named() -> None:
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for text in ("猫 犬", "猫"):
        for given in (None, font):
            with pytest.raises(UsageError, match=r"has no letters for '猫'.*--font"):
                stick_label(picture(), text, font=given)
    assert stick_label(picture(), "Ünïçödé Привет", font=font).size == picture().size
    with pytest.raises(UsageError, match=r"Pillow's own font has no letters for 'П', .* and 2 more; name one"):
        stick_label(picture(), "Приветствуйм")
    check_letters("pizza, 50 %!\n“fox…” \u00a0\u200d")


def test_the_commands_write_one_sheet_each(tiny_bundle: Path, file: Path, tmp_path: Path, run_cli: Run) -> None:
    common = ["--model", tiny_bundle, "--out", tmp_path / "out", "--size", 64, "--json"]
    records = {}
    for name, command in {
        "typographic": ["typographic", file, "--texts", "pizza", "iPod", "--labels", "pizza", "fox", "-n", 1],
        "compare": ["compare-conditioning", "pizza", "-n", 2],
        "guidance": ["guidance-sheet", "pizza", "--scales", 1, 2, "--prior-scales", 1, 3, "-n", 2],
    }.items():
        code, out, err = run_cli(*command, *common)
        assert code == 0 and out.count("\n") == 1, err
        records[name] = json.loads(out)
        with Image.open(records[name]["path"]) as sheet:
            assert sheet.text["model"] == "tiny" and sheet.text["command"].startswith(name)  # type: ignore[attr-defined]
    rows = records["typographic"]["rows"]
    assert [row["text"] for row in rows] == [None, "pizza", "iPod"]
    assert set(rows[0]["probabilities"]) == {"pizza", "fox"}
    assert {name: len(scores) for name, scores in records["compare"]["clip_scores"].items()} == {
        "caption": 2, "text embedding": 2, "prior": 2,
    }  # fmt: skip
    with Image.open(records["guidance"]["path"]) as sheet:
        assert sheet.height > 4 * 64 and sheet.width < 4 * 64
    assert (records["guidance"]["scales"], records["guidance"]["prior_scales"]) == ([1, 2], [1, 3])


def test_bad_input_on_the_command_line(tiny_bundle: Path, file: Path, tmp_path: Path, run_cli: Run) -> None:
    model = ["--model", tiny_bundle, "--out", tmp_path / "o.png", "--size", 64]
    noise = tmp_path / "noise.png"
    noise.write_bytes(b"no picture")
    for command, code, message in (
        (["pca", noise], 1, "is not an image"),
        (["pca", tmp_path / "gone.png"], 1, "there is no image file at"),
        (["pca", file], 1, "holds no PCA"),
        (["pca", file, "--dims", "few"], 2, "--dims"),
        (["typographic", file], 2, "--texts"),
        (["typographic", file, "--texts", " "], 2, "text 1 is empty"),
        (["typographic", file, "--texts", "a", "--labels", "b"], 2, "leaves CLIP no choice"),
        (["compare-conditioning", ""], 2, "prompt 1 is empty"),
        (["guidance-sheet", "pizza", "--scales", "-1"], 2, "guidance is -1"),
        (["guidance-sheet", "pizza", "--scales", "nan"], 2, "guidance is nan"),
    ):
        got, out, err = run_cli(*command, *model)
        assert (got, out) == (code, "") and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "o.png").exists()
