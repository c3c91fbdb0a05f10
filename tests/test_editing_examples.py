"""Attention maps read and changed, and the examples on the public API: Prompt-to-Prompt, Imagic, MagicMix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example
from PIL import Image

from decoder import DecoderStage
from unclip import UnCLIP, UsageError
from unclip.config import DiffusionConfig
from unclip.diffusion import GaussianDiffusion, SeededNoise, ddim, timesteps_from
from unclip.diffusion.samplers import sdedit
from unclip.nn import AttentionMaps, watch_attention


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> UnCLIP:
    """Predicts x_0: a decoder of random weights that predicts ε makes much of every rounding."""
    system = UnCLIP.from_pretrained(tiny_bundle, size=64)
    config = system.decoder.config
    own = config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"prediction": "x_start"})})
    return UnCLIP(system.clip, DecoderStage(system.decoder.network, own), system.prior)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "a.png"
    image = Image.new("RGB", (64, 64), "#e8e0d0")
    image.paste("#3050c0", (16, 16, 48, 40))
    image.save(file)
    return file


def drawn(model: UnCLIP, prompt: str = "red apple", **options: Any) -> torch.Tensor:
    text = model.embed_text(prompt)
    return model.decoder.sample(text.embedding, [3], text=text, **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_maps_are_what_the_layers_attend_with(model: UnCLIP, guidance: float) -> None:
    """Watching changes nothing; rows sum to 1, padding gets nothing; afterwards nobody listens."""
    plain, heard = drawn(model, guidance=guidance), list[AttentionMaps]()
    with watch_attention(model.decoder.network, heard.append):  # type: ignore[arg-type]
        watched = drawn(model, guidance=guidance)
    assert torch.allclose(plain, watched, atol=1e-3)
    config = model.decoder.config
    assert {maps.layer.split(".")[0] for maps in heard} == {"unet"} and len({maps.layer for maps in heard}) > 1
    for maps in heard:
        rows = 1 if guidance == 1 else 2
        assert maps.size == (8, 8) and maps.context == config.text_length + config.image_tokens
        assert maps.probabilities.shape[0] == rows and maps.probabilities.shape[2:] == (64, maps.context + 64)
        assert torch.allclose(maps.probabilities.sum(-1), torch.ones(()), atol=1e-5)
        words = maps.probabilities[-1, ..., config.text_columns]
        real = model.embed_text("red apple").mask[0]
        assert (words[..., ~real] == 0).all() and (words[..., real] > 0).all()
    known = len(heard)
    assert torch.equal(drawn(model, guidance=guidance), plain) and len(heard) == known
    assert all(module.watcher is None for module in model.decoder.network.modules() if hasattr(module, "watcher"))


def test_maps_that_are_given_back_take_their_place(model: UnCLIP) -> None:
    plain = drawn(model)
    with watch_attention(model.decoder.network, lambda maps: maps.probabilities.clone()):
        assert torch.allclose(drawn(model), plain, atol=1e-3)
    with watch_attention(model.decoder.network, lambda maps: torch.zeros_like(maps.probabilities)):
        nothing = drawn(model)
        # Without any attention the caption has no say.
        assert not torch.allclose(nothing, plain, atol=1e-2)
        text, same = model.embed_text("red apple"), model.embed_text("rainbow")
        other = model.decoder.sample(text.embedding, [3], text=same)
        assert torch.equal(other, nothing)
    with pytest.raises(RuntimeError, match="stop"), watch_attention(model.decoder.network, _failing):
        drawn(model)
    assert torch.equal(drawn(model), plain)


def _failing(_maps: AttentionMaps) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_prompt_to_prompt(model: UnCLIP, guidance: float) -> None:
    module = example("editing/prompt_to_prompt")

    def run(text: float, everything: float, target: str = "green apple", embeddings: str = "shared") -> torch.Tensor:
        options: dict[str, Any] = {"seed": 3, "guidance": guidance, "embeddings": embeddings}
        return module.prompt_to_prompt(model, "red apple", target, text=text, everything=everything, **options)

    captions = ["red apple", "green apple"]
    z, text = model.predict_embedding(captions, seed=3), model.embed_text(captions)
    plain = model.decoder.sample(z, [3, 3], text=text, guidance=guidance)
    assert torch.allclose(run(0, 0, embeddings="own"), plain, atol=1e-3)
    # Whatever the target is made to attend to, the source is drawn as it was.
    shared = run(0, 0)
    for options in ((1.0, 0.0), (0.0, 1.0), (0.4, 0.4)):
        edited = run(*options)
        assert torch.allclose(edited[0], plain[0], atol=1e-3)
        assert not torch.allclose(edited[1], shared[1], atol=2e-3)
    for options in ((1.0, 0.0), (0.0, 1.0)):
        same = run(*options, target="red apple")
        assert torch.allclose(same[1], same[0], atol=1e-3)


def test_tokens_are_aligned(model: UnCLIP) -> None:
    module = example("editing/prompt_to_prompt")
    clip = model.clip
    length = [int(clip.token_ids([text])[1].sum()) for text in ("red star", "a red star")]
    pairs = module.aligned(model, "red star", "a red star")
    assert pairs[0] == (0, 0) and pairs[-1] == (length[0] - 1, length[1] - 1) and len(pairs) == length[0]
    assert module.aligned(model, "red star", "red star") == [(i, i) for i in range(length[0])]


def test_magic_mix(model: UnCLIP, picture: Path) -> None:
    module = example("editing/magic_mix")
    stage, prompt = model.decoder, "pizza"
    z, text = model.predict_embedding(prompt, seed=2), model.embed_text(prompt)
    from unclip.parts import image_pixels

    pixels = image_pixels(picture, 64)
    # With ν = 1 nothing is mixed in, and what is left is SDEdit.
    alone = module.magic_mix(model, picture, prompt, nu=1.0, k_min=0.0, k_max=1.0, seed=2, steps=10)
    expected = stage.sample(z, [2], text=text, steps=10, sampler=sdedit(pixels, ddim))
    assert torch.allclose(alone, expected, atol=1e-3)
    with pytest.raises(UsageError, match=r"nu is 1\.5, .*; expected 0 to 1 each, k_min up to k_max"):
        module.magic_mix(model, picture, prompt, nu=1.5)
    with pytest.raises(UsageError, match=r"k_min 0\.7 and k_max 0\.6"):
        module.magic_mix(model, picture, prompt, k_min=0.7)


def test_the_less_the_prompt_weighs_the_nearer_is_the_picture() -> None:
    """With the exact denoiser of data that are standard normal noise, which leads anywhere from x_T."""
    process = GaussianDiffusion(DiffusionConfig(schedule="cosine"))

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> Any:
        alpha_bar = torch.as_tensor(process.alphas_cumprod)[t].view(-1, 1, 1, 1)
        return process.to_prediction((x - alpha_bar * x) / (1 - alpha_bar).sqrt(), x, t)

    layout = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    steps, noise = process.steps(timesteps_from(50, process.timesteps)), SeededNoise([0])
    mixing, far = example("editing/magic_mix").mixing, []
    for nu in (0.0, 0.5, 0.9, 1.0):
        sampler = mixing(layout, process.timesteps, nu, 0.1, 0.7)
        heard = list[int]()
        start = noise.draw((3, 8, 8)).double()
        drawn = sampler(denoiser, start, steps, noise, callback=lambda _n, total, _x, h=heard: h.append(total))
        assert set(heard) == {len(heard)} and len(heard) == sum((step.t + 1) / 1000 <= 0.7 for step in steps)
        far.append(float((drawn - layout).square().mean()))
        noise = SeededNoise([0])
    assert far == sorted(far) and far[0] < 0.5 * far[-1], far


def test_imagic(model: UnCLIP, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("editing/imagic")
    monkeypatch.setattr(module, "BATCH", 2)
    from unclip.parts import image_pixels

    pixels, weights = image_pixels(picture, 64), {n: v.clone() for n, v in model.decoder.network.state_dict().items()}
    still = module.imagic(model, picture, "pizza", embedding_steps=0, network_steps=0)
    assert torch.equal(still.embedding, still.target)
    assert torch.allclose(still.draw(0.0, 1), model.decoder.sample(still.target, [1]), atol=1e-5)
    found = module.imagic(model, picture, "pizza", embedding_steps=4, network_steps=20, network_lr=3e-3)
    assert torch.allclose(found.embedding.norm(dim=1), found.target.norm(dim=1), atol=1e-5)
    assert not torch.allclose(found.embedding, found.target, atol=1e-3)
    error = [float((one.draw(0.0, 1) - pixels).square().mean()) for one in (still, found)]
    assert error[1] < 0.6 * error[0], error
    assert torch.allclose(found.draw(1.0, 1), found.stage.sample(found.target, [1]), atol=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in model.decoder.network.state_dict().items())
    with pytest.raises(UsageError, match="expected 0 or more"):
        module.imagic(model, picture, "pizza", network_steps=-1)


def test_what_a_caption_says_is_measured(model: UnCLIP) -> None:
    module = example("editing/measure")
    prompts = ("pizza", "a red apple")
    for shares in module.attention_shares(model, prompts).values():
        assert shares["caption"] + shares["embedding"] + shares["places"] == pytest.approx(1, abs=1e-5)
        lengths = model.embed_text(prompts).mask.sum(1)
        alike = (lengths / (lengths + model.decoder.config.image_tokens + 64)).mean()
        assert shares["alike"] == pytest.approx(float(alike), abs=1e-5)
    moved = module.movements(model, prompts)
    assert set(moved) >= {"another seed", "no caption", "another prompt's caption"} and all(moved.values())
    with torch.no_grad():  # a decoder that cannot read captions
        before = [(p, p.clone()) for p in model.decoder.network.text_norm.parameters()]
        for parameter, _ in before:
            parameter.zero_()
    deaf = module.movements(model, prompts)
    with torch.no_grad():
        for parameter, value in before:
            parameter.copy_(value)
    assert deaf["another prompt's caption"] < 1e-3 * moved["another prompt's caption"] + 1e-3
