"""Sources, order, resume and damage; every data set is written by the test and read without a network."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.config import DataConfig
from unclip.data import Batches, build_batches
from unclip.data.order import IndexOrder
from unclip.data.rows import Row
from unclip.errors import UnclipError, UsageError

COUNT = 23  # a prime, so that batches never end with an epoch


pytestmark = pytest.mark.usefixtures("private_cache")


def _encoded(index: int, kind: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture whose grey value tells which it is."""
    stream = io.BytesIO()
    Image.new("RGB", size, (index * 8, index * 8, index * 8)).save(stream, kind)
    return stream.getvalue()


def _write_folder(folder: Path, count: int = COUNT, **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for index in range(count):
            (folder / f"{index}.png").write_bytes(_encoded(index))
            row = {name: make(index) for name, make in columns.items()} or {"caption": f"c{index}"}
            file.write(json.dumps({"file_name": f"{index}.png", **row}) + "\n")
    return folder


def _write_parquet(file: Path, first: int, count: int, typed: bool = True) -> None:
    import datasets

    rows = range(first, first + count)
    images = [{"bytes": _encoded(i), "path": f"{i}.png"} for i in rows]
    features = (
        datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}) if typed else None
    )
    table = {"image": images, "text": [f"c{i}" for i in rows]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(file))


