"""Pictures in other styles: what each change keeps, and that a sample's own generator decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers_data import plain as samples
from helpers_data import write_tar
from torch import Tensor

from decoder import DecoderRunConfig, decoder_loss, train
from unclip.clip import FrozenCLIP
from unclip.config import DataConfig, parse_config
from unclip.config_data import Style
from unclip.data import build_batches
from unclip.data.restyle import STYLES, blurred, contours, fine_lines, hue, lit, palette, restyle_batch, turned
from unclip.errors import UsageError
from unclip.training import current


def _pictures(count: int = 6, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(index) for index in range(count)]


def test_share_says_how_many_change() -> None:
    images = _pictures(200, 8)
    assert torch.equal(restyle_batch(images, _rngs(200), [0.0] * 200), images)
    changed = (restyle_batch(images, _rngs(200), [0.35] * 200) != images).flatten(1).any(1).sum().item()
    assert 50 <= changed <= 90  # 70 are expected, with a deviation of 7
    assert (restyle_batch(images, _rngs(200), [1.0] * 200) != images).flatten(1).any(1).sum().item() >= 195


def test_each_source_of_a_mixture_is_restyled_as_it_asks(tmp_path: Path) -> None:
    """One source changes always and keeps the plain picture, one never, one changes and lets the plain picture go."""
    write_tar(tmp_path / "a.tar", samples(range(8), captions=lambda i: [f"a {i}"]))
    write_tar(tmp_path / "b.tar", samples(range(8), captions=lambda i: [f"b {i}"]))
    write_tar(tmp_path / "c.tar", samples(range(8), captions=lambda i: [f"c {i}"]))
    sources = [
        {"source": str(tmp_path / "a.tar"), "restyle": 1.0, "cache": False},
        {"source": str(tmp_path / "b.tar"), "streaming": True, "cache": False},
        {"source": str(tmp_path / "c.tar"), "restyle": 1.0, "plain": False},
    ]
    data = parse_config(DataConfig, {"sources": sources, "image_size": 16, "plain": True, "cache": True})
    batch = next(build_batches(data, batch_size=60, seed=3))
    shown = next(build_batches(data.unchanged().model_copy(update={"plain": False}), batch_size=60, seed=3))
    assert shown["caption"] == batch["caption"]

    def where(first: str, second: dict[str, Any], kind: str) -> list[bool]:
        same = (batch[first] == second["image"]).flatten(1).all(1).tolist()  # type: ignore[literal-required]
        return [one for one, caption in zip(same, batch["caption"], strict=True) if caption[0] == kind]

    assert {caption[0] for caption in batch["caption"]} == {"a", "b", "c"}
    for kind in "ac":  # a plain colour turned or blurred stays what it was
        assert not all(where("image", shown, kind))
    assert all(where("image", shown, "b"))
    assert all(where("plain", shown, "a")) and all(where("plain", shown, "b")) and all(where("plain", batch, "c"))
    assert batch["has_plain"].tolist() == [caption[0] != "c" for caption in batch["caption"]]
    with pytest.raises(UsageError, match=r"a source asks for plain, and the data section does not"):
        parse_config(DataConfig, {"sources": [{**sources[0], "plain": True}]})


def test_result_does_not_depend_on_the_batch() -> None:
    images = _pictures()
    together = restyle_batch(images, _rngs(6), [0.8] * 6)
    alone = torch.cat([restyle_batch(images[i : i + 1], _rngs(6)[i : i + 1], [0.8]) for i in range(6)])
    assert torch.equal(together, alone)


def test_weights_say_how_often_a_style_is_taken() -> None:
    grey = torch.zeros(280, 3, 8, 8)  # lines alone leave it white

    def white(**weights: float) -> int:
        return int((restyle_batch(grey, _rngs(280), [1.0] * 280, weights) == 1).flatten(1).all(1).sum())

    others = {name: 0.0 for name in STYLES if name not in ("contours", "fine_lines")}
    assert white(**others) == 280 and white(contours=0, fine_lines=0) == 0
    assert 60 <= white() <= 100  # 80 are expected, with a deviation of 8
    assert 130 <= white(fine_lines=4) <= 170  # 5 of 10


def test_weights_name_the_styles_and_leave_one() -> None:
    assert set(get_args(Style)) == set(STYLES)
    with pytest.raises(UsageError, match=r"restyle_weights.*sepia|sepia"):
        parse_config(DataConfig, {"restyle_weights": {"sepia": 1}})
    with pytest.raises(UsageError, match="leave no style; give at least one a weight above 0"):
        parse_config(DataConfig, {"restyle_weights": dict.fromkeys(STYLES, 0)})


def test_weights_of_the_configuration_reach_the_pictures() -> None:
    lines = {name: float(name == "fine_lines") for name in STYLES}
    body = {"image_size": 16, "restyle": 1.0, "synthetic": {"size": 32, "max_objects": 1}, "restyle_weights": lines}
    drawn = next(build_batches(parse_config(DataConfig, body), batch_size=16, seed=0))["image"]
    assert (drawn > 0.99).float().mean() > 0.4  # paper


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_pictures_stay_in_range(style: object) -> None:
    light = (_pictures(1)[0] + 1) / 2
    many = restyle_batch(_pictures(40), _rngs(40), [1.0] * 40)
    assert many.abs().max() <= 1 and many.isfinite().all()
    assert style(light, np.random.default_rng(0)).shape == light.shape  # type: ignore[operator]
    assert torch.equal(light, (_pictures(1)[0] + 1) / 2)  # what it was given is as before


def test_hue_keeps_grey_and_the_sum_of_the_channels() -> None:
    grey = torch.linspace(0, 1, 64).view(1, 8, 8).expand(3, 8, 8)
    torch.testing.assert_close(hue(grey, np.random.default_rng(1)), grey)
    light = (_pictures(1)[0] + 1) / 2
    torch.testing.assert_close(hue(light, np.random.default_rng(1)).mean(0), light.mean(0))


def test_hue_turns_by_the_angle_drawn() -> None:
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)

    class Third:
        """A generator that turns by 120°, at full strength."""

        def __init__(self) -> None:
            self.values = iter((2 * np.pi / 3, 1.0))

        def uniform(self, *_: float) -> float:
            return next(self.values)

    turned_red = hue(red, Third())  # type: ignore[arg-type]
    torch.testing.assert_close(turned_red.flatten(), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


def test_a_palette_makes_red_any_colour_and_tints_grey_alone() -> None:
    grey = torch.linspace(0.1, 1, 64).view(1, 8, 8).expand(3, 8, 8)
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    strongest = set()
    for seed in range(30):
        toned = palette(grey, np.random.default_rng(seed))
        tint = toned[:, -1, -1]  # of white
        torch.testing.assert_close(toned / tint.view(3, 1, 1), (toned[:1] / tint[0]).expand(3, 8, 8))
        assert tint.min() >= 0.85 and tint.max() <= 1
        strongest.add(int((palette(red, np.random.default_rng(seed)).flatten() / tint).argmax()))
    assert strongest == {0, 1, 2}


@pytest.mark.parametrize("seed", range(8))
def test_fine_lines_are_where_any_colour_changes(seed: int) -> None:
    """Red beside a green of the same brightness has a line, and at no other place than where they meet."""
    flat = torch.tensor([0.587, 0, 0]).view(3, 1, 1).repeat(1, 16, 16)
    torch.testing.assert_close(fine_lines(flat, np.random.default_rng(seed)), torch.ones(3, 16, 16))
    flat[:, :, 8:] = torch.tensor([0, 0.299, 0]).view(3, 1, 1)
    drawn = fine_lines(flat, np.random.default_rng(seed))
    torch.testing.assert_close(drawn[:, :, :5], torch.ones(3, 16, 5))
    torch.testing.assert_close(drawn[:, :, 10:], torch.ones(3, 16, 6))
    assert drawn[:, :, 7].max() < 0.75 and drawn[:, :, [5, 6, 8, 9]].min() > drawn[:, :, 7].max()


@pytest.mark.parametrize("seed", range(8))
def test_contours_are_where_brightness_changes(seed: int) -> None:
    """Fine or thick, hard or soft: within a few pixels of the step, and darkest at it."""
    flat = torch.full((3, 16, 16), 0.4)
    torch.testing.assert_close(contours(flat, np.random.default_rng(seed)), torch.ones(3, 16, 16))
    step = flat.clone()
    step[:, :, 8:] = 0.9
    drawn = contours(step, np.random.default_rng(seed))
    torch.testing.assert_close(drawn[:, :, :3], torch.ones(3, 16, 3))
    torch.testing.assert_close(drawn[:, :, 13:], torch.ones(3, 16, 3))
    assert drawn[:, :, 7:9].max() < 0.75 and drawn.min() == drawn[:, :, 7:9].min()


def test_contours_are_of_several_kinds() -> None:
    step = torch.full((3, 16, 16), 0.4)
    step[:, :, 8:] = 0.9
    widths = {int((contours(step, np.random.default_rng(seed))[0, 8] < 0.95).sum()) for seed in range(20)}
    assert min(widths) <= 2 and max(widths) >= 5


def test_blur_and_turn_keep_a_plain_picture() -> None:
    plain = torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1).expand(3, 32, 32)
    for style in (blurred, turned):
        torch.testing.assert_close(style(plain, np.random.default_rng(3)), plain)


def test_blur_spreads_a_point_and_keeps_its_sum() -> None:
    point = torch.zeros(3, 33, 33)
    point[:, 16, 16] = 1
    spread = blurred(point, np.random.default_rng(0))
    torch.testing.assert_close(spread.sum((1, 2)), torch.ones(3))
    assert spread.max() < 1 and spread.max() == spread[0, 16, 16]


def test_light_colours_the_background() -> None:
    white = torch.ones(3, 32, 32)
    shown = lit(white, np.random.default_rng(0))
    assert (shown.mean((1, 2)) < 1).all() and shown.mean((1, 2)).std() > 0.01


def test_a_decoder_draws_the_plain_picture_from_the_restyled_one(
    tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data.plain the embedding is of what restyle made, and the target is what it was made of."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(*arguments: Any) -> dict[str, Tensor]:
        seen.append((arguments[3], arguments[4]))
        return decoder_loss(*arguments)

    monkeypatch.setattr(train, "decoder_loss", spy)
    unet = {"image_size": 16, "patch_size": 4, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1,
            "attention_resolutions": [], "head_channels": 16}  # fmt: skip
    data = {"image_size": 16, "restyle": 1.0, "plain": True, "synthetic": {"size": 32, "max_objects": 1}}
    settings = {"run_dir": str(tmp_path), "steps": 1, "batch_size": 4, "precision": "float32", "sample_every": 1,
                "wandb": {"mode": "disabled"}}  # fmt: skip
    body = {"clip": str(tiny_clip_folder), "model": {"unet": unet, "context_dim": 16, "steps": 2}, "data": data}
    body["model"]["sampler"] = "analytic"  # its statistics are not there while a run draws on the way
    config = parse_config(DecoderRunConfig, {**body, "train": settings})
    train.run(config, current())
    clip = FrozenCLIP.load(str(tiny_clip_folder))
    usual = config.data.model_copy(update={"plain": False, "restyle": 0.0})
    batch = next(build_batches(usual, batch_size=4, seed=config.train.seed))
    target, embedding = seen[0]
    assert torch.equal(target.contiguous(), batch["image"])
    restyled = next(build_batches(config.data, batch_size=4, seed=config.train.seed))["image"]
    torch.testing.assert_close(embedding, clip.encode_image(restyled))
    assert not torch.allclose(embedding, clip.encode_image(batch["image"]), atol=1e-3)
