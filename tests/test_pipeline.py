"""UnCLIP as a library: prompts, pictures and embeddings in, PIL images and tensors out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_bundle import make_bundle, make_parts
from PIL import Image
from torch import Tensor

from unclip import UnCLIP, UnclipError, UsageError
from unclip.clip import TextFeatures
from unclip.inputs import LARGEST_SEED, SampleOptions, check_embeddings, resolve_device

# Two passes over one sample in batches of different sizes differ by float32 rounding alone: measured up to 2e-6.
BATCH_TOLERANCE = 1e-4
# An untrained network's rounding is divided by √ᾱ, 5e-5 at t = 999: for such comparisons, steps that end below it.
STEADY: dict[str, Any] = {"output": "tensor", "decoder_steps": [0, 250, 500, 800]}


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_bundle, device="cpu")


def largest_difference(first: Tensor, second: Tensor) -> float:
    """In units of the 8-bit range: tensors are in [-1, 1]."""
    return float((first - second).abs().max()) / 2


def test_sizes_and_name(model: UnCLIP) -> None:
    assert model.sizes == (64, 256, 1024)
    assert model.name == "tiny"


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_sample_makes_every_size(model: UnCLIP, size: int) -> None:
    (image,) = model.sample("pizza", size=size)
    assert isinstance(image, Image.Image)
    assert (image.size, image.mode) == ((size, size), "RGB")
    reached = [name for name, edge in (("upsampler_256", 256), ("upsampler_1024", 1024)) if edge <= size]
    assert list(model.timings.seconds) == ["clip", "prior", "decoder", *reached]


def test_the_default_size_is_the_largest(model: UnCLIP) -> None:
    assert model.sample("pizza")[0].size == (1024, 1024)


def test_sample_as_tensor_equals_the_pictures(model: UnCLIP) -> None:
    tensor = model.sample(["pizza", "rainbow"], size=64, output="tensor")
    assert tensor.shape == (2, 3, 64, 64) and tensor.dtype == torch.float32
    assert float(tensor.abs().max()) <= 1
    for row, image in zip(tensor, model.sample(["pizza", "rainbow"], size=64), strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(pixels, ((row + 1) * 127.5).round().to(torch.uint8))


def test_order_is_prompts_then_seeds(model: UnCLIP) -> None:
    both = model.sample(["pizza", "rainbow"], num_images=2, seed=5, size=64, **STEADY)
    for index, (prompt, seed) in enumerate([("pizza", 5), ("pizza", 6), ("rainbow", 5), ("rainbow", 6)]):
        alone = model.sample(prompt, seed=seed, size=64, **STEADY)[0]
        assert largest_difference(both[index], alone) <= BATCH_TOLERANCE
    assert largest_difference(both[0], both[1]) > 0.05
    assert largest_difference(both[0], both[2]) > 0.005


def test_a_seed_for_each_prompt(model: UnCLIP) -> None:
    both = model.sample(["pizza", "pizza"], seed=[3, 9], size=64, **STEADY)
    alone = model.sample("pizza", seed=9, size=64, **STEADY)[0]
    assert largest_difference(both[1], alone) <= BATCH_TOLERANCE
    assert largest_difference(both[0], alone) > 0.005


def test_a_seed_gives_the_same_picture_at_1024_px_within_a_batch(model: UnCLIP) -> None:
    alone = model.sample("rainbow", seed=4, **STEADY)[0]
    beside = model.sample(["pizza", "rainbow", "red apple"], seed=[1, 4, 7], **STEADY)[1]
    assert largest_difference(alone, beside) <= BATCH_TOLERANCE


def test_guidance_and_steps_reach_the_stages(model: UnCLIP) -> None:
    heard: list[tuple[str, int, int]] = []
    steps = {"prior_steps": 4, "decoder_steps": 2, "upsampler_steps": 2}
    model.sample("pizza", progress=lambda *event: heard.append(event), **steps)
    totals = {stage: total for stage, _, total in heard}
    assert totals == {"prior": 4, "decoder": 2, "upsampler_256": 2, "upsampler_1024": 2}
    assert [done for stage, done, _ in heard if stage == "prior"] == [1, 2, 3, 4]
    plain = model.sample("pizza", size=64, output="tensor")
    for changed in ({"guidance": 1.0}, {"decoder_steps": 2}, {"prior_steps": 5}, {"prior_guidance": 4.0}):
        assert largest_difference(plain, model.sample("pizza", size=64, output="tensor", **changed)) > 1e-4


def test_variations(model: UnCLIP, tmp_path: Path) -> None:
    picture = Image.new("RGB", (50, 40), "red")
    images = model.variations(picture, num_images=2, size=64)
    assert [image.size for image in images] == [(64, 64)] * 2
    picture.save(tmp_path / "red.png")
    from_file = model.variations(tmp_path / "red.png", num_images=2, size=64, **STEADY)
    from_embedding = model.decode(model.embed_image(picture), seed=1, size=64, **STEADY)
    assert from_file.shape == (2, 3, 64, 64)
    assert largest_difference(from_file[1:], from_embedding) <= BATCH_TOLERANCE
    with pytest.raises(UsageError, match="one image, got 2"):
        model.variations([picture, picture], size=64)


def test_decode(model: UnCLIP) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 16))
    images = model.decode(rows, size=64)
    assert [image.size for image in images] == [(64, 64)] * 2
    one = model.decode(torch.from_numpy(rows[1]) * 7, size=64, **STEADY)  # any length, one row
    assert largest_difference(one, model.decode(rows, size=64, **STEADY)[1:]) <= BATCH_TOLERANCE


def test_embed_text(model: UnCLIP) -> None:
    features = model.embed_text(["pizza", "rainbow"])
    assert isinstance(features, TextFeatures)
    assert features.embedding.shape == (2, 16) and features.tokens.shape == (2, 12, 24)
    assert torch.allclose(features.embedding.norm(dim=1), torch.ones(2), atol=1e-6)


def test_embed_image(model: UnCLIP) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    embedding = model.embed_image([picture, Image.new("RGB", (30, 20))])
    assert embedding.shape == (2, 16)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-6)
    assert torch.allclose(model.embed_image(tensor), embedding[:1], atol=1e-5)
    with pytest.raises(UsageError, match="expected \\(B, 3, H, W\\)"):
        model.embed_image(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match="no image"):
        model.embed_image([])


def test_alpha_is_laid_on_white(model: UnCLIP) -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert torch.allclose(model.embed_image(clear), model.embed_image(Image.new("RGB", (16, 16), "white")))


def test_predict_embedding_is_that_of_sample(model: UnCLIP) -> None:
    embedding = model.predict_embedding(["pizza", "rainbow"], seed=3)
    assert embedding.shape == (2, 16)
    assert torch.allclose(model.predict_embedding("rainbow", seed=3), embedding[1:], atol=1e-4)


def test_a_size_skips_the_upsamplers(tiny_bundle: Path) -> None:
    small = UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=64)
    assert small.upsamplers == [] and small.sizes == (64,)
    assert len(UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=256).upsamplers) == 1
    with pytest.raises(UsageError, match="it makes 64, 256, 1024"):
        UnCLIP.from_pretrained(tiny_bundle, size=512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_bundle: Path, dtype: torch.dtype) -> None:
    half = UnCLIP.from_pretrained(tiny_bundle, device="cpu", dtype=dtype, size=256)
    image = half.sample("pizza", output="tensor", size=256)
    assert image.dtype == torch.float32 and bool(torch.isfinite(image).all())
    # The weights are held in it, which autocast would cast anew at every step; what they compute is near float32's.
    assert {p.dtype for stage in (half.prior, half.decoder) for p in stage.network.parameters()} == {dtype}
    exact = UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=64)
    embedding = exact.predict_embedding("pizza")
    assert float((half.predict_embedding("pizza") * embedding).sum()) > 0.99
    options: dict[str, Any] = {"size": 64, "output": "tensor", "sampler": "ddim", "decoder_steps": 4}
    near, far = (exact.decode(embedding, seed=seed, **options) for seed in (0, 1))
    error = (half.decode(embedding, seed=0, **options) - near).square().mean()
    assert error < 0.01 * (far - near).square().mean()
    alone = half.decoder.sample(embedding, [0], steps=4, sampler="ddim")  # by itself, without autocast
    assert (alone - near).square().mean() < 0.01 * (far - near).square().mean()


def test_without_a_prior_there_are_no_prompts(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b", {name: tiny_parts[name] for name in ("clip", "decoder")})
    model = UnCLIP.from_pretrained(folder, device="cpu")
    assert model.variations(Image.new("RGB", (8, 8)))[0].size == (64, 64)
    with pytest.raises(UnclipError, match=r"has no prior.*use variations or decode"):
        model.sample("pizza")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100}, "size 100 cannot be made.*64, 256, 1024"),
        ({"num_images": 0}, "num_images is 0"),
        ({"seed": -1}, f"seed -1 is out of range; expected 0 to {LARGEST_SEED}"),
        ({"seed": [1, 2]}, "2 seeds for 1 samples"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"decoder_steps": 0}, "decoder_steps is 0"),
        ({"prior_steps": 2000}, "1 to 1000 are possible"),
        ({"upsampler_steps": 2000}, "1 to 1000 are possible"),
        ({"sampler": "euler"}, "unknown sampler 'euler'; known: ddpm"),
        ({"colour": 1}, "unknown option 'colour'; known: size"),
    ],
)
def test_options_that_cannot_be(model: UnCLIP, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.sample("pizza", **options)


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "no prompt"), (" ", "prompt 1 is empty"), (["a", ""], "prompt 2 is empty")]
)
def test_prompts_that_cannot_be(model: UnCLIP, prompts: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.sample(prompts, size=64)


def test_a_prompt_too_long_is_cut_with_a_warning(model: UnCLIP) -> None:
    with pytest.warns(UserWarning, match="was cut; dropped"):
        model.sample("a very " * 10 + "long prompt", size=64)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((2, 8)), r"shape \(2, 8\); this model takes \(count, 16\)"),
        (np.ones((0, 16)), "no embedding given: there are 0 rows"),
        (np.ones((2, 16), dtype=int), "int64; expected floating"),
        (torch.ones(2, 16, dtype=torch.long), "expected floating"),
        (np.array([[1.0] * 16, [float("nan")] * 16]), r"embedding 1 holds NaN or infinity \(1 of 2"),
        (np.zeros((1, 16)), "all zeros"),
    ],
)
def test_embeddings_that_cannot_be(rows: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_embeddings(rows, 16)


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device(None).type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="possible: auto, cpu, cuda, cuda:N"):
        resolve_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UnclipError, match="no CUDA device"):
            resolve_device("cuda:0")


def test_options_default_to_the_model() -> None:
    assert all(value is None for value in vars(SampleOptions()).values())


def test_parts_that_do_not_fit(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    clip = tiny_parts["clip"]
    foreign = make_parts(tmp_path / "parts", clip, embedding_dim=8, text_length=77)
    with pytest.raises(UnclipError) as caught:
        UnCLIP.from_pretrained(make_bundle(tmp_path / "b", {**tiny_parts, "decoder": foreign["decoder"]}))
    assert "do not fit together" in str(caught.value)
    assert "the CLIP's embeddings have 16 dimensions, the decoder takes 8" in str(caught.value)
    assert "12 tokens, the decoder takes 77" in str(caught.value)
    with pytest.raises(UnclipError, match="the prior takes 8"):
        UnCLIP.from_pretrained(make_bundle(tmp_path / "c", {**tiny_parts, "prior": foreign["prior"]}))


def test_upsamplers_that_do_not_chain(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b", {**tiny_parts, "upsampler_256": tiny_parts["upsampler_1024"]})
    with pytest.raises(UnclipError, match="an upsampler takes 256 px, the stage before it makes 64 px"):
        UnCLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("decoder", "part 'decoder' is missing \\(present: clip, prior, upsampler_256, upsampler_1024\\)"),
        ("prior/config.json", "config.json is missing"),
        ("prior/model.safetensors", "model.safetensors is missing"),
        ("clip/open_clip_config.json", "open_clip_config.json is missing"),
        ("unclip.json", "not a bundle: unclip.json is missing.*`unclip bundle` makes one"),
    ],
)
def test_an_incomplete_bundle(tiny_bundle: Path, tmp_path: Path, gone: str, message: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_bundle, folder)
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UnclipError, match=message):
        UnCLIP.from_pretrained(folder)
