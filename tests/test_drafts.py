"""Upsamplers on pairs: low-resolution pictures from a column of the data, and `unclip drafts`, which makes them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_upsampler import scenes
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unclip.config import DataConfig, parse_config
from unclip.data import build_batches
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError
from unclip.pipeline import UnCLIP
from upsamplers.config import UpsamplerConfig, UpsamplerRunConfig
from upsamplers.network import Upsampler
from upsamplers.objective import downsample, pair, upsampler_loss
from upsamplers.sampling import UpsamplerStage

Run = Callable[..., tuple[int, str, str]]
COUNT, LOW, FACTOR = 7, 8, 4

pytestmark = pytest.mark.usefixtures("private_cache")


def blocks(index: int) -> np.ndarray:
    """(8, 8, 3): another colour for each pixel."""
    return np.random.default_rng(index).integers(0, 256, (LOW, LOW, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def pictures(index: int) -> tuple[bytes, bytes]:
    """A picture of 32 px whose squares of 4 px are the pixels of the smaller one, and the smaller one, inverted."""
    small = blocks(index)
    return png(small.repeat(FACTOR, 0).repeat(FACTOR, 1)), png(255 - small)


def folder_of(folder: Path, lacking: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as lines:
        for index in range(COUNT):
            large, small = pictures(index)
            (folder / f"{index}.png").write_bytes(large)
            (folder / f"{index}-draft.png").write_bytes(small)
            draft = None if index in lacking else f"{index}-draft.png"
            lines.write(json.dumps({"file_name": f"{index}.png", "caption": f"c{index}", "draft": draft}) + "\n")
    return folder


def tar_of(file: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        for index in range(COUNT):
            large, small = pictures(index)
            for field, content in (("draft.png", small), ("png", large), ("txt", f"c{index}".encode())):
                member = tarfile.TarInfo(f"{index}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file


def parquet_of(file: Path) -> Path:
    import datasets

    pairs = [pictures(index) for index in range(COUNT)]
    columns = {
        "image": [{"bytes": large, "path": None} for large, _ in pairs],
        "draft": [{"bytes": small, "path": None} for _, small in pairs],
        "text": [f"c{index}" for index in range(COUNT)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "draft": datasets.Image(), "text": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(file))
    return file


def data(source: Path, **changes: Any) -> DataConfig:
    body = {"source": str(source), "image_size": 32, "low_size": LOW, "low_column": "draft", **changes}
    return parse_config(DataConfig, body)


def check_pairs(batch: Any, edge: int) -> None:
    """Each low-resolution picture is the inverse of its own crop's squares."""
    assert batch["image"].shape[1:] == (3, edge, edge)
    assert batch["low"].shape[1:] == (3, edge // FACTOR, edge // FACTOR)
    torch.testing.assert_close(batch["low"], -F.avg_pool2d(batch["image"], FACTOR), atol=1e-5, rtol=0)
    assert batch["has_low"].all()


# ---- the data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"cache": True}, {"streaming": True}, {"workers": 1}],
    ids=["index", "cache", "stream", "workers"],
)
@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_crops_and_flips_of_a_pair_agree(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    make: Any = {"folder": folder_of, "tar": tar_of, "parquet": parquet_of}[kind]
    source = make(tmp_path / {"folder": "set", "tar": "set.tar", "parquet": "set.parquet"}[kind])
    column = "draft.png" if kind == "tar" else "draft"
    config = data(source, low_column=column, crop_size=16, horizontal_flip=True, **changes)
    batches = build_batches(config, batch_size=COUNT, seed=1)
    corners = set()
    for _ in range(4):
        batch = next(batches)
        check_pairs(batch, 16)
        corners |= {tuple(image[:, 0, 0].tolist()) for image in batch["image"]}
    assert len(corners) > COUNT  # crops differ from epoch to epoch
    check_pairs(next(build_batches(data(source, low_column=column, **changes), batch_size=3)), 32)


def test_a_mixture_marks_what_has_no_low_resolution_picture(tmp_path: Path) -> None:
    plain, paired = folder_of(tmp_path / "plain"), folder_of(tmp_path / "paired", lacking=(0, 3))
    sources = [{"source": str(plain)}, {"source": str(paired), "low_column": "draft"}]
    config = parse_config(DataConfig, {"sources": sources, "image_size": 32, "low_size": LOW})
    batches = build_batches(config, batch_size=16)
    marked = 0
    for _ in range(3):
        batch = next(batches)
        own = batch["has_low"]
        assert batch["low"][~own].abs().max() == 0
        torch.testing.assert_close(batch["low"][own], -F.avg_pool2d(batch["image"][own], FACTOR), atol=1e-5, rtol=0)
        assert not own[[caption in ("c0", "c3") for caption in batch["caption"]]].any()
        marked += int(own.sum())
    assert 0 < marked < 48


def test_a_run_with_pairs_is_resumed_exactly(tmp_path: Path) -> None:
    config = data(folder_of(tmp_path / "set"), crop_size=16, horizontal_flip=True)
    batches = build_batches(config, batch_size=5)
    next(batches)
    state = batches.state_dict()
    expected = next(batches)
    again = build_batches(config, batch_size=5)
    again.load_state_dict(state)
    found = next(again)
    assert torch.equal(found["low"], expected["low"]) and torch.equal(found["image"], expected["image"])


def test_a_broken_low_resolution_picture_costs_its_sample(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "set")
    (source / "2-draft.png").write_bytes(b"no picture")
    batches = build_batches(data(source), batch_size=COUNT - 1)
    assert "c2" not in next(batches)["caption"]
    assert "the low-resolution picture of" in batches.tally.report()


def test_what_the_data_refuse(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "set")
    with pytest.raises(UnclipError, match=r"no column 'sketch' for the low-resolution picture; columns found: .*draft"):
        build_batches(data(source, low_column="sketch"), batch_size=2)
    with pytest.raises(UsageError, match="augment and restyle change the image and not"):
        data(source, augment=True)
    with pytest.raises(UsageError, match="image_size 32 is not a multiple of low_size 12"):
        data(source, low_size=12)
    with pytest.raises(UsageError, match="low_column is 'draft', but scenes are drawn"):
        build_batches(data(Path("synthetic")), batch_size=2)
    with pytest.raises(UsageError, match="which only upsamplers are conditioned on; leave it out"):
        build_batches(data(source, low_size=None), batch_size=2)


def test_the_run_says_the_size(tmp_path: Path) -> None:
    model = {"low_size": LOW, "high_size": 32}
    body = {"model": model, "data": {"source": str(tmp_path), "image_size": 32, "low_column": "draft"}}
    assert parse_config(UpsamplerRunConfig, body).data.low_size == LOW
    with pytest.raises(UsageError, match=r"low_size is 16, expected model.low_size 8"):
        parse_config(UpsamplerRunConfig, {**body, "data": {**body["data"], "low_size": 16}})  # type: ignore[dict-item]
    plain = {"model": model, "data": {"image_size": 32}}
    assert parse_config(UpsamplerRunConfig, plain).data.low_size is None
    mixed = {"image_size": 32, "sources": [{"source": "a", "low_column": "draft"}, {"source": "b"}]}
    assert parse_config(UpsamplerRunConfig, {"model": model, "data": mixed}).data.low_size == LOW
    for wrong in (3, None):
        for given in ({"data": body["data"]}, {"data": {}, "crop_fraction": 0.25}):
            with pytest.raises(UsageError, match="model: input should be"):
                parse_config(UpsamplerRunConfig, {"model": wrong, **given})
    late = {"init_from": "somewhere", "data": {"image_size": 32, "low_column": "draft"}}
    first = parse_config(UpsamplerRunConfig, late)
    assert first.data.low_size is None
    assert parse_config(UpsamplerRunConfig, {**first.model_dump(), "model": model}).data.low_size == LOW


# ---- training ----------------------------------------------------------------------------------------------


def small() -> UpsamplerConfig:
    unet = {"model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "patch_size": 4}
    body = {"low_size": LOW, "high_size": 32, "unet": unet, "diffusion": {"prediction": "x_start"}, "residual": True}
    return parse_config(UpsamplerConfig, {**body, "steps": 2, "lowest_timestep": 60, "corruption": {"kind": "none"}})


def test_the_network_sees_the_picture_where_there_is_one() -> None:
    truth, config = scenes(4, 32), small()
    low, own = torch.rand(4, 3, LOW, LOW), torch.tensor([True, False, True, False])
    generator = torch.Generator().manual_seed(0)
    x_start, seen = pair(truth, config, generator, low=low, has_low=own)
    assert torch.equal(x_start, truth) and torch.equal(seen[own], low[own])
    assert torch.equal(seen[~own], downsample(truth, config)[~own])


def test_an_upsampler_learns_what_its_decoder_gets_wrong() -> None:
    """The pairs' pictures are too pale; trained on them the upsampler gives full colour, trained without it cannot."""
    config, truth = small(), scenes(4, 32)
    pale = downsample(truth, config) * 0.6

    def error(batch: dict[str, Tensor]) -> float:
        torch.manual_seed(0)
        network, random = Upsampler(config), torch.Generator().manual_seed(0)
        process, optimizer = GaussianDiffusion(config.diffusion), torch.optim.AdamW(network.parameters(), lr=1e-2)
        for _ in range(25):
            loss = upsampler_loss(network, process, config, batch, random)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        drawn = UpsamplerStage.from_network(network.eval()).sample(pale, range(len(pale)))
        return float(F.mse_loss(drawn, truth))

    paired = error({"image": truth, "low": pale, "has_low": torch.ones(4, dtype=torch.bool)})
    assert paired < 0.5 * error({"image": truth})


# ---- the command -------------------------------------------------------------------------------------------


def test_drafts_are_the_models_own_pictures(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    source, out = folder_of(tmp_path / "set"), tmp_path / "pairs"
    options = ["--model", tiny_bundle, "--samples", 10, "--size", 128, "--low-size", 64, "--batch-size", 4]
    code, printed, err = run_cli("drafts", "--data", source, "--out", out, *options, "--seed", 5, "--device", "cpu")
    assert code == 0, err
    assert printed.strip() == str(out)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {row["caption"] for row in rows} == {f"c{index}" for index in range(COUNT)}
    system = UnCLIP.from_pretrained(tiny_bundle, device="cpu")
    for number in (0, 9):
        drawn = system.sample(rows[number]["caption"], size=64, seed=5 + number)[0]
        with Image.open(out / rows[number]["draft"]) as kept:
            assert np.abs(np.asarray(kept, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1
        with Image.open(out / rows[number]["file_name"]) as picture:
            assert picture.size == (128, 128)
    body = {"source": str(out), "low_column": "draft", "image_size": 128, "low_size": 64, "crop_size": 32}
    batch = next(build_batches(parse_config(DataConfig, body), batch_size=4))
    assert batch["low"].shape == (4, 3, 16, 16) and batch["has_low"].all()


def test_drafts_from_the_pictures_embeddings(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    source, out = folder_of(tmp_path / "set"), tmp_path / "pairs"
    options = ["--model", tiny_bundle, "--samples", 1, "--size", 128, "--from-image", "--device", "cpu"]
    code, _, err = run_cli("drafts", "--data", source, "--out", out, *options)
    assert code == 0, err
    system = UnCLIP.from_pretrained(tiny_bundle, device="cpu")
    row = json.loads((out / "metadata.jsonl").read_text())
    drawn = system.decode(system.embed_image(out / row["file_name"]), size=64, seed=0)[0]
    with Image.open(out / row["draft"]) as kept:
        assert np.abs(np.asarray(kept, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1


def test_drawings_of_something_else_are_left_out(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    options = ["--data", folder_of(tmp_path / "set"), "--model", tiny_bundle, "--samples", 6, "--size", 128]
    options += ["--batch-size", 4, "--device", "cpu"]

    def pairs(name: str, *more: object) -> tuple[str, dict[str, dict[str, Any]]]:
        code, _, err = run_cli("drafts", "--out", tmp_path / name, *options, *more)
        assert code == 0, err
        rows = (json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines())
        return err, {row["file_name"]: row for row in rows}

    err, everything = pairs("all")
    assert len(everything) == 6 and "kept" not in err
    for row in everything.values():
        large, small = (Image.open(tmp_path / "all" / row[column]) for column in ("file_name", "draft"))
        reduced = np.asarray(large, dtype=float).reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert abs(np.sqrt(((reduced - np.asarray(small, dtype=float)) ** 2).mean()) - row["error"]) < 0.5
    limit = sorted(row["error"] for row in everything.values())[2] + 0.01
    err, some = pairs("some", "--max-error", limit)
    assert "3 of 6 pairs kept" in err
    assert some == {name: row for name, row in everything.items() if row["error"] < limit}
    for folder in ("images", "drafts"):
        kept = {file.name: file.read_bytes() for file in (tmp_path / "some" / folder).iterdir()}
        assert len(kept) == 3
        assert all((tmp_path / "all" / folder / name).read_bytes() == content for name, content in kept.items())
    code, _, err = run_cli("drafts", "--out", tmp_path / "none", *options, "--max-error", 0)
    assert code == 1 and "none of 6 drawings is within --max-error 0 of its picture" in err
    assert not (tmp_path / "none").exists()


def test_what_drafts_refuse(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    source = folder_of(tmp_path / "set")
    command = ["drafts", "--model", tiny_bundle, "--data", source, "--device", "cpu"]
    code, _, err = run_cli(*command, "--out", source)
    assert code == 1 and "is not empty; name a folder that is new or empty" in err
    out = tmp_path / "pairs"
    code, _, err = run_cli(*command, "--out", out, "--size", 100)
    assert code == 2 and "--size 100 is not a multiple (2 or more) of --low-size 64" in err
    code, _, err = run_cli(*command, "--out", out, "--set", "crop_size=32")
    assert code == 2 and "leave image_size and crop_size out" in err
    code, _, err = run_cli(*command, "--out", out, "--set", "horizontal_flip=true")
    assert code == 2 and "leave horizontal_flip, augment and restyle out" in err
    code, _, err = run_cli(*command, "--out", out, "--low-size", 8, "--size", 16)
    assert code == 2 and "8" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
