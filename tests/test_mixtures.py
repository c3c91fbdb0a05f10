"""Weighted mixtures of images and prompts, and negative prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from prior import AutoregressivePriorConfig
from prior.sampling import build_stage
from unclip import UnCLIP, UsageError
from unclip.cli.mix import read_parts
from unclip.config import parse_config
from unclip.geometry import angle_between, slerp
from unclip.mixtures import weighted_mean

Run = Callable[..., tuple[int, str, str]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=64)


def directions(count: int, width: int = 32, seed: int = 0) -> Tensor:
    """Unit vectors in one half of the space."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5
    return F.normalize(rows, dim=1)


def red() -> Image.Image:
    return Image.new("RGB", (30, 20), "red")


def blue() -> Image.Image:
    return Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 20).convert("RGB")


# ---- the numbers -------------------------------------------------------------------------------------------


def test_the_linear_mean_is_renormalised() -> None:
    z = directions(3)
    weights = [0.6, 0.4, -0.2]
    expected = F.normalize((torch.tensor(weights)[:, None] * z).sum(0), dim=0)
    found = weighted_mean(z, weights)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(weighted_mean(z, [6.0, 4.0, -2.0]), found, atol=1e-6), "only ratios count"
    long = z * torch.tensor([[2.0], [4.0], [6.0]])
    assert float(weighted_mean(long, [1, 1, 2]).norm()) == pytest.approx(4.5, rel=1e-6), "the mean of the lengths"


@pytest.mark.parametrize("mean", ["linear", "spherical"])
def test_one_embedding_comes_back_to_the_bit(mean: str) -> None:
    z = directions(3)
    assert torch.equal(weighted_mean(z[:1], [1.0], mean), z[0])
    assert torch.equal(weighted_mean(z[:1], [0.3], mean), z[0])
    assert torch.equal(weighted_mean(z, [0, 2.5, 0], mean), z[1])
    assert torch.allclose(weighted_mean(z[:1], [-1.0]), -z[0])


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.85])
def test_the_spherical_mean_of_two_is_their_slerp(weight: float) -> None:
    a, b = directions(2)
    found = weighted_mean(torch.stack([a, b]), [1 - weight, weight], "spherical")
    assert torch.allclose(found, slerp(a, b, weight), atol=1e-6)
    assert not torch.allclose(found, weighted_mean(torch.stack([a, b]), [0.5 - weight / 2, 0.5]), atol=1e-3)


def test_the_spherical_mean_has_the_least_squared_angles() -> None:
    z, weights = directions(5), torch.tensor([0.4, 0.1, 0.2, 0.05, 0.25], dtype=torch.float64)

    def cost(point: Tensor) -> float:
        return float((weights * angle_between(z, point.expand_as(z)) ** 2).sum())

    found = weighted_mean(z, weights.tolist(), "spherical")
    least = cost(found)
    for seed in range(20):
        step = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 0.01
        assert cost(F.normalize(found + step, dim=0)) > least


