"""The paper's manipulations on the bundled model, with pictures that it was trained on, and their commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from unclip import Latents, UnCLIP
from unclip.data.images import to_tensor
from unclip.geometry import peak_signal_to_noise

Run = Callable[..., tuple[int, str, str]]
APPLE, PIZZA, BALL = 0, 1, 2
STEPS = 12


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    with Image.open(Path(__file__).parent / "data" / "emoji_64.png") as sheet:
        return [sheet.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(4)]


@pytest.fixture(scope="module")
def model() -> UnCLIP:
    return UnCLIP.from_pretrained(device="cpu", size=64)


@pytest.fixture(scope="module")
def truth(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(picture, 64) for picture in pictures])


@pytest.fixture(scope="module")
def latents(model: UnCLIP, pictures: list[Image.Image]) -> Latents:
    return model.encode(pictures[:3], steps=STEPS, refinements=2)


def test_a_hundred_steps_reconstruct_a_picture_to_over_30_db(model: UnCLIP, pictures: list[Image.Image]) -> None:
    trip = model.round_trip(pictures[3], steps=100, refinements=0)
    assert trip.psnr > 30
    assert trip.latents.noise is not None
    assert 0.6 < float(trip.latents.noise.square().mean().sqrt()) < 1.2  # noise, and no enlarged error


def test_few_steps_with_refinements_do_as_well(model: UnCLIP, latents: Latents, truth: Tensor) -> None:
    back = model.reconstruct(latents, output="tensor")
    assert isinstance(back, Tensor) and bool((peak_signal_to_noise(back, truth[:3]) > 30).all())


def test_an_interpolation_begins_and_ends_at_the_two_pictures(model: UnCLIP, latents: Latents, truth: Tensor) -> None:
    drawn = model.interpolate([latents[:1], latents[1:2]], frames=3, output="tensor")
    assert isinstance(drawn, Tensor)
    assert bool((peak_signal_to_noise(drawn[[0, 2]], truth[:2]) > 30).all())
    assert bool((peak_signal_to_noise(drawn[1:2].expand(2, -1, -1, -1), truth[:2]) < 25).all())


def test_a_text_diff_nears_its_text_and_changes_the_picture(
    model: UnCLIP, pictures: list[Image.Image], truth: Tensor
) -> None:
    latents = model.encode(pictures[:1], steps=50)  # in few steps the picture frays at the far end
    way = model.toward(latents, "green apple", base="red apple", max_theta=0.5, frames=5)
    wanted = model.embed_text("green apple").embedding[0]
    cosines = way.embedding @ wanted
    assert bool((cosines[1:] > cosines[:-1]).all())
    drawn = model.frames_of(way[::2], output="tensor")  # θ = 0, 0.25 and 0.5, between which the paper's end
    assert isinstance(drawn, Tensor)
    assert float(peak_signal_to_noise(drawn[:1], truth[:1])) > 30
    seen = model.embed_image(drawn) @ wanted
    assert bool((seen[1:] > seen[:-1]).all())  # the drawn picture itself comes nearer to the text
    body = drawn[:, :, 36:56, 12:36].mean(dim=(2, 3))
    green = body[:, 1] - body[:, 0]
    assert float(green[1]) > float(green[0]) + 0.2 and float(green[2]) > float(green[1]) + 0.2  # it gains on red
    fresh = model.decode(way.embedding[::2], output="tensor", size=64)  # which the picture's x_T does not hold back
    nearer = (model.embed_image(fresh) @ wanted).diff()
    assert float(nearer[0]) > 0 and float(nearer[1]) > 0.1


def test_eta_moves_away_from_the_picture_step_by_step(model: UnCLIP, latents: Latents, truth: Tensor) -> None:
    drawn = [model.variations(latents[2:], eta=eta, output="tensor") for eta in (0.0, 0.3, 1.0)]
    near = [float(peak_signal_to_noise(one, truth[2:3])) for one in drawn]
    assert near == sorted(near, reverse=True) and near[0] > 30 > near[2] > 12


@pytest.fixture
def files(pictures: list[Image.Image], tmp_path: Path) -> dict[str, Path]:
    for name, picture in zip(("apple", "pizza"), pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in ("apple", "pizza")}


def test_reconstruct_reports_and_its_latents_are_used_again(run_cli: Run, files: dict[str, Path]) -> None:
    folder = files["apple"].parent
    kept = folder / "apple.safetensors"
    common = ["--size", 64, "--out", folder / "out"]
    code, out, _ = run_cli("reconstruct", files["apple"], "--steps", 8, "--latents", kept, *common)
    assert code == 0 and "PSNR " in out.splitlines()[-1] and out.splitlines()[-1].endswith(" dB at 64 px")
    assert kept.is_file() and len(list((folder / "out").glob("apple-reconstructed-*.png"))) == 1
    code, _, err = run_cli("reconstruct", files["apple"], "--steps", 8, "--latents", kept, *common)
    assert code == 1 and "exists; pass --overwrite" in err
    code, out, _ = run_cli("variations", "--latents", kept, "--eta", 0.5, "-n", 2, *common)
    assert code == 0 and len(out.splitlines()) == 2
    code, out, _ = run_cli("variations", "--latents", kept, "--eta-sheet", 0, 1, "-n", 2, *common, "--json")
    assert code == 0 and json.loads(out)["etas"] == [0.0, 1.0]
    with Image.open(json.loads(out)["path"]) as sheet:
        assert sheet.width > 2 * 64 and sheet.height > 2 * 64


def test_an_interpolation_as_frames_sheet_and_film(run_cli: Run, files: dict[str, Path]) -> None:
    folder = files["apple"].parent
    films = [folder / "film.gif", folder / "film.webp"]
    wanted = [flag for film in films for flag in ("--animate", film)]
    ends = [files["apple"], files["pizza"], "fox"]
    how = ["--frames", 2, "--steps", 3, "--size", 64, "--grid", "--out", folder / "frames", *wanted]
    code, out, err = run_cli("interpolate", *ends, *how)
    assert code == 0, err
    assert len(list((folder / "frames").glob("apple-to-pizza-to-fox-frame-*.png"))) == 3
    assert (folder / "frames" / "grid-1.png").is_file() and out.splitlines()[-2:] == [str(film) for film in films]
    for film in films:
        with Image.open(film) as moving:
            assert moving.n_frames == 3 and moving.size == (64, 64)  # type: ignore[attr-defined]
    code, out, _ = run_cli(
        "textdiff", files["apple"], "--from", "red apple", "--to", "green apple", "--max-theta", 0.4, "--frames", 2,
        "--steps", 3, "--size", 64, "--out", folder / "diff", "--json",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["theta"] for row in rows] == [0.0, 0.4] and rows[0]["frame"] == 0


def test_an_mp4_needs_its_encoder(run_cli: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from unclip.cli import animation

    film = files["apple"].parent / "film.mp4"
    if all(map(animation.importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
        frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
        assert animation.Animations([film], 8.0).save(frames) == [film]
        assert film.read_bytes()[4:8] == b"ftyp"
        film.unlink()
    for name in ("imageio", "imageio_ffmpeg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(animation.importlib.util, "find_spec", lambda name: None)
    code, _, err = run_cli("interpolate", files["apple"], "fox", "--animate", film)
    assert code == 2 and "needs imageio with ffmpeg, which is not installed: pip install 'unclip[video]'" in err


def test_bad_input_is_one_sentence(run_cli: Run, files: dict[str, Path]) -> None:
    apple, pizza, folder = files["apple"], files["pizza"], files["apple"].parent
    text = folder / "text.png"
    text.write_text("no picture")
    for code, arguments, message in (
        (2, ["interpolate", apple], "goes between 2 or more pictures or prompts, got 1"),
        (2, ["interpolate", apple, pizza, "--frames", 1], "frames is 1, expected 2 or more"),
        (1, ["interpolate", apple, text], "is not an image in a format that is read here"),
        (2, ["interpolate", apple, " "], "an end is empty"),
        (2, ["interpolate", apple, pizza, "--noise", "pink"], "--noise is 'pink'"),
        (2, ["interpolate", apple, pizza, "--animate", folder / "a.avi"], "asks for .avi; expected .gif, .webp, .mp4"),
        (2, ["interpolate", apple, pizza, "--fps", 0], "--fps is 0"),
        (1, ["interpolate", "--image", folder / "none.png", "--image", apple], "there is no image file at"),
        (2, ["interpolate", apple, apple, "--size", 64, "--steps", 2], "ends 1 and 2 have the same CLIP embedding"),
        (2, ["textdiff", apple, "--to", "fox", "--max-theta", 1.2], "--max-theta is 1.2, expected above 0"),
        (2, ["textdiff", apple, "--to", "fox", "--max-theta", 0], "--max-theta is 0, expected above 0"),
        (2, ["textdiff", apple, "--to", "fox", "--frames", 1], "frames is 1"),
        (2, ["textdiff", apple, "--to", " "], "--to is empty"),
        (2, ["textdiff", apple, "--to", "fox", "--from", "fox", "--size", 64], "have the same CLIP embedding"),
        (1, ["textdiff", text, "--to", "fox"], "is not an image in a format"),
        (1, ["reconstruct", text], "is not an image in a format"),
        (2, ["variations", apple, "--eta", 2], "eta is 2, expected 0"),
        (2, ["variations", apple, "--eta", 0.5, "--eta-sheet", 0, 1], "exclude each other"),
        (2, ["variations"], "name the picture to vary, or its latents with --latents"),
        (2, ["variations", apple, "--latents", apple], "one of the two"),
        (1, ["variations", "--latents", apple, "--eta", 1], "is damaged or not a safetensors file"),
    ):
        got, _, err = run_cli(*arguments)
        assert (got, message in err, err.count("\n")) == (code, True, 1), (arguments, err)
