"""Inpainting, outpainting, SDEdit and restoration: what is kept stays, what is asked comes, what is wrong is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unclip import UnCLIP, UnclipError, Upscaler, UsageError
from unclip.editing import Resampling
from unclip.inputs import SampleOptions
from unclip.masks import feather, read_mask

Run = Callable[..., tuple[int, str, str]]
FAST: dict[str, Any] = {"resampling": Resampling(2, 1, 2), "decoder_steps": 2, "prior_steps": 1, "upsampler_steps": 1}


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=256)


@pytest.fixture(scope="module")
def emoji() -> UnCLIP:
    return UnCLIP.from_pretrained(device="cpu", size=64)


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def disc(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- inpainting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["fit", "whole", "mask"])
@pytest.mark.parametrize(
    "width, height, box", [(150, 97, (90, 20, 140, 60)), (97, 150, (0, 10, 97, 140)), (20, 20, (3, 3, 12, 9))]
)
def test_what_is_kept_stays_to_the_bit(model: UnCLIP, crop: Any, width: int, height: int, box: Any) -> None:
    """Any size, any aspect ratio, any crop; soft edges too."""
    source, mask = picture(width, height), disc(width, height, box)
    drawn = model.inpaint(source, mask, "pizza", crop=crop, feather_by=2, num_images=2, seed=3, **FAST)
    alpha = feather(read_mask(mask), 2).numpy()
    for one in drawn:
        assert one.size == source.size and one.mode == "RGB"
        difference = np.abs(values(one) - values(source)).max(axis=2)
        assert difference[alpha == 0].max() == 0
        assert difference[alpha == 1].mean() > 5
    assert np.abs(values(drawn[0]) - values(drawn[1])).max() > 5  # another seed, another picture


def test_grey_blends(model: UnCLIP) -> None:
    """A mask of 1/4 gives a quarter of what one of 1 paints there, once."""
    source, whole = picture(64, 64), torch.zeros(64, 64)
    whole[16:48, 16:48] = 1
    options = {**FAST, "size": 64}
    full = model.inpaint(source, whole, "pizza", **options)[0]
    soft = model.inpaint(source, whole / 4, "pizza", **options)[0]
    expected = 0.75 * values(source) + 0.25 * values(full)
    assert np.abs(values(soft) - expected).max() <= 1  # what is under the mask is made up alike


def test_a_seed_gives_one_picture_in_any_company(model: UnCLIP) -> None:
    source, mask = picture(80, 60), disc(80, 60, (20, 10, 60, 50))
    together = model.inpaint(source, mask, "pizza", num_images=3, seed=5, output="tensor", **FAST)
    alone = model.inpaint(source, mask, "pizza", seed=6, output="tensor", **FAST)
    assert isinstance(together, Tensor) and isinstance(alone, Tensor) and together.shape == (3, 3, 60, 80)
    assert float((together[1] - alone[0]).abs().max()) <= 2.01 / 255
    assert float((together[0] - alone[0]).abs().max()) > 0.05


def test_what_is_under_the_mask_is_not_seen(model: UnCLIP) -> None:
    """Neither by the decoder nor by the upsamplers, as long as the embedding is the prompt's."""
    source, mask = picture(100, 100), disc(100, 100, (20, 20, 70, 70))
    hidden = Image.composite(Image.new("RGB", source.size, "red"), source, mask)
    first, second = (model.inpaint(one, mask, "pizza", output="tensor", **FAST) for one in (source, hidden))
    assert torch.equal(first, second)
    own = [model.inpaint(one, mask, output="tensor", **FAST) for one in (source, hidden)]
    assert not torch.equal(own[0], own[1])  # the picture's own embedding has seen it