@pytest.mark.parametrize(
    ("weights", "mean", "message"),
    [
        ([0, 0], "linear", "all weights of the mixture are 0"),
        ([1, nan], "linear", "a weight of the mixture is nan"),
        ([inf, 1], "linear", "a weight of the mixture is inf"),
        ([1, -1], "spherical", "takes weights of 0 or more, and one is -1; use the linear mean"),
        ([1], "linear", "1 weights for 2 embeddings"),
        ([1, 1], "cubic", "unknown mean 'cubic'; known: linear, spherical"),
    ],
)
def test_weights_that_cannot_be(weights: list[float], mean: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weighted_mean(directions(2), weights, mean)


@pytest.mark.parametrize("mean", ["linear", "spherical"])
def test_embeddings_that_cancel(mean: str) -> None:
    a = directions(1)
    with pytest.raises(UsageError, match="cancel each other, so that no direction is left"):
        weighted_mean(torch.cat([a, -a]), [1, 1], mean)


# ---- pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["linear", "spherical"])
@pytest.mark.parametrize("weight", [1, 0.25])
def test_a_single_image_is_a_plain_variation_to_the_bit(model: UnCLIP, mean: str, weight: float) -> None:
    plain = model.variations(blue(), num_images=3, seed=4, output="tensor")
    assert torch.equal(model.mix([(blue(), weight)], mean=mean, num_images=3, seed=4, output="tensor"), plain)
    beside = model.mix([(blue(), 1), (red(), 0)], [("pizza", 0)], num_images=3, seed=4, output="tensor")
    assert torch.equal(beside, plain)


def test_a_single_prompt_is_what_the_prior_makes_of_it(model: UnCLIP) -> None:
    mixed = model.mix(prompts=[("pizza", 1)], num_images=2, seed=4, output="tensor")
    guessed = model.predict_embedding(["pizza", "pizza"], seed=[4, 5])
    assert float((mixed - model.decode(guessed, seed=[4, 5], output="tensor")).abs().max()) < TOLERANCE
    raw = model.mix(prompts=[("pizza", 1)], text_embedding=True, seed=4, output="tensor")
    text = model.embed_text("pizza").embedding
    assert float((raw - model.decode(text, seed=4, output="tensor")).abs().max()) < TOLERANCE
    assert float((raw - mixed[:1]).abs().max()) > TOLERANCE


def test_images_and_prompts_together(model: UnCLIP) -> None:
    mixed = model.mix([(blue(), 0.6), (red(), -0.2)], [("pizza", 0.4)], seed=4, output="tensor")
    rows = torch.cat([model.embed_image([blue(), red()]), model.predict_embedding("pizza", seed=4)])
    z = F.normalize((torch.tensor([0.6, -0.2, 0.4])[:, None] * rows).sum(0), dim=0)
    assert float((mixed - model.decode(z, seed=4, output="tensor")).abs().max()) < TOLERANCE
    for images, prompts in (([(blue(), 1), (red(), 1)], []), ([(blue(), 1)], [("pizza", 1)])):
        other = model.mix(images, prompts, seed=4, output="tensor")
        assert float((mixed - other).abs().max()) > TOLERANCE
    several = model.mix([(blue(), 0.6)], [("pizza", 0.4)], num_images=2, seed=3, output="tensor")
    alone = model.mix([(blue(), 0.6)], [("pizza", 0.4)], seed=4, output="tensor")
    assert float((several[1:] - alone).abs().max()) < TOLERANCE, "a seed gives one picture"


def test_mixtures_that_cannot_be(model: UnCLIP) -> None:
    with pytest.raises(UsageError, match="nothing to mix; name at least one image or prompt"):
        model.mix()
    with pytest.raises(UsageError, match="each image of a mixture is a single one, got 2"):
        model.mix([(torch.zeros(2, 3, 16, 16), 1)])
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        model.mix(prompts=[(" ", 1)])
    with pytest.raises(UsageError, match="num_images is 0"):
        model.mix([(red(), 1)], num_images=0)


# ---- the command mix ---------------------------------------------------------------------------------------


def test_parts_are_files_or_prompts_with_weights(tmp_path: Path) -> None:
    file = tmp_path / "a.b:1.png"
    red().save(file)
    shutil.copy(file, tmp_path / "plain.png")
    pictures, prompts = read_parts(
        [f"{file}:0.6", str(tmp_path / "plain.png"), "snow:0.4", "a clock at 3:-2", "ratio: high", "red apple"]
    )
    assert pictures == [(file, 0.6), (tmp_path / "plain.png", 1.0)]
    assert prompts == [("snow", 0.4), ("a clock at 3", -2.0), ("ratio: high", 1.0), ("red apple", 1.0)]


def test_mix_on_the_command_line(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    blue().save(tmp_path / "blue.png")
    common = ["--model", tiny_bundle, "--size", 64]
    command = ["mix", "--mix", f"{tmp_path}/blue.png:0.6", "pizza:0.4", *common, "--out", tmp_path / "m.png", "--json"]
    code, out, err = run_cli(*command)
    assert code == 0, err
    record: dict[str, Any] = json.loads(out)
    assert record["mix"] == [["blue.png", 0.6], ["pizza", 0.4]] and record["mean"] == "linear"
    with Image.open(tmp_path / "m.png") as image:
        assert json.loads(image.text["options"])["mix"] == record["mix"]  # type: ignore[attr-defined]
    assert run_cli("mix", "--mix", tmp_path / "blue.png", *common, "--out", tmp_path / "one.png")[0] == 0
    assert run_cli("variations", tmp_path / "blue.png", *common, "--out", tmp_path / "plain.png")[0] == 0
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "plain.png") as plain:
        assert one.tobytes() == plain.tobytes()
    for parts, code, message in (
        (["gone.png:0.5"], 1, "there is no image file at gone.png"),
        ([":0.5"], 2, "names nothing; expected IMAGE:WEIGHT"),
        (["pizza:nan"], 2, "the weight of 'pizza' is nan"),
        (["pizza:0"], 2, "all weights of the mixture are 0"),
        (["pizza:1", "rainbow:-1", "--spherical"], 2, "use the linear mean"),
        (["--seed", "3"], 2, "unexpected extra argument"),
    ):
        got, out, err = run_cli("mix", "--mix", *parts, *common, "--out", tmp_path / "x.png")
        assert (got, out) == (code, "") and message in err, err


# ---- negative prompts --------------------------------------------------------------------------------------


def test_without_a_negative_prompt_nothing_changes(model: UnCLIP) -> None:
    options = {"guidance": 3.0, "prior_guidance": 2.0, "seed": 2}
    plain = model.sample("pizza", output="tensor", **options)
    assert torch.equal(model.sample("pizza", negative_prompt=None, output="tensor", **options), plain)
    away = model.sample("pizza", negative_prompt="rainbow", output="tensor", **options)
    assert float((away - plain).abs().max()) > 1e-3


def test_the_prior_moves_away_from_the_caption(model: UnCLIP) -> None:
    assert model.prior is not None
    text, other = model.embed_text(["pizza", "fox"]), model.embed_text(["rainbow", "rainbow"])
    draw = lambda features, scale, **more: model.prior.sample(  # noqa: E731
        features, [1, 2], candidates=1, sampler="ddim", guidance=scale, **more
    )
    # ∅ + s (y − ∅) with the other caption for ∅: its own prediction at s = 0, the caption's at s = 1.
    assert torch.allclose(draw(text, 0.0, negative=other), draw(other, 1.0), atol=1e-5)
    assert torch.equal(draw(text, 1.0, negative=other), draw(text, 1.0))
    assert torch.allclose(draw(text, 3.0, negative=text), draw(text, 1.0), atol=1e-5)
    assert not torch.allclose(draw(text, 3.0, negative=other), draw(text, 3.0), atol=1e-3)


def test_the_autoregressive_prior_moves_away_too() -> None:
    from unclip.clip import TextFeatures

    sizes = {"embedding_dim": 16, "token_dim": 24, "text_length": 12, "width": 16, "depth": 1, "heads": 2}
    torch.manual_seed(0)
    stage = build_stage(parse_config(AutoregressivePriorConfig, {**sizes, "kind": "autoregressive", "components": 4}))
    with torch.no_grad():
        for parameter in stage.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    stage.network.codes.components.copy_(torch.eye(16)[:4])

    def features(seed: int) -> TextFeatures:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(2, 12, 24, generator=generator)
        return TextFeatures(tokens, torch.ones(2, 12, dtype=torch.bool), directions(2, 16, seed))

    text, other = features(1), features(2)
    draw = lambda taken, scale, **more: stage.sample(taken, [1, 2], candidates=1, guidance=scale, **more)  # noqa: E731
    assert torch.equal(draw(text, 0.0, negative=other), draw(other, 1.0))
    assert torch.equal(draw(text, 1.0, negative=other), draw(text, 1.0))
    assert not torch.equal(draw(text, 4.0, negative=other), draw(text, 4.0))


def test_the_decoder_moves_away_from_caption_and_embedding(model: UnCLIP) -> None:
    text, other = model.embed_text(["pizza"]), model.embed_text(["rainbow"])
    z, away = directions(2, 16)[:, None]
    draw = lambda embedding, scale, **more: model.decoder.sample(  # noqa: E731
        embedding, [3], sampler="ddim", guidance=scale, **more
    )
    for negative, embedding in ((other, None), (None, away), (other, away)):
        against = {"negative": negative, "negative_embedding": embedding}
        alone = draw(embedding, 1.0, text=negative)
        assert torch.allclose(draw(z, 0.0, text=text, **against), alone, atol=1e-4)
        assert torch.equal(draw(z, 1.0, text=text, **against), draw(z, 1.0, text=text))
        assert not torch.allclose(draw(z, 3.0, text=text, **against), draw(z, 3.0, text=text), atol=1e-3)


def test_negative_prompts_of_a_sample_are_those_of_its_stages(model: UnCLIP) -> None:
    options = {"guidance": 2.0, "prior_guidance": 3.0}
    found = model.sample(
        ["pizza", "fox"],
        seed=[1, 2],
        negative_prompt=["rainbow", "pizza"],
        negative_embedding=True,
        output="tensor",
        **options,
    )
    text, other = model.embed_text(["pizza", "fox"]), model.embed_text(["rainbow", "pizza"])
    assert model.prior is not None
    z = model.prior.sample(text, [1, 2], guidance=3.0, negative=other)
    away = model.prior.sample(other, [1, 2], guidance=3.0)
    pixels = model.decoder.sample(z, [1, 2], text=text, guidance=2.0, negative=other, negative_embedding=away)
    assert torch.allclose(found, pixels, atol=1e-5)
    both = model.sample(["pizza", "fox"], seed=[1, 2], negative_prompt="rainbow", output="tensor", **options)
    one = model.sample("fox", seed=2, negative_prompt="rainbow", output="tensor", **options)
    assert float((both[1:] - one).abs().max()) < 1e-2


def test_negative_prompts_that_cannot_act(model: UnCLIP) -> None:
    plain: dict[str, Any] = {"guidance": 1.0, "prior_guidance": 1.0}
    with pytest.raises(UsageError, match="acts where guidance is above 1, and prior_guidance is 1 and guidance is 1"):
        model.sample("pizza", negative_prompt="fox", **plain)
    with pytest.raises(UsageError, match="the embedding of a negative prompt acts where guidance is above 1"):
        model.sample("pizza", negative_prompt="fox", negative_embedding=True, guidance=1.0, prior_guidance=2.0)
    with pytest.raises(UsageError, match="negative prompt 1 is empty"):
        model.sample("pizza", negative_prompt=" ", guidance=2.0)
    with pytest.raises(UsageError, match="2 negative prompts for 1 prompts"):
        model.sample("pizza", negative_prompt=["fox", "owl"], guidance=2.0)


def test_negative_prompts_on_the_command_line(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    common = ["sample", "-p", "pizza", "--model", tiny_bundle, "--size", 64, "--out", tmp_path / "o.png"]
    code, out, err = run_cli(*common, "--negative-prompt", "fox", "--guidance", 1, "--prior-guidance", 1)
    assert (code, out) == (2, "") and "raise prior_guidance or guidance" in err
    code, out, err = run_cli(*common, "--negative-embedding")
    assert (code, out) == (2, "") and "add --negative-prompt" in err
    assert run_cli(*common, "--negative-prompt", "fox", "--guidance", 2)[0] == 0
    with Image.open(tmp_path / "o.png") as image:
        assert json.loads(image.text["options"])["negative_prompt"] == "fox"  # type: ignore[attr-defined]
