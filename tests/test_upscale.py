"""`unclip upscale` and `UnCLIP.upscale`: any picture, any aspect ratio, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_adapters import make_adapters
from PIL import Image

from unclip import UnCLIP, UnclipError, Upscaler, UsageError
from unclip.data.images import to_float
from upsamplers.upscale import plan_upscale, to_edge

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def upscaler(tiny_bundle: Path) -> Upscaler:
    return Upscaler.from_pretrained(tiny_bundle, device="cpu")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture, so that resizing keeps its look."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    if mode == "I;16":
        return Image.fromarray((x * 65535).astype(np.uint16))
    channels = [x, y, (x + y) / 2, np.where(x > 0.5, 1.0, 0.0)]
    if mode == "L":
        return Image.fromarray((x * 255).astype(np.uint8))
    array = np.stack(channels[: len(mode)], axis=-1)
    return Image.fromarray((array * 255).astype(np.uint8), mode)


# ---- which stages, what size -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "longer, size, start, inputs",
    [
        (3000, None, None, [256]),
        (256, 1024, None, [256]),
        (255, 1024, None, [64, 256]),
        (10, 1024, None, [64, 256]),
        (3000, 256, None, [64]),
        (3000, 1024, 64, [64, 256]),
        (80, 1024, 256, [256]),
    ],
)
def test_a_picture_starts_at_the_highest_stage_that_it_fills(
    upscaler: Upscaler, longer: int, size: int | None, start: int | None, inputs: list[int]
) -> None:
    stages = plan_upscale(upscaler.upsamplers, longer, size, start)
    assert [stage.config.low_size for stage in stages] == inputs


@pytest.mark.parametrize(
    "width, height, expected",
    [(300, 200, (256, 172)), (200, 300, (172, 256)), (40, 40, (256, 256)), (1000, 3, (256, 4)), (64, 64, (256, 256))],
)
def test_the_aspect_ratio_is_kept_and_nothing_cropped(
    upscaler: Upscaler, width: int, height: int, expected: tuple[int, int]
) -> None:
    result = upscaler.upscale(picture(width, height), size=256)[0]
    assert result.size == expected
    if min(expected) < 64:
        return  # a strip of a single row in the condition
    # The tiny model hardly changes the interpolated condition, so the corners are still the corners.
    small = np.asarray(picture(width, height).resize(expected, Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(result, dtype=float) - small).mean() < 40


def test_a_picture_of_the_input_size_is_taken_as_it_is() -> None:
    exact = picture(64, 48)
    condition = to_edge(exact, 64)
    expected = to_float(torch.from_numpy(np.array(exact)).permute(2, 0, 1))[None]
    assert condition.shape == (1, 3, 48, 64) and torch.equal(condition, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16", "RGB"])
def test_pictures_of_every_mode(upscaler: Upscaler, mode: str, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    if mode == "LA":
        picture(70, 70, "RGBA").convert("LA").save(file)
    else:
        picture(70, 70, mode).save(file)
    result = upscaler.upscale(file, size=256, output="tensor")[0]
    assert result.shape == (3, 256, 256) and bool(torch.isfinite(result).all()) and float(result.abs().max()) <= 1


def test_a_seed_gives_one_result_in_any_company(upscaler: Upscaler) -> None:
    first, second = picture(80, 60), picture(64, 64)
    together = upscaler.upscale([first, second], size=256, seed=[3, 4], output="tensor")
    alone = upscaler.upscale(second, size=256, seed=4, output="tensor")
    assert torch.equal(together[1], alone[0]) and together[0].shape == (3, 192, 256)
    other = upscaler.upscale(second, size=256, seed=5, output="tensor")
    assert not torch.equal(alone[0], other[0])
    assert set(upscaler.timings.seconds) == {"upsampler_256"}


def test_tensors_and_progress(upscaler: Upscaler) -> None:
    heard: list[tuple[str, int, int]] = []
    image = to_float(torch.from_numpy(np.array(picture(64, 64))).permute(2, 0, 1))
    results = upscaler.upscale(image[None], output="tensor", start=64, progress=lambda *told: heard.append(told))
    assert results[0].shape == (3, 1024, 1024)
    assert heard == [("upsampler_256", 1, 1), ("upsampler_1024", 1, 1)]
    assert torch.equal(upscaler.upscale([image], output="tensor", start=64)[0], results[0])


def test_the_whole_system_upscales_as_its_upsamplers_alone(tiny_bundle: Path, upscaler: Upscaler) -> None:
    system = UnCLIP.from_pretrained(tiny_bundle, device="cpu")
    whole = system.upscale(picture(70, 50), size=256, seed=2, output="tensor")[0]
    assert torch.equal(whole, upscaler.upscale(picture(70, 50), size=256, seed=2, output="tensor")[0])


def test_one_upsampler_of_a_run_is_enough(tiny_parts: dict[str, Path]) -> None:
    alone = Upscaler.from_pretrained(tiny_parts["upsampler_256"], device="cpu")
    assert alone.name == "upsampler_256" and alone.upscale(picture(64, 64))[0].size == (256, 256)


@pytest.mark.parametrize(
    "images, options, message",
    [
        ([], {}, "no image"),
        (3, {}, "type int"),
        (torch.zeros(1, 8, 8), {}, "expected \\(3, H, W\\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), {}, "expected floats in"),
        (None, {"size": 512}, "they make 256, 1024"),
        (None, {"start": 100}, "possible: 64, 256"),
        (None, {"size": 256, "start": 256}, "possible: 64"),
        (None, {"steps": 0}, "steps"),
        (None, {"noise_level": 5}, "without noise augmentation"),
        (None, {"memory_limit": 0}, "above 0"),
        (None, {"memory_limit": 1}, "too small"),
        (None, {"guidance": 3}, "unknown option 'guidance'"),
        (None, {"seed": [1, 2]}, "2 seeds for 1"),
    ],
)
def test_bad_input_is_one_sentence(
    upscaler: Upscaler, images: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UnclipError, match=message):
        upscaler.upscale(picture(64, 64) if images is None else images, **options)  # type: ignore[arg-type]


def test_a_model_without_upsamplers(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    manifest = json.loads((copy / "unclip.json").read_text())
    manifest["parts"] = {name: part for name, part in manifest["parts"].items() if not name.startswith("upsampler")}
    (copy / "unclip.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="no upsampler"):
        Upscaler.from_pretrained(copy)


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_pictures_that_say_how_they_came_to_be(
    run_cli: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "holiday.png", tmp_path / "grey.png"]
    picture(90, 60).save(files[0])
    picture(50, 50, "L").save(files[1])
    out = tmp_path / "out"
    code, stdout, stderr = run_cli(
        "upscale", *files, "--size", 256, "--model", tiny_bundle, "--out", out, "--seed", 7, "--steps", 2, "--json"
    )
    assert code == 0 and not stderr
    records = [json.loads(line) for line in stdout.splitlines()]
    assert [(r["width"], r["height"], r["seed"], r["image"]) for r in records] == [
        (256, 172, 7, str(files[0])),
        (256, 256, 7, str(files[1])),
    ]
    with Image.open(records[0]["path"]) as image:
        assert image.size == (256, 172)
        assert image.info["command"] == "upscale" and image.info["seed"] == "7" and image.info["model"] == "tiny"
        assert json.loads(image.info["options"]) == {"steps": 2}
        assert str(tmp_path) not in str(image.info)


def test_one_picture_to_one_file(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    picture(64, 64).save(source)
    arguments = ("upscale", source, "--size", 256, "--model", tiny_bundle, "--out", target, "--memory-limit", 300)
    code, stdout, _ = run_cli(*arguments)
    assert code == 0 and stdout.strip() == str(target) and Image.open(target).size == (256, 256)
    code, _, stderr = run_cli(*arguments)
    assert code == 1 and "exists; pass --overwrite" in stderr


def test_upscaling_takes_adapters_of_upsamplers(
    tiny_bundle: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: Run
) -> None:
    subject = make_adapters(tiny_bundle, tmp_path_factory.mktemp("runs"))
    adapter = subject["upsampler_1024"]
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "image.png")
    drawn = {}
    for name, options in (("plain", []), ("adapted", ["--adapter", f"{adapter}:0.5"])):
        file = tmp_path / f"{name}.png"
        asked = ["upscale", tmp_path / "image.png", "--model", tiny_bundle, "--quiet", "--out", file]
        code, _, error = run_cli(*asked, *options)
        assert code == 0, error
        with Image.open(file) as picture:
            drawn[name] = picture.tobytes()
            assert picture.info.get("adapters") == (None if name == "plain" else "upsampler_1024/adapter:0.5")
    assert drawn["plain"] != drawn["adapted"]
    alone, whole = (
        kind.from_pretrained(tiny_bundle, device="cpu", adapters=[(adapter, 0.5)]).upsamplers[1].network.state_dict()
        for kind in (Upscaler, UnCLIP)
    )
    assert all(torch.equal(value, whole[name]) for name, value in alone.items())
    # Left out with the upsampler that it is for; in its place it belongs to another.
    assert len(Upscaler.from_pretrained(tiny_bundle, size=256, adapters=[adapter]).upsamplers) == 1
    with pytest.raises(UnclipError, match="belongs to another upsampler: low_size is 256 there and 64 here"):
        Upscaler.from_pretrained(tiny_bundle / "upsampler_256", adapters=[adapter])
    for part in ("decoder", "prior"):
        asked = ["upscale", tmp_path / "image.png", "--adapter", subject[part], "--out", tmp_path / "no.png"]
        code, _, error = run_cli(*asked)
        assert code == 1 and f"is for a {part}, and only upsamplers run here; leave it out" in error
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ((), 2, "missing argument"),
        (("nowhere.png",), 1, "there is no image file"),
        (("{text}",), 1, "not an image"),
        (("{image}", "--size", "2048"), 2, "size 2048 cannot be reached"),
        (("{image}", "--size", "big"), 2, "no edge in pixels"),
        (("{image}", "--from", "32"), 2, "possible: 64, 256"),
        (("{image}", "--steps", "0"), 2, "sampling steps"),
        (("{image}", "--noise-level", "3"), 2, "without noise augmentation"),
        (("{image}", "--noise-level", "-3"), 2, "noise-level"),
        (("{image}", "--memory-limit", "-1"), 2, "above 0"),
        (("{image}", "--memory-limit", "1"), 1, "too small"),
        (("{image}", "--model", "{text}"), 1, "no model folder"),
        (("{image}", "{image}", "--out", "one.png"), 2, "a file for one picture"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...], code: int, message: str, run_cli: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("no picture")
    picture(64, 64).save(tmp_path / "image.png")
    filled = [a.format(text=tmp_path / "text.txt", image=tmp_path / "image.png") for a in arguments]
    model = () if "--model" in filled else ("--model", tiny_bundle)
    out = () if "--out" in filled else ("--out", tmp_path / "out")
    got, stdout, stderr = run_cli("upscale", *filled, *model, *out)
    assert (got, stdout) == (code, "") and message in stderr and len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