def test_how_much_of_the_embedding_is_kept(model: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    own_sample = model.decoder.sample

    def spy(embedding: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append(embedding)
        return own_sample(embedding, *arguments, **options)

    monkeypatch.setattr(model.decoder, "sample", spy)
    source, mask = picture(64, 64), disc(64, 64, (20, 20, 50, 50))
    for prompt, keep in (("pizza", None), ("pizza", 0.5), ("pizza", 1.0), (None, None)):
        model.inpaint(source, mask, prompt, keep_embedding=keep, **{**FAST, "size": 64})
    told, half, kept, own = seen
    assert torch.allclose(told, model.predict_embedding("pizza", options=SampleOptions(prior_steps=1)), atol=1e-5)
    assert torch.equal(kept, own) and float((own * model.embed_image(source)).sum()) > 0.99
    middle = torch.nn.functional.normalize(told + own, dim=1)
    assert torch.allclose(half, middle, atol=1e-4)
    for keep, message in ((1.5, "keep_embedding is 1.5, expected 0"), (float("nan"), "keep_embedding is nan")):
        with pytest.raises(UsageError, match=message):
            model.inpaint(source, mask, "pizza", keep_embedding=keep)
    with pytest.raises(UsageError, match=r"keep_embedding 0.5 needs a prompt for the rest"):
        model.inpaint(source, mask, keep_embedding=0.5)


def test_a_decoder_that_inpaints_does_it_itself(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    """With the four additional channels; RePaint is not asked, and what is kept stays."""
    from helpers_bundle import make_bundle

    from decoder import Decoder, DecoderConfig
    from unclip.bundle import read_config, save_part

    config = read_config(tiny_parts["decoder"], "decoder", DecoderConfig).model_copy(update={"inpainting": True})
    torch.manual_seed(0)
    save_part(tmp_path / "decoder", "decoder", config, Decoder(config).state_dict())
    parts = {name: tiny_parts[name] for name in ("clip", "prior")} | {"decoder": tmp_path / "decoder"}
    native = UnCLIP.from_pretrained(make_bundle(tmp_path / "bundle", parts), device="cpu")
    source, mask = picture(90, 70), disc(90, 70, (30, 20, 60, 50))
    heard: list[tuple[str, int, int]] = []
    drawn = native.inpaint(source, mask, "pizza", progress=lambda *told: heard.append(told), decoder_steps=3)[0]
    assert [told for told in heard if told[0] == "decoder"] == [("decoder", n, 3) for n in (1, 2, 3)]
    difference = np.abs(values(drawn) - values(source)).max(axis=2)
    assert difference[values(mask) == 0].max() == 0 and difference[values(mask) == 255].mean() > 5


def test_repaint_takes_its_own_steps_unless_told(model: UnCLIP) -> None:
    source, mask = picture(64, 64), disc(64, 64, (20, 20, 50, 50))
    for options, total in (
        ({"resampling": Resampling(4, 2, 2)}, 4 + 2),  # one halt, at level 1
        ({"resampling": Resampling(3, 1, 1)}, 3),  # the model's own 3 steps are as many
        ({"resampling": Resampling(4, 1, 1), "decoder_steps": 2}, 2),
        ({}, 10 + 3 * 2 * 3),
    ):
        heard: list[tuple[str, int, int]] = []
        model.inpaint(source, mask, size=64, progress=lambda *told, heard=heard: heard.append(told), **options)
        assert heard == [("decoder", n, total) for n in range(1, total + 1)]
    with pytest.raises(UsageError, match="jump_length is 0, expected 1 or more"):
        Resampling(jump_length=0)


def test_inpainting_with_the_bundled_model_restores_what_was_erased(emoji: UnCLIP) -> None:
    """A part of a pizza painted over in blue comes back by its name, far closer than the blue is."""
    source = emoji.sample("pizza", seed=0)[0]
    mask = disc(64, 64, (18, 12, 44, 36))
    erased = Image.composite(Image.new("RGB", source.size, "blue"), source, mask)
    drawn = emoji.inpaint(erased, mask, "pizza", seed=1, resampling=Resampling(4, 1, 1))[0]
    where = values(mask) == 255
    error, before = (np.abs(values(one) - values(source))[where].mean() for one in (drawn, erased))
    assert error < before / 4
    assert np.abs(values(drawn) - values(source))[values(mask) == 0].max() == 0


# ---- outpainting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, size, corner", [
    ({"left": 20, "bottom": 11}, (100, 71), (20, 0)),
    ({"to": (200, 60), "frame": 60}, (200, 60), (60, 0)),
    ({"to": (111, 100), "frame": 64, "overlap": 0.3}, (111, 100), (15, 20)),
])  # fmt: skip
def test_the_picture_stays_and_all_around_it_is_painted(model: UnCLIP, options: Any, size: Any, corner: Any) -> None:
    source = picture(80, 60)
    drawn = model.outpaint(source, "pizza", num_images=2, size=64, **options, **FAST)
    for one in drawn:
        assert one.size == size
        assert np.array_equal(values(one.crop((*corner, corner[0] + 80, corner[1] + 60))), values(source))
        assert (values(one).sum(axis=2) == 0).mean() < 0.1  # nothing of the empty canvas is left
    again = model.outpaint(source, "pizza", seed=1, size=64, **options, **FAST)[0]
    assert np.abs(values(again) - values(drawn[1])).max() <= 2


def test_frames_see_what_was_painted_before(model: UnCLIP) -> None:
    """A wide canvas takes several frames; the seconds of all of them are told."""
    source, heard = picture(64, 64), []
    options = {**FAST, "size": 64, "resampling": Resampling(2, 1, 1), "decoder_steps": 2}
    model.outpaint(source, "pizza", left=64, right=64, frame=64, progress=lambda *told: heard.append(told), **options)
    assert heard.count(("decoder", 2, 2)) == 4
    assert set(model.timings.seconds) == {"clip", "prior", "decoder"}


@pytest.mark.parametrize("options, message", [
    ({}, "nothing to add; say how far to outpaint"),
    ({"to": (40, 200)}, "the picture is 80x60 pixels and cannot be outpainted to 40x200"),
    ({"left": -1}, "left is -1, expected 0 pixels or more"),
    ({"left": 1, "to": (99, 99)}, "give either the size of the whole"),
    ({"left": 20_000}, "outpainting to 20080x60 pixels; expected at most 16384"),
    ({"left": 10, "frame": 91}, "frame is 91, expected 2 pixels to the canvas's longer edge, 90"),
    ({"left": 10, "overlap": 1.0}, "overlap is 1.0, expected a share"),
    ({"left": 10, "num_images": 0}, "num_images is 0, expected 1 or more"),
    ({"left": 10, "size": 100}, "size 100 cannot be made by this model; it makes 64, 256"),
])  # fmt: skip
def test_canvases_that_make_no_sense(model: UnCLIP, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.outpaint(picture(80, 60), **options)


# ---- SDEdit ------------------------------------------------------------------------------------------------


def test_strength_1_is_sample_and_0_the_picture(model: UnCLIP) -> None:
    source = picture(64, 64)
    for options in ({}, {"sampler": "ddim", "eta": 0.5, "decoder_steps": 4}):
        given: dict[str, Any] = {"num_images": 2, "seed": 4, "output": "tensor", **options}
        edited = model.edit(source, "pizza", strength=1, **given)
        assert torch.equal(edited, model.sample("pizza", **given))
    same = model.edit(source, "pizza", strength=0, size=64, num_images=2)
    assert all(np.array_equal(values(one), values(source)) for one in same)
    # A larger one is the picture as 64 px hold it, through the upsamplers.
    large = model.edit(source, strength=0, output="tensor", seed=2)
    held = model.upscale(source, size=256, start=64, seed=2, output="tensor")[0]
    assert torch.equal(large[0], held)
    with pytest.raises(UsageError, match=r"strength is 1.5, expected 0"):
        model.edit(source, strength=1.5)
    with pytest.raises(UsageError, match="edit takes one image, got 2"):
        model.edit([source, source])


def test_the_bundled_model_moves_away_with_the_strength(emoji: UnCLIP) -> None:
    source = emoji.sample("owl", seed=0)[0]
    distances = []
    for strength in (0.0, 0.1, 0.3, 0.6):
        drawn = emoji.edit(source, "eagle", strength=strength, seed=1)[0]
        distances.append(np.square(values(drawn) - values(source)).mean())
    assert distances[0] == 0 and distances == sorted(distances) and distances[3] > 500


# ---- restoration -------------------------------------------------------------------------------------------


def test_restoring_keeps_the_size_and_draws_anew(tiny_bundle: Path) -> None:
    system = Upscaler.from_pretrained(tiny_bundle, device="cpu", size=256)
    for width, height in ((200, 131), (65, 250), (256, 256)):
        source = picture(width, height)
        drawn = system.restore(source, seed=3)[0]
        assert drawn.size == (width, height)
        anew = system.upscale(source, start=64, seed=3, size=256)[0].resize((width, height), Image.Resampling.BICUBIC)
        assert np.abs(values(drawn) - values(anew)).mean() < 3
    both = system.restore([picture(100, 80), picture(90, 90)], seed=3, output="tensor")
    assert [tuple(one.shape) for one in both] == [(3, 80, 100), (3, 90, 90)]
    assert list(system.timings.seconds) == ["upsampler_256"]
    for size, options, message in (
        (1100, {}, r"a picture of 1100 pixels cannot be restored .* expected a longer edge of 65 to 256 pixels"),
        (64, {}, "a picture of 64 pixels cannot be restored"),
        (100, {"start": 200}, "start 200 is no reduction of a picture of 100 pixels"),
        (100, {"stepz": 2}, "unknown option 'stepz'"),
    ):
        with pytest.raises(UsageError, match=message):
            system.restore(picture(size, 50), **options)


# ---- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.png" for name in ("photo", "mask", "small", "black", "white", "text", "clear")}
    picture(90, 70).save(found["photo"])
    disc(90, 70, (30, 20, 60, 50)).save(found["mask"])
    disc(20, 20, (3, 3, 9, 9)).save(found["small"])
    Image.new("L", (90, 70), 0).save(found["black"])
    Image.new("L", (90, 70), 255).save(found["white"])
    found["text"].write_text("no picture")
    return found


def test_the_commands(run_cli: Run, tiny_bundle: Path, files: dict[str, Path], tmp_path: Path) -> None:
    common = ["--model", tiny_bundle, "--json", "--quiet", "--seed", 7]
    fast = ["--prior-steps", 1, "--decoder-steps", 2, "--size", 64]
    way = ["--resamplings", 1, "--jump-length", 1]
    masked = ["inpaint", files["photo"], "--mask", files["mask"]]
    for command, size in (
        ([*masked, "-p", "pizza", "-n", 2, *fast, *way], (90, 70)),
        ([*masked, "--invert-mask", "--crop", "mask", "--feather", 3, *fast, *way], (90, 70)),
        (["outpaint", files["photo"], "--to", "120x71", "--keep-embedding", 1, *fast, *way], (120, 71)),
        (["edit", files["photo"], "-p", "pizza", "--strength", 0.5, *fast], (64, 64)),
        (["restore", files["photo"]], (90, 70)),
    ):
        out = tmp_path / str(command[0])
        code, told, err = run_cli(*command, *common, "--out", out)
        assert (code, err) == (0, ""), err
        records = [json.loads(line) for line in told.splitlines()]
        assert len(records) == (2 if "-n" in command else 1)
        for number, record in enumerate(records):
            with Image.open(record["path"]) as image:
                assert image.size == size == (record["width"], record["height"])
                assert image.text["unclip"]  # type: ignore[attr-defined]
            assert record["seed"] == 7 + number and record["image"] == str(files["photo"])
            assert Path(record["path"]).name.startswith(f"photo-{command[0]}".replace("-edit", "-edited"))


@pytest.mark.parametrize("arguments, code, message", [
    (["inpaint", "photo", "--mask", "small"], 2, "the mask is 20x20 pixels, the picture 90x70; expected the same"),
    (["inpaint", "photo", "--mask", "black"], 2, "the mask is black everywhere, so that nothing is to be repainted"),
    (["inpaint", "photo", "--mask", "white"], 2, "the mask is white everywhere, so that nothing of the picture is"),
    (["inpaint", "photo", "--mask", "text"], 1, "text.png is not an image in a format that is read here"),
    (["inpaint", "text", "--mask", "mask"], 1, "text.png is not an image in a format that is read here"),
    (["inpaint", "photo", "--mask", "clear"], 1, "there is no image file at"),
    (["inpaint", "photo"], 2, "missing option '--mask'"),
    (["inpaint", "photo", "--mask", "mask", "--mask-channel", "alpha"], 2, "has no transparency (its mode is L)"),
    (["inpaint", "photo", "--mask", "mask", "--context", "1"], 2, "context 1.0 is for crop 'mask' alone"),
    (["inpaint", "photo", "--mask", "mask", "-p", " "], 2, "the prompt is empty"),
    (["inpaint", "photo", "--mask", "mask", "--keep-embedding", "0.5"], 2, "keep_embedding 0.5 needs a prompt"),
    (["inpaint", "photo", "--mask", "mask", "--keep-embedding", "2"], 2, "keep_embedding is 2.0, expected 0"),
    (["inpaint", "photo", "--mask", "mask", "--dilate", "-2"], 2, "dilate is -2, expected 0 pixels or more"),
    (["inpaint", "photo", "--mask", "mask", "--dilate", "200"], 2, "the mask is white everywhere"),
    (["outpaint", "photo"], 2, "nothing to add; say how far to outpaint"),
    (["outpaint", "photo", "--to", "100"], 2, "'100' is no size; expected widthxheight in pixels"),
    (["outpaint", "photo", "--to", "40x40"], 2, "the picture is 90x70 pixels and cannot be outpainted to 40x40"),
    (["outpaint", "photo", "--left", "5", "--overlap", "1"], 2, "overlap is 1.0, expected a share"),
    (["outpaint", "photo", "--left", "5", "--frame", "2000"], 2, "frame is 2000, expected 2 pixels to the canvas's"),
    (["outpaint", "text", "--left", "5"], 1, "text.png is not an image"),
    (["edit", "photo", "--strength", "1.1"], 2, "strength is 1.1, expected 0 (the picture itself) to 1"),
    (["edit", "text"], 1, "text.png is not an image"),
    (["edit", "photo", "--size", "100"], 2, "size 100 cannot be made by this model"),
    (["restore", "text"], 1, "text.png is not an image"),
    (["restore", "small"], 2, "a picture of 20 pixels cannot be restored at its size by these upsamplers"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(
    run_cli: Run,
    tiny_bundle: Path,
    files: dict[str, Path],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    given = [files.get(argument, argument) for argument in arguments]
    found, out, err = run_cli(*given, "--model", tiny_bundle, "--out", tmp_path / "out")
    assert (found, out) == (code, "")
    assert err.startswith("unclip: ") and err.count("\n") == 1 and message.lower() in err.lower(), err
    assert not (tmp_path / "out").exists()


def test_no_prior_no_prompt(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    """A bundle without prior edits by the picture's own embedding, and says what it cannot do."""
    from helpers_bundle import make_bundle

    parts = {name: tiny_parts[name] for name in ("clip", "decoder")}
    bare = UnCLIP.from_pretrained(make_bundle(tmp_path / "bare", parts), device="cpu")
    source, mask = picture(64, 64), disc(64, 64, (20, 20, 50, 50))
    assert bare.inpaint(source, mask, resampling=Resampling(1, 1, 1))[0].size == (64, 64)
    assert bare.inpaint(source, mask, "pizza", keep_embedding=1, resampling=Resampling(1, 1, 1))
    with pytest.raises(UnclipError, match="this model has no prior"):
        bare.inpaint(source, mask, "pizza")
