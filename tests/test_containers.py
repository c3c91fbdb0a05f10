"""Weights files that lie, and pickles that bite: refused with a sentence, and nothing of them is run."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import parse
from safetensors.torch import save_file

from unclip.errors import UnclipError
from unclip.interop.containers import read_container, safetensors_shapes, tensors_of
from unclip.interop.records import ALLOWED, Record, version_text


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def wraps(bomb: Bomb) -> dict[str, Any]:
    weights = {"w": torch.ones(2)}
    return {
        "alone": bomb,
        "beside": {"model": weights, "version": bomb},
        "nested": {"state": {"layers": [weights, {"deep": (bomb,)}]}},
        "as_key": {"model": weights, "config": collections.OrderedDict(a=[bomb])},
    }


@pytest.mark.parametrize("where", ["alone", "beside", "nested", "as_key"])
@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_a_bomb_is_refused_and_not_run(tmp_path: Path, where: str, name: str, zipped: bool) -> None:
    target = tmp_path / "ran"
    torch.save(wraps(Bomb(target))[where], tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnclipError, match=r"(?s)posix\.mkdir.*run code.*safetensors"):
        read_container(tmp_path / name)
    assert not target.exists()


def test_the_bomb_is_a_bomb(tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "x.pth")
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_plain_pickles_and_old_tars_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"model": Bomb(target)}))
    with pytest.raises(UnclipError, match=r"neither safetensors nor written by torch\.save"):
        read_container(tmp_path / "plain.ckpt")
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        for member in ("pickle", "storages", "tensors", "../escaped"):
            info = tarfile.TarInfo(member)
            body = pickle.dumps(Bomb(target))
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    with pytest.raises(UnclipError, match="tar format"):
        read_container(tmp_path / "old.pth")
    assert not target.exists() and not (tmp_path.parent / "escaped").exists()


def test_named_records_are_read_and_never_imported(tmp_path: Path) -> None:
    saved = {"version": parse("1.15.6"), "model": {"w": torch.arange(3.0)}, "step": torch.tensor([7])}
    for zipped in (True, False):
        torch.save(saved, tmp_path / "prior.pth", _use_new_zipfile_serialization=zipped)
        read = read_container(tmp_path / "prior.pth")
        assert isinstance(read["version"], Record) and version_text(read["version"]) == "1.15.6"
        assert read["model"]["w"].tolist() == [0, 1, 2]
    assert "pytorch_warmup.base.LinearWarmup" in ALLOWED and "pytorch_warmup" not in sys.modules
    assert not any(name.startswith(("os.", "posix.", "builtins.", "subprocess.")) for name in ALLOWED)


def test_versions_of_older_packaging_are_understood() -> None:
    inner = Record(0, (1, 0, 2), None, None, None, None)
    old = Record()
    old.__setstate__({"_version": inner, "_key": ()})
    assert version_text(old) == "1.0.2"
    assert version_text("0.26.2") == "0.26.2"
    assert version_text(7) is None and version_text(Record()) is None


def header_file(path: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    body = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}, r"claims F32 .*4,096\.0 GiB"),
        ({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}, "for it"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "belong to no tensor"),
        ({"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}, "does not describe"),
        ({"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}, "known are"),
        ([1, 2], "does not describe"),
    ],
)
def test_headers_that_claim_too_much(tmp_path: Path, entry: Any, said: str) -> None:
    file = header_file(tmp_path / "x.safetensors", {"w": entry})
    with pytest.raises(UnclipError, match=said):
        read_container(file)


def test_a_header_longer_than_its_file_and_overlaps(tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match="header claims"):
        read_container(header_file(tmp_path / "a.safetensors", {"w": 1}, length=2**60))
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    with pytest.raises(UnclipError, match="overlap"):
        read_container(header_file(tmp_path / "b.safetensors", {"a": one, "b": one}))
    save_file({"w": torch.ones(2, 3, dtype=torch.float16)}, tmp_path / "good.safetensors")
    assert safetensors_shapes(tmp_path / "good.safetensors") == {"w": ("F16", (2, 3))}
    assert read_container(tmp_path / "good.safetensors")["w"].shape == (2, 3)


def test_tensors_larger_than_their_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "x.pth")
    with pytest.raises(UnclipError, match=r"claims \[1000000000000\]"):
        read_container(tmp_path / "x.pth")


def test_storages_larger_than_the_file(tmp_path: Path) -> None:
    """The number of elements in a legacy stream, raised to 2^31 − 1: refused before 8 GiB are taken."""
    torch.save({"w": torch.zeros(1234)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    body = (tmp_path / "x.pth").read_bytes()
    declared = b"M" + struct.pack("<H", 1234)  # BININT2, in the storage and in the shape
    assert declared in body
    (tmp_path / "x.pth").write_bytes(body.replace(declared, b"J" + struct.pack("<i", 2**31 - 1), 1))
    with pytest.raises(UnclipError, match="2,147,483,647 numbers"):
        read_container(tmp_path / "x.pth")


def test_zips_that_torch_would_not_write(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    with pytest.raises(UnclipError, match="compressed"):
        read_container(tmp_path / "bomb.pth")
    with zipfile.ZipFile(tmp_path / "out.pth", "w") as archive:
        archive.writestr("../data.pkl", b"")
    with pytest.raises(UnclipError, match="outside itself"):
        read_container(tmp_path / "out.pth")


def test_damaged_files_have_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match="no weights file at"):
        read_container(tmp_path / "none.pth")
    torch.save({"w": torch.ones(1000)}, tmp_path / "x.pth")
    body = (tmp_path / "x.pth").read_bytes()
    for name, cut in (("half.pth", body[: len(body) // 2]), ("empty.pth", b""), ("noise.pth", bytes(range(256)) * 9)):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(UnclipError, match=name):
            read_container(tmp_path / name)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(UnclipError, match="holds a list"):
        read_container(tmp_path / "list.pth")
    with pytest.raises(UnclipError, match="holds no prior"):
        tensors_of(tmp_path / "x.pth", {"a": 1}, "prior")
