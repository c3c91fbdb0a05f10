"""The decoder: its two ways of conditioning, counted drops, learned nulls, sampling, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers_decoder
import pytest
import torch
from helpers_decoder import CONTEXT, DIM, LENGTH, TOKEN, Spy, rand, randomised, text, unit
from torch import Tensor
from torch.nn import functional

from decoder import Decoder, DecoderConfig, DecoderStage, decoder_loss
from decoder.objective import noised_embedding
from decoder.sampling import KIND
from decoder.train import start_from
from unclip.bundle import save_part
from unclip.data.synthetic import render, scene
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError

SIZE = 16
UNET: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 2,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "head_channels": 16,
}


def config(**changes: Any) -> DecoderConfig:
    return helpers_decoder.config(**{"unet": UNET, **changes})


def network(**changes: Any) -> Decoder:
    """Nothing is zero, so that every input reaches the output."""
    torch.manual_seed(0)
    return randomised(Decoder(config(**changes)))


def inputs() -> dict[str, Tensor]:
    return helpers_decoder.inputs(size=SIZE)


class UNetSpy:
    """Listens to what the U-Net is given."""

    def __init__(self, decoder: Decoder) -> None:
        self.calls: list[tuple[Any, ...]] = []
        decoder.unet.register_forward_pre_hook(lambda _module, args: self.calls.append(args))

    @property
    def last(self) -> tuple[Any, ...]:
        """x_t, t, addition to the time embedding, context, context mask, bottom map."""
        return self.calls[-1]


# ---- conditioning ------------------------------------------------------------------------------------------


def test_image_embedding_reaches_time_embedding_and_four_tokens() -> None:
    decoder, given = network(), inputs()
    spy = UNetSpy(decoder)
    output = decoder(**given)
    assert output.shape == (2, 6, 16, 16)  # learned variance by default
    _, t, addition, context, mask, bottom = spy.last
    scaled = given["image_embedding"] * DIM**0.5
    assert torch.equal(t, given["t"]) and bottom is None
    assert torch.allclose(addition, decoder.embedding_to_time(scaled))
    assert addition.shape == (2, decoder.unet.embedding_dim)
    assert context.shape == (2, LENGTH + 4, CONTEXT)
    image_tokens = decoder.embedding_to_tokens(scaled).view(2, 4, CONTEXT)
    assert torch.allclose(context[:, LENGTH:], image_tokens)
    assert bool((image_tokens[:, 0] - image_tokens[:, 1]).abs().max() > 0.1)  # four, not one four times
    assert torch.allclose(context[:, :LENGTH], decoder.text_norm(decoder.text_to_tokens(given["text_tokens"])))
    assert torch.equal(mask, torch.cat([given["text_mask"], torch.ones(2, 4, dtype=torch.bool)], dim=1))


@pytest.mark.parametrize("without", ["embedding_to_time", "embedding_to_tokens"])
def test_either_path_alone_carries_the_embedding(without: str) -> None:
    decoder, given = network(), inputs()
    with torch.no_grad():
        getattr(decoder, without).weight.zero_()
    base = decoder(**given)
    assert not torch.allclose(base, decoder(**{**given, "image_embedding": unit(2, 9)}), atol=1e-3)


def test_padding_has_no_effect_and_words_have() -> None:
    decoder, given = network(), inputs()
    base = decoder(**given)
    noise = 30 * rand(2, LENGTH, TOKEN, seed=9)
    padding = torch.where(given["text_mask"][..., None], given["text_tokens"], noise)
    assert torch.equal(base, decoder(**{**given, "text_tokens": padding}))
    words = torch.where(given["text_mask"][..., None], noise, given["text_tokens"])
    assert not torch.allclose(base, decoder(**{**given, "text_tokens": words}), atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"embedding_hidden": 5}, {"text_seed": True}], ids=lambda more: str([*more]))
@pytest.mark.parametrize("dropped, kept", [("embedding", "text"), ("text", "embedding")])
def test_what_is_dropped_leaves_no_trace(dropped: str, kept: str, more: dict[str, Any]) -> None:
    decoder, given = network(**more), inputs()
    given[f"drop_{dropped}"] = torch.tensor([True, False])
    base = decoder(**given)
    other = {
        "embedding": {"image_embedding": unit(2, 9)},
        "text": {"text_tokens": rand(2, LENGTH, TOKEN, seed=9), "text_mask": ~given["text_mask"]},
    }
    without = decoder(**{**given, **other[dropped]})
    assert torch.equal(base[0], without[0]) and not torch.allclose(base[1], without[1], atol=1e-3)
    assert not torch.allclose(base[0], decoder(**{**given, **other[kept]})[0], atol=1e-3)


def test_nulls_are_learned_when_something_is_dropped() -> None:
    for embedding, words in ((True, False), (False, True), (False, False)):
        decoder, given = network(spatial_seed=True), inputs()
        given |= {"drop_embedding": torch.tensor([embedding] * 2), "drop_text": torch.tensor([words] * 2)}
        decoder(**given).pow(2).sum().backward()
        found = []
        for null in (decoder.null_embedding, decoder.null_text):
            assert null.grad is not None
            found.append(bool((null.grad.abs() > 0).any()))
        assert found == [embedding, words]


def test_spatial_seed_adds_a_map_of_the_embedding_at_the_bottom() -> None:
    decoder, given = network(spatial_seed=True), inputs()
    spy = UNetSpy(decoder)
    decoder(**given)
    bottom = spy.last[5]
    assert bottom.shape == (2, 32, 4, 4) and decoder.seed is not None
    assert torch.allclose(bottom.flatten(1), decoder.seed(given["image_embedding"] * DIM**0.5))
    decoder(**{**given, "drop_embedding": torch.ones(2, dtype=torch.bool)})
    assert torch.allclose(spy.last[5][0], spy.last[5][1])  # the null's map
    assert network().seed is None


def test_a_hidden_layer_speaks_wherever_the_embedding_does() -> None:
    decoder, given = network(spatial_seed=True, embedding_hidden=5), inputs()
    spy = UNetSpy(decoder)
    z = given["image_embedding"] * DIM**0.5
    features = functional.gelu(decoder.embedding_features[0](z))
    decoder(**given)
    _, _, time, context, _, bottom = spy.last
    expected = decoder.embedding_to_time(z) + decoder.features_to_time(features)
    assert torch.allclose(time, expected, atol=1e-5)
    tokens = decoder.embedding_to_tokens(z) + decoder.features_to_tokens(features)
    assert torch.allclose(context[:, LENGTH:].flatten(1), tokens, atol=1e-5)
    assert decoder.seed is not None
    assert torch.allclose(bottom.flatten(1), decoder.seed(z) + decoder.features_to_seed(features), atol=1e-5)


@pytest.mark.parametrize("more", [{"embedding_hidden": 7}, {"text_seed": True}], ids=lambda more: str([*more]))
@pytest.mark.parametrize("spatial", [False, True])
def test_what_may_be_new_begins_with_nothing_to_say(more: dict[str, Any], spatial: bool) -> None:
    plain, longer = network(spatial_seed=spatial), Decoder(config(spatial_seed=spatial, **more))
    longer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(**inputs()), longer(**inputs()))


@pytest.mark.parametrize("spatial", [False, True])
def test_text_seed_adds_a_map_of_the_caption_at_the_bottom(spatial: bool) -> None:
    decoder, given = network(text_seed=True, spatial_seed=spatial), inputs()
    spy = UNetSpy(decoder)
    decoder(**given)
    _, _, _, context, mask, bottom = spy.last
    assert decoder.text_seed is not None and bottom.shape == (2, 32, 4, 4)
    expected = decoder.text_seed(context[:, :LENGTH], mask[:, :LENGTH])  # of the caption, not of the image's tokens
    if decoder.seed is not None:
        expected = expected + decoder.seed(given["image_embedding"] * DIM**0.5).unflatten(1, (32, 4, 4))
    assert torch.allclose(bottom, expected, atol=1e-5)


@pytest.mark.parametrize("variance, channels", [("fixed_small", 3), ("learned_range", 6)])
def test_output_channels_follow_the_variance(variance: str, channels: int) -> None:
    assert network(diffusion={"variance": variance})(**inputs()).shape == (2, channels, 16, 16)


# ---- objective ---------------------------------------------------------------------------------------------


def test_embedding_and_caption_are_dropped_independently() -> None:
    """10 % and 50 % of the samples (unCLIP §2.1)."""
    spy, count, own = Spy(), 4000, config()
    losses = decoder_loss(
        spy, GaussianDiffusion(own.diffusion), own, torch.zeros(count, 3, 2, 2), unit(count), text(count),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert set(losses) == {"mse", "vb", "loss", "quartile"} and losses["loss"].shape == (count,)
    embedding, words = spy.calls[0]["drop_embedding"], spy.calls[0]["drop_text"]
    assert 324 <= int(embedding.sum()) <= 476  # 400 expected, ±4 standard deviations
    assert 1874 <= int(words.sum()) <= 2126  # 2000
    assert 145 <= int((embedding & words).sum()) <= 255  # 200, were they independent
    assert torch.equal(spy.calls[0]["image_embedding"], unit(count))
    for rate, expected in ((0.0, 0), (1.0, 50)):
        own = config(drop_embedding=rate, drop_text=rate)
        decoder_loss(
            spy, GaussianDiffusion(own.diffusion), own, torch.zeros(50, 3, 2, 2), unit(50), text(50),
            torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert [int(spy.calls[-1][f"drop_{name}"].sum()) for name in ("embedding", "text")] == [expected] * 2


def test_embedding_noise_stays_on_the_sphere_and_within_its_weight() -> None:
    truth, generator = unit(2000), torch.Generator().manual_seed(0)
    assert noised_embedding(truth, 0.0, generator) is truth
    for largest in (0.2, 0.6):
        noised = noised_embedding(truth, largest, generator)
        assert torch.allclose(noised.norm(dim=1), torch.ones(2000), atol=1e-5)
        sine = (1 - (noised * truth).sum(1).clamp(-1, 1) ** 2).sqrt()
        # The farthest a vector of length w turns one of length sqrt(1−w²): tan = w/sqrt(1−w²), sine = w, or
        # more where it points backwards: sine = tan.
        assert float(sine.max()) <= largest / (1 - largest**2) ** 0.5 + 1e-4
        assert 0.35 * largest < float(sine.mean()) < 0.55 * largest  # w is uniform in [0, largest]
    own = config(embedding_noise=0.5)
    spy = Spy()
    decoder_loss(spy, GaussianDiffusion(own.diffusion), own, torch.zeros(50, 3, 2, 2), unit(50), text(50), generator)
    assert not torch.allclose(spy.calls[0]["image_embedding"], unit(50), atol=1e-2)


# ---- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, eta", [("ddpm", None), ("ddim", None), ("ddim", 1.0), ("dpmpp_2m", None)])
def test_a_seed_gives_the_same_image_in_any_batch(sampler: str, eta: float | None) -> None:
    stage, features, embedding = DecoderStage(network(), config()), text(3), unit(3, 7)

    def draw(part: slice, seeds: list[int]) -> Tensor:
        return stage.sample(embedding[part], seeds, text=features[part], sampler=sampler, eta=eta)

    together = draw(slice(0, 3), [5, 6, 5])
    assert together.shape == (3, 3, 16, 16) and together.dtype == torch.float32
    assert float(together.abs().max()) <= 1
    for index, seed in enumerate([5, 6, 5]):
        assert torch.allclose(draw(slice(index, index + 1), [seed])[0], together[index], atol=1e-4)
    assert not torch.allclose(draw(slice(0, 1), [9])[0], together[0], atol=1e-2)


def test_guidance_runs_from_unconditional_to_conditional_and_beyond() -> None:
    decoder = network()
    stage, features, embedding = DecoderStage(decoder, config()), text(2), unit(2, 7)
    options: dict[str, Any] = {"text": features, "sampler": "ddim", "steps": 1}
    spy = UNetSpy(decoder)
    conditional = stage.sample(embedding, [1, 2], guidance=1.0, **options)
    assert len(spy.last[0]) == 2
    nothing = stage.sample(embedding, [1, 2], guidance=0.0, **options)
    assert len(spy.last[0]) == 4  # both halves in one batch
    assert torch.allclose(nothing, stage.sample(None, [1, 2], guidance=1.0, sampler="ddim", steps=1), atol=1e-5)
    other = stage.sample(unit(2, 30), [1, 2], guidance=0.0, **{**options, "text": None})
    assert torch.allclose(nothing, other, atol=1e-5)
    assert not torch.allclose(nothing, conditional, atol=1e-3)
    default = stage.sample(embedding, [1, 2], **options)
    assert torch.equal(default, stage.sample(embedding, [1, 2], guidance=3.0, **options))
    assert not torch.allclose(default, conditional, atol=1e-3)


def test_caption_and_embedding_may_be_left_out() -> None:
    stage, features, embedding = DecoderStage(network(), config()), text(2), unit(2, 7)
    results = [
        stage.sample(z, [1, 2], text=y, guidance=1.0)
        for z, y in ((embedding, features), (embedding, None), (None, features), (None, None))
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert not torch.allclose(first, second, atol=1e-3)


def test_saved_decoder_draws_the_same(tmp_path: Path) -> None:
    decoder = network(spatial_seed=True)
    save_part(tmp_path / "part", KIND, decoder.config, decoder.state_dict())
    stage = DecoderStage.load(tmp_path / "part")
    assert stage.config == decoder.config
    expected = DecoderStage(decoder, decoder.config).sample(unit(2), [1, 2])
    assert torch.allclose(stage.sample(unit(2), [1, 2]), expected, atol=1e-5)


def test_conditions_that_do_not_fit_are_refused() -> None:
    stage = DecoderStage(network(), config())
    with pytest.raises(UnclipError, match=r"\(2, 13\).*takes \(2, 12\)"):
        stage.sample(torch.zeros(2, DIM + 1), [0, 1])
    with pytest.raises(UnclipError, match=r"\(2, 12\).*takes \(3, 12\)"):
        stage.sample(unit(2), [0, 1, 2])
    with pytest.raises(UnclipError, match=r"\(1, 5, 10\).*takes \(2, 5, 10\)"):
        stage.sample(unit(2), [0, 1], text=text(1))
    with pytest.raises(UsageError, match="0 sampling steps"):
        stage.sample(unit(1), [0], steps=0)


# ---- starting from another ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_training_may_start_from_another_decoder(tmp_path: Path, prediction: str) -> None:
    """Of one that predicts something else all is taken over but the output layer, which stays zero."""
    source = network(diffusion={"prediction": "epsilon", "variance": "learned_range"})
    save_part(tmp_path / "part", KIND, source.config, source.state_dict())
    fresh = Decoder(config(diffusion={"prediction": prediction, "variance": "learned_range"}))
    start_from(fresh, tmp_path / "part")
    for name, tensor in fresh.state_dict().items():
        if name.startswith("unet.conv_out") and prediction == "v":
            assert not tensor.any()
        else:
            assert torch.equal(tensor, source.state_dict()[name]), name
    with pytest.raises(UnclipError, match="do not fit"):
        start_from(Decoder(config(context_dim=8)), tmp_path / "part")


# ---- learning ----------------------------------------------------------------------------------------------


def test_a_few_pictures_are_learned() -> None:
    """Four scenes are drawn from their embeddings far closer than to the mean picture."""
    diffusion = {"prediction": "x_start", "variance": "learned_range"}
    own = config(spatial_seed=True, drop_embedding=0.05, drop_text=1.0, diffusion=diffusion)
    torch.manual_seed(0)
    decoder, process = Decoder(own), GaussianDiffusion(own.diffusion)
    pictures = torch.stack([torch.from_numpy(render(scene(i), 16)).permute(2, 0, 1) for i in range(4)])
    truth, embedding, generator = pictures / 127.5 - 1, unit(4, 7), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    index, history = torch.arange(4).repeat(4), []
    for _ in range(120):
        losses = decoder_loss(decoder, process, own, truth[index], embedding[index], text(4)[index], generator)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
        history.append(losses["mse"].mean().item())
    assert history[0] == pytest.approx(float(truth.pow(2).mean()), rel=1e-3)  # the zero output's error
    assert sum(history[-20:]) / 20 < 0.15 * history[0]
    drawn = DecoderStage(decoder, own).sample(embedding, range(4), steps=10, sampler="ddim", guidance=1.0)
    error = (drawn - truth).pow(2).mean(dim=(1, 2, 3))
    spread = (truth - truth.mean(0)).pow(2).mean()
    assert float(error.max()) < 0.2 * float(spread), (error, spread)