def _write_tar(file: Path, first: int, count: int, text: bool = True, mixed: bool = False) -> None:
    with tarfile.open(file, "w") as tar:
        for index in range(first, first + count):
            odd = mixed and index % 2 == 1
            # img2dataset's json: texts, and numbers that may be null at first
            about = {"caption": f"c{index}", "width": None if index < 6 else 16, "error_message": None}
            members = {"png" if odd else "webp": _encoded(index, "PNG" if odd else "WEBP")}
            members["json"] = json.dumps(about).encode()
            if text:
                members["txt"] = f"c{index}".encode()
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{index:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data [1]")  # brackets are no pattern when the folder exists
    _write_folder(root / "folder")
    (root / "parquet").mkdir()
    (root / "tars").mkdir()
    _write_parquet(root / "parquet" / "a.parquet", 0, 10)
    _write_parquet(root / "parquet" / "b.parquet", 10, COUNT - 10)
    _write_tar(root / "tars" / "00000.tar", 0, 12)
    _write_tar(root / "tars" / "00001.tar", 12, COUNT - 12)
    _write_parquet(root / "one.parquet", 0, COUNT, typed=False)
    _write_tar(root / "mixed.tar", 0, COUNT, text=False, mixed=True)
    return {
        "folder": str(root / "folder"),
        "metadata": str(root / "folder" / "metadata.jsonl"),
        "parquet": str(root / "parquet"),
        "parquet glob": str(tmp_path_factory.getbasetemp() / "data ?1?0" / "parquet" / "*.parquet"),
        "one parquet": str(root / "one.parquet"),
        "tars": str(root / "tars"),
        "tar": str(root / "mixed.tar"),
    }


KINDS = ["folder", "metadata", "parquet", "parquet glob", "one parquet", "tars", "tar"]


def _build(source: str | Path, batch_size: int = 4, **options: Any) -> Batches:
    split = {key: options.pop(key) for key in ("rank", "world_size", "seed") if key in options}
    return build_batches(
        DataConfig(source=str(source), image_size=16, **options), batch_size=batch_size, **split
    )


def _captions(batches: Batches, count: int) -> list[str]:
    return [caption for batch in islice(batches, count) for caption in batch["caption"]]


def _same(first: Any, second: Any) -> bool:
    return first["caption"] == second["caption"] and torch.equal(first["image"], second["image"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_each_sample_once_an_epoch(
    sources: dict[str, str], kind: str, streaming: bool
) -> None:
    batches = _build(sources[kind], batch_size=COUNT, streaming=streaming)
    epochs = [next(batches), next(batches)]
    for batch in epochs:
        assert batch["image"].shape == (COUNT, 3, 16, 16)
        assert batch["image"].dtype == torch.float32
        assert sorted(batch["caption"]) == sorted(f"c{i}" for i in range(COUNT))
        for image, caption in zip(batch["image"], batch["caption"], strict=True):
            grey = (image.mean().item() + 1) * 127.5
            assert grey == pytest.approx(int(caption[1:]) * 8, abs=1.5)  # WebP is lossy
    assert epochs[0]["caption"] != epochs[1]["caption"]  # shuffled anew
    assert batches.tally.report() == ""


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["folder", "parquet", "tars"])
def test_ranks_are_disjoint_and_cover(sources: dict[str, str], kind: str, streaming: bool) -> None:
    shares = []
    for rank in range(2):
        batches = _build(sources[kind], batch_size=1, rank=rank, world_size=2, streaming=streaming)
        # by index rank 0 has 12 positions of the first epoch; a stream may be dealt out by unequal shards
        shares.append(_epoch_of(batches) if streaming else _captions(batches, 12 - rank))
    assert not set(shares[0]) & set(shares[1])
    assert sorted(shares[0] + shares[1]) == sorted(f"c{i}" for i in range(COUNT))


def _epoch_of(batches: Batches) -> list[str]:
    captions = []
    for batch in batches:
        if batches.state_dict()["epoch"] > 0:
            return captions
        captions += batch["caption"]
    raise AssertionError


@pytest.mark.parametrize("kind", ["folder", "parquet", "tars"])
@pytest.mark.parametrize("streaming", [False, True])
def test_resume_is_exact(sources: dict[str, str], kind: str, streaming: bool) -> None:
    options = {
        "streaming": streaming,
        "shuffle_buffer": 5,
        "horizontal_flip": True,
        "crop_size": 12,
        "seed": 3,
    }
    batches = _build(sources[kind], **options)
    states, expected = [batches.state_dict()], []
    for _ in range(20):  # more than three epochs
        expected.append(next(batches))
        states.append(json.loads(json.dumps(batches.state_dict())))
    resumed = _build(sources[kind], **options)
    for drawn in (0, 1, 3, 5, 6, 9, 11, 14):  # forwards and backwards in the same object
        resumed.load_state_dict(states[drawn])
        assert resumed.state_dict() == states[drawn]
        assert all(_same(a, b) for a, b in zip(expected[drawn : drawn + 6], resumed, strict=False))
    fresh = _build(sources[kind], **options)
    fresh.load_state_dict(states[7])
    assert all(_same(a, b) for a, b in zip(expected[7:], fresh, strict=False))


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_stream_resumes_exactly_on_each_rank(sources: dict[str, str], kind: str) -> None:
    for rank in range(2):
        options = {"streaming": True, "shuffle_buffer": 4, "rank": rank, "world_size": 2}
        batches = _build(sources[kind], **options)
        _captions(batches, 2)
        state = batches.state_dict()
        expected = _captions(batches, 8)
        resumed = _build(sources[kind], **options)
        resumed.load_state_dict(state)
        assert _captions(resumed, 8) == expected


def test_world_size_may_change_between_runs(sources: dict[str, str]) -> None:
    whole = _captions(_build(sources["folder"]), 10)
    first = [_build(sources["folder"], batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    begun = [_captions(batches, 2) for batches in first]
    assert sorted(begun[0] + begun[1]) == sorted(whole[:8])
    alone = _build(sources["folder"])
    alone.load_state_dict(first[1].state_dict())
    assert _captions(alone, 8) == whole[8:40]

    stream = _build(sources["folder"], streaming=True)
    stream_state = _build(sources["folder"], streaming=True, world_size=2).state_dict()
    with pytest.warns(UserWarning, match="was divided into 2 parts.*now is divided into 1"):
        stream.load_state_dict(stream_state)
    assert len(_captions(stream, 3)) == 12
    with pytest.raises(UnclipError, match=r"data\.streaming or data\.sources was changed"):
        stream.load_state_dict(first[0].state_dict())


def test_seed_decides_the_order(sources: dict[str, str]) -> None:
    for streaming in (False, True):
        runs = [_captions(_build(sources["folder"], seed=s, streaming=streaming), 5) for s in (0, 0, 1)]
        assert runs[0] == runs[1] != runs[2]


def test_cache_changes_nothing(sources: dict[str, str]) -> None:
    plain, cached = (_build(sources["folder"], batch_size=30, cache=c, augment=True) for c in (False, True))
    assert all(_same(a, b) for a, b in zip(islice(plain, 4), islice(cached, 4), strict=True))
    with pytest.raises(UsageError, match="set one of them"):
        _build(sources["folder"], cache=True, streaming=True)


def test_what_is_cached_are_pixels_and_not_the_files_as_well() -> None:
    encoded = b"x" * 1000
    row = Row("a", ("a",), lambda size: torch.zeros(3, size, size, dtype=torch.uint8), content=lambda: encoded)

    class Source:
        def __len__(self) -> int:
            return 1

        def rows(self, indices: list[int]) -> list[Row]:
            return [row for _ in indices]

    order = IndexOrder(Source(), True, 0, 1, 0)
    order.take(1)
    again = order.take(1)[0].row
    assert again.content is None and again.identity() == row.identity() and not again.encoded


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"streaming": True}])
def test_broken_images_are_counted_named_and_skipped(tmp_path: Path, options: dict[str, bool]) -> None:
    folder = _write_folder(tmp_path / "set")
    (folder / "3.png").write_bytes(b"<html>not found</html>")
    (folder / "4.png").write_bytes(_encoded(4)[:40])
    (folder / "5.png").unlink()
    batches = _build(folder, batch_size=20, **options)
    captions = _captions(batches, 3)
    assert sorted(captions) == sorted([f"c{i}" for i in range(COUNT) if i not in (3, 4, 5)] * 3)
    assert batches.tally.count == 3
    report = batches.tally.report()
    assert "3 broken samples were skipped" in report
    assert all(f"{i}.png" in report for i in (3, 4, 5))
    assert "there is no image file" in report and "\n" not in report


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_without_a_good_image_ends_in_an_error(tmp_path: Path, streaming: bool) -> None:
    folder = _write_folder(tmp_path / "set", 6)
    for index in range(6):
        (folder / f"{index}.png").write_bytes(b"nothing")
    with pytest.raises(UnclipError, match=r"no sample of the data set .* can be used: 6 broken samples"):
        next(_build(folder, streaming=streaming))


def test_lists_of_captions_are_drawn_from(tmp_path: Path) -> None:
    columns = {
        "caption": lambda i: "never",
        "captions": lambda i: [f"a{i}", f"b{i}"],
        "name": lambda i: "never",
    }
    captions = _captions(_build(_write_folder(tmp_path / "set", **columns), batch_size=COUNT), 20)
    assert {caption[1:] for caption in captions} == {str(i) for i in range(COUNT)}
    share = sum(caption[0] == "a" for caption in captions) / len(captions)
    assert 0.4 < share < 0.6


def test_samples_without_a_caption_are_skipped(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "set", caption=lambda i: None if i == 2 else f"c{i}")
    batches = _build(folder, batch_size=COUNT)
    assert "c2" not in _captions(batches, 2)
    assert "2.png: has no caption" in batches.tally.report()


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_named_when_one_is_missing(tmp_path: Path, streaming: bool) -> None:
    folder = _write_folder(tmp_path / "set", title_de=lambda i: "x", likes=lambda i: i)
    with pytest.raises(
        UnclipError, match=r"no caption column .*found: .*title_de, likes.*data\.caption_column"
    ):
        _build(folder, streaming=streaming)
    with pytest.raises(UnclipError, match=r"no column 'text' for the caption.*title_de"):
        _build(folder, caption_column="text", streaming=streaming)
    with pytest.raises(UnclipError, match=r"no column 'photo' for the image.*image"):
        _build(folder, image_column="photo", caption_column="title_de", streaming=streaming)
    assert _captions(_build(folder, caption_column="title_de", streaming=streaming), 1) == ["x"] * 4
    if not streaming:
        with pytest.raises(UnclipError, match=r"'likes' .* holds int64, expected text"):
            _build(folder, caption_column="likes")


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_and_missing_sources_say_where_they_looked(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(source: Path | str) -> str:
        with pytest.raises(UnclipError) as caught:
            _build(source, streaming=streaming)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "void").mkdir()
    assert f"{tmp_path / 'void'} holds no data set" in message(tmp_path / "void")
    (tmp_path / "void" / "metadata.jsonl").touch()
    assert "is empty" in message(tmp_path / "void")
    _write_parquet(tmp_path / "no_rows.parquet", 0, 0)
    assert "is empty" in message(tmp_path / "no_rows.parquet")
    _write_tar(tmp_path / "no_members.tar", 0, 0)
    assert "is empty" in message(tmp_path / "no_members.tar")
    assert "there is no data set at" in message(tmp_path / "absent")
    assert "no file matches the pattern" in message(tmp_path / "none*.parquet")
    (tmp_path / "notes.txt").write_text("x")
    assert "ending in .txt" in message(tmp_path / "notes.txt")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    assert "bad.parquet' cannot be read as parquet" in message(tmp_path / "bad.parquet")

    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    assert message("somebody/pictures").endswith("Hugging Face Hub: Couldn't reach")


def test_splits_are_told_apart_by_name(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "train-00000-of-00001.parquet", 0, 4)
    _write_parquet(tmp_path / "test-00000-of-00001.parquet", 4, 4)
    assert sorted(_captions(_build(tmp_path, split="test"), 1)) == ["c4", "c5", "c6", "c7"]
    assert sorted(_captions(_build(tmp_path, split="train"), 1)) == ["c0", "c1", "c2", "c3"]
    with pytest.raises(UnclipError, match="no split 'validation'; it holds test, train"):
        _build(tmp_path, split="validation")
    _write_folder(tmp_path / "folder" / "test", 4)
    assert sorted(_captions(_build(tmp_path / "folder", split="test"), 1)) == ["c0", "c1", "c2", "c3"]


def test_synthetic_batches_follow_the_split() -> None:
    first, again, other = (
        next(build_batches(DataConfig(split=s), batch_size=8)) for s in ("train", "train", "test")
    )
    assert _same(first, again) and not _same(first, other)
    assert first["image"].shape == (8, 3, 64, 64)
    assert first["image"].min() >= -1 and first["image"].max() <= 1


def test_crops_flips_and_augmentation_vary(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "set", 1)
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "0.png")
    plain = next(_build(folder))["image"][0]
    cropped = next(_build(folder, batch_size=40, crop_size=8))["image"]
    windows = {(y, x): plain[:, y : y + 8, x : x + 8] for y in range(9) for x in range(9)}
    found = [next(at for at, window in windows.items() if torch.equal(window, crop)) for crop in cropped]
    assert len(set(found)) > 20 and {0, 8} <= {y for y, _ in found}
    flipped = next(_build(folder, batch_size=60, horizontal_flip=True))["image"]
    mirrored = sum(torch.equal(image, plain.flip(2)) for image in flipped)
    assert 18 <= mirrored <= 42
    assert mirrored + sum(torch.equal(image, plain) for image in flipped) == 60
    augmented = next(_build(folder, batch_size=200, augment=True))["image"]
    untouched = sum(torch.equal(image, plain) for image in augmented)
    assert 20 <= untouched <= 60  # one in five
    assert augmented.abs().max() <= 1


def test_importing_the_package_is_light() -> None:
    code = "import unclip.data, sys; sys.exit(bool({'torch', 'datasets', 'PIL'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_shares_must_make_sense() -> None:
    with pytest.raises(UsageError, match="rank < world_size"):
        build_batches(DataConfig(), batch_size=4, rank=2, world_size=2)
