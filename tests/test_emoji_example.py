"""The emoji example: SVG files in, an image-text data set out."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "emoji" / "prepare.py"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}">'
    '<rect width="{0}" height="{1}" fill="red"/></svg>'
)
WIDE = SVG.format(20, 10)
TALL = SVG.format(10, 20)


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    """The script as a module; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("emoji_prepare", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three emoji, one of them with a skin tone."""
    folder = tmp_path / "source"
    (folder / "svg").mkdir(parents=True)
    rows = []
    for stem, name, words, tone, svg in [
        ("a", "pizza", ["cheese", "slice"], None, WIDE),
        ("b", "woman’s hat", ["garden", "slice"], None, TALL),
        ("c", "waving hand", ["hello"], "dark", WIDE),
    ]:
        (folder / "svg" / f"{stem}.svg").write_text(svg, encoding="utf-8")
        row = {"file_name": f"svg/{stem}.svg", "emoji": stem, "name": name, "keywords": words}
        rows.append(json.dumps({**row, "group": "Objects", "skin_tone": tone}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def run(prepare: ModuleType, source: Path, out: Path, *more: str) -> int:
    """The command line with small pictures and no worker processes."""
    return prepare.main(["--source", str(source), "--out", str(out), "--size", "32", "--workers", "1", *more])


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_drawings_are_centred_on_white(prepare: ModuleType, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(prepare, source, out) == 0
    assert [row["name"] for row in lines(out)] == ["pizza", "woman’s hat"]
    for row, edge in zip(lines(out), [(16, 2), (2, 16)], strict=True):
        with Image.open(out / row["file_name"]) as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))
            assert image.getpixel(edge) == (255, 255, 255)
            assert image.getpixel((31 - edge[0], 31 - edge[1])) == (255, 255, 255)
            assert image.getpixel((16, 16)) == (255, 0, 0)


def test_captions_fit_one_emoji_only(prepare: ModuleType, source: Path, tmp_path: Path) -> None:
    run(prepare, source, tmp_path / "out")
    pizza, hat = lines(tmp_path / "out")
    assert pizza["captions"][:3] == ["pizza", "a pizza", "a picture of a pizza"]
    assert "cheese" in pizza["captions"] and "slice" not in pizza["captions"]
    assert hat["caption"] == "woman's hat"
    assert len(set(pizza["captions"])) == len(pizza["captions"]) <= 12


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owl", "an owl"), ("unicorn", "a unicorn"), ("grapes", None), ("bus", "a bus"), ("skis", None),
     ("ear of corn", "an ear of corn"), ("bread", None), ("hourglass", "an hourglass")],
)  # fmt: skip
def test_article(prepare: ModuleType, name: str, expected: str | None) -> None:
    assert prepare.with_article(name, "Objects") == expected


def test_unknown_name_is_one_clear_sentence(
    prepare: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("# wanted\npizzza\n", encoding="utf-8")
    assert run(prepare, source, tmp_path / "out", "--names", str(names)) == 1
    error = capsys.readouterr().err
    assert "'pizzza'" in error and "'pizza'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_webdataset_layout(prepare: ModuleType, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(prepare, source, out, "--format", "webdataset") == 0
    with tarfile.open(out / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.png", "000000000.txt", "000000000.json"]
        text, meta = tar.extractfile("000000000.txt"), tar.extractfile("000000000.json")
        assert text is not None and text.read() == b"pizza"
        assert meta is not None and json.load(meta)["captions"][1] == "a pizza"
    assert run(prepare, source, out, "--format", "webdataset") == 0


def test_broken_drawing_is_named_and_skipped(
    prepare: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "svg" / "b.svg").write_text("<svg", encoding="utf-8")
    assert run(prepare, source, tmp_path / "out", "--workers", "2") == 0
    captured = capsys.readouterr()
    assert "woman’s hat" in captured.err and "1 broken and skipped" in captured.out
    assert [row["name"] for row in lines(tmp_path / "out")] == ["pizza"]


def test_goes_on_but_never_overwrites(prepare: ModuleType, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(prepare, source, out) == 0
    kept = (out / "images" / "a.png").stat().st_mtime_ns
    (out / "images" / "b.png").unlink()
    assert run(prepare, source, out) == 0
    assert (out / "images" / "b.png").exists()
    assert (out / "images" / "a.png").stat().st_mtime_ns == kept
    assert run(prepare, source, out, "--size", "16") == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x", encoding="utf-8")
    assert run(prepare, source, other) == 1


def test_wrong_usage_exits_2(prepare: ModuleType, source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run(prepare, source, tmp_path / "out", "--size", "0")
    assert stop.value.code == 2


def test_familiar_names_are_well_formed() -> None:
    text = (SCRIPT.parent / "familiar.txt").read_text(encoding="utf-8")
    names = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert "pizza" in names and 300 <= len(names) == len(set(names))
