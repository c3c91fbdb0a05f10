"""Shards and samples that are damaged cost themselves, and are named; the rest is read."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from helpers_data import build, captions, encoded, plain, write_parquet, write_tar
from PIL import Image

from unclip.errors import UnclipError

pytestmark = pytest.mark.usefixtures("private_cache")


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("streaming", [True, False])
def test_damaged_tars_lose_what_is_damaged(tmp_path: Path, streaming: bool) -> None:
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", plain(range(10 * shard, 10 * shard + 10)))
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])  # truncated
    garbled = bytearray((tmp_path / "2.tar").read_bytes())
    size = 6 * 512  # three members a sample, header and content
    garbled[4 * size : 4 * size + 512] = b"\x17" * 512  # the fifth sample's first header
    (tmp_path / "2.tar").write_bytes(garbled)
    (tmp_path / "3.tar").write_bytes(b"not a tar at all" * 100)
    (tmp_path / "4.tar").write_bytes(b"")
    batches = build(tmp_path, streaming=streaming)
    read = set(captions(batches, 30))
    assert read >= {f"c{i}" for i in [*range(10), 10, 11, 12, 20, 21, 22]}
    assert not read & {f"c{i}" for i in (18, 19, *range(24, 50))}
    assert batches.tally.count == 4
    report = batches.tally.report()
    for words in ("1.tar: the tar is damaged", "2.tar: the tar is damaged", "3.tar", "4.tar: is empty"):
        assert words in report
    assert batches.tally.metrics() == {"data_broken": 4.0}


@pytest.mark.parametrize("streaming", [True, False])
def test_damaged_parquet_files_lose_what_is_damaged(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path, [12, 12, 12])
    (tmp_path / "00001.parquet").write_bytes((tmp_path / "00001.parquet").read_bytes()[:-50])  # no footer
    (tmp_path / "00003.parquet").write_bytes(b"")
    batches = build(tmp_path, streaming=streaming)
    assert set(captions(batches, 14)) == {f"c{i}" for i in (*range(12), *range(24, 36))}
    assert batches.tally.count == 2
    assert "00001.parquet" in batches.tally.report() and "00003.parquet: is empty" in batches.tally.report()
    if streaming:  # the damage is met while reading, and the state passes it
        resumed = build(tmp_path, streaming=True)
        resumed.load_state_dict(batches.state_dict())
        assert captions(resumed, 10) == captions(batches, 10)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_caption_that_is_no_utf8_costs_one_sample(tmp_path: Path, streaming: bool) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    samples = plain(range(8))
    samples["00003"]["txt"] = "café".encode("latin-1")
    samples["00004"]["json"] = b"{damaged"
    tar = build(write_tar(tmp_path / "a.tar", samples), streaming=streaming)
    assert set(captions(tar, 8)) == {f"c{i}" for i in (0, 1, 2, 4, 5, 6, 7)}  # the json is not needed
    assert "its caption is not UTF-8 text" in tar.tally.report() and "00003" in tar.tally.report()
    samples = plain(range(8), caption=lambda i: f"j{i}")
    samples["00003"]["json"] = '{"caption": "café"}'.encode("latin-1")
    inside = build(write_tar(tmp_path / "j.tar", samples), streaming=streaming, caption_column="json.caption")
    assert set(captions(inside, 8)) == {f"j{i}" for i in range(8) if i != 3}
    assert "00003.png: its json cannot be read" in inside.tally.report()

    raw = arrow.array([f"c{i}".encode() if i != 3 else b"caf\xe9" for i in range(8)], arrow.binary())
    texts = arrow.Array.from_buffers(arrow.string(), 8, raw.buffers())
    images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(8)]
    parquet.write_table(arrow.table({"image": images, "text": texts}), tmp_path / "b.parquet")
    table = build(tmp_path / "b.parquet", streaming=streaming)
    assert set(captions(table, 8)) == {f"c{i}" for i in range(8) if i != 3}
    assert table.tally.count == 1 and "3.png: its caption is not UTF-8 text" in table.tally.report()


@pytest.mark.parametrize("streaming", [True, False])
def test_odd_and_broken_pictures(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    grey = Image.new("L", (8, 8), 100)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures = {
        "cmyk": ("jpg", _saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")),
        "animated": ("gif", _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        "grey": ("png", _saved(grey, "PNG")),
        "huge": ("png", _saved(Image.new("L", (100, 90)), "PNG")),
        "zero": ("png", b""),
        "half": ("jpg", _saved(Image.effect_noise((64, 64), 50), "JPEG")[:700]),
        "text": ("png", b"<html>404</html>"),
    }
    samples = {key: {ending: data, "txt": key.encode()} for key, (ending, data) in pictures.items()}
    batches = build(write_tar(tmp_path / "a.tar", samples), batch_size=3, streaming=streaming)
    assert set(captions(batches, 8)) == {"cmyk", "animated", "grey"}
    assert batches.tally.count == 4
    report = batches.tally.report()
    assert all(name in report for name in ("huge", "zero", "half", "text"))
    assert "decompression bomb" in report and "is empty" in report


def test_nothing_but_damage_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 400)
    (tmp_path / "b.tar").write_bytes(b"no tar" * 400)
    with pytest.raises(UnclipError, match=r"cannot be read|can be used"):
        next(build(tmp_path, streaming=True))
    for name in "cd":
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UnclipError, match="cannot be read as parquet"):
        next(build(str(tmp_path / "*.parquet")))
