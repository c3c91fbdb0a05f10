"""The decoder's options: Karlo's conditioning, separate guidance scales, noised embeddings, low precision, drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import (
    DIM,
    LENGTH,
    Spy,
    config,
    inputs,
    network,
    overfit,
    stage,
    text,
    unit,
    worst_error,
)
from torch import Tensor

from decoder import Decoder, DecoderConfig, DecoderStage, decoder_loss
from decoder.sampling import KIND
from decoder.train import start_from
from unclip.bundle import save_part
from unclip.clip import TextFeatures
from unclip.config import DiffusionConfig
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError

LEVELS: dict[str, Any] = {"embedding_noise_levels": 1000}
NO = torch.zeros(2, dtype=torch.bool)


def heard(decoder: Decoder) -> list[tuple[Any, ...]]:
    """What the U-Net is given: x_t, t, addition to the time embedding, context, context mask, bottom map."""
    calls: list[tuple[Any, ...]] = []
    decoder.unet.register_forward_pre_hook(lambda _module, args: calls.append(args))
    return calls


def spied(count: int, own: DecoderConfig) -> dict[str, Tensor]:
    spy, images = Spy(), torch.zeros(count, 3, 2, 2)
    process = GaussianDiffusion(own.diffusion)
    decoder_loss(spy, process, own, images, unit(count), text(count), torch.Generator().manual_seed(0))
    return spy.calls[0]


# ---- drops -------------------------------------------------------------------------------------------------


def test_drops_counted_over_a_hundred_thousand_draws() -> None:
    """10 % and 50 %, independent of each other (unCLIP §2.1): within four standard deviations."""
    count = 100_000
    condition = spied(count, config())
    embedding, words = condition["drop_embedding"], condition["drop_text"]
    for found, rate in ((embedding, 0.1), (words, 0.5), (embedding & words, 0.05), (embedding | words, 0.55)):
        assert abs(int(found.sum()) - rate * count) < 4 * (count * rate * (1 - rate)) ** 0.5


# ---- Karlo's conditioning ----------------------------------------------------------------------------------


def test_image_tokens_may_stand_first_and_interleaved() -> None:
    """With the token's index fastest, token k holds channels k, k + 4, k + 8, … of the projection."""
    decoder = network(image_tokens_first=True, image_tokens_interleaved=True)
    calls, condition = heard(decoder), inputs()
    decoder(**condition)
    _, _, _, context, mask, _ = calls[-1]
    projected = decoder.embedding_to_tokens(condition["image_embedding"] * DIM**0.5)
    for token in range(4):
        assert torch.allclose(context[:, token], projected[:, token::4])
    assert torch.allclose(context[:, 4:], decoder.text_norm(decoder.text_to_tokens(condition["text_tokens"])))
    assert torch.equal(mask, torch.cat([torch.ones(2, 4, dtype=torch.bool), condition["text_mask"]], dim=1))


def test_text_embedding_is_added_to_time() -> None:
    decoder = network(text_embedding_to_time=True)
    calls, condition, y = heard(decoder), inputs(), unit(2, 20)
    decoder(**condition, text_embedding=y)
    z = condition["image_embedding"]
    expected = decoder.embedding_to_time(z * DIM**0.5) + decoder.text_embedding_to_time(y * DIM**0.5)
    assert torch.allclose(calls[-1][2], expected, atol=1e-5)
    decoder(**{**condition, "drop_text": ~NO}, text_embedding=y)
    null = decoder.text_embedding_to_time(decoder.null_text_embedding)
    assert torch.allclose(calls[-1][2], decoder.embedding_to_time(z * DIM**0.5) + null, atol=1e-5)
    # Sampling hands it on, and a caption changes the picture through it alone.
    own, features = DecoderStage(decoder, decoder.config), text(2)
    other = TextFeatures(features.tokens, features.mask, unit(2, 60), features.norm)
    drawn = [own.sample(z, [1, 2], text=given_text, guidance=1.0) for given_text in (features, other)]
    assert not torch.allclose(*drawn, atol=1e-3)


def test_the_empty_texts_features_stand_for_a_dropped_caption() -> None:
    decoder = network(null_text="clip", text_embedding_to_time=True)
    calls, condition, empty = heard(decoder), inputs(), text(1, seed=90)
    decoder(**{**condition, "drop_text": ~NO}, text_embedding=unit(2, 20))
    dropped = calls[-1]
    tokens, mask = empty.tokens.expand(2, -1, -1), empty.mask.expand(2, -1)
    swapped = {**condition, "text_tokens": tokens, "text_mask": mask}
    decoder(**swapped, text_embedding=empty.embedding.expand(2, -1))
    for index in (2, 3):
        assert torch.allclose(dropped[index], calls[-1][index], atol=1e-6)
    assert torch.equal(dropped[4], calls[-1][4]) and not bool(dropped[4].all())  # the empty text's own padding
    assert "null_text" not in dict(decoder.named_parameters()) and "null_text" in decoder.state_dict()


def test_raw_embeddings_are_neither_scaled_nor_shortened() -> None:
    decoder = network(embedding_length="raw", text_embedding_to_time=True)
    calls, features, z = heard(decoder), text(2), 3 * unit(2, 7)
    DecoderStage(decoder, decoder.config).sample(z, [1, 2], text=features, steps=1, guidance=1.0)
    assert features.norm is not None
    raw = features.embedding * features.norm[:, None]
    assert torch.allclose(calls[-1][2], decoder.embedding_to_time(z) + decoder.text_embedding_to_time(raw), atol=1e-5)
    with pytest.raises(UnclipError, match="embeddings of raw length; pass text features as FrozenCLIP gives them"):
        unknown = TextFeatures(features.tokens, features.mask, features.embedding)
        DecoderStage(decoder, decoder.config).sample(z, [1, 2], text=unknown)
    with pytest.raises(UsageError, match=r"embedding_noise 0\.2 turns unit vectors.*embedding_noise_levels"):
        config(embedding_length="raw", embedding_noise=0.2)
    assert (config().scale, config(embedding_length="raw").scale) == (DIM**0.5, 1.0)
    assert config(embedding_scale=17.2).scale == 17.2


def test_defaults_have_no_new_weights() -> None:
    """A decoder of today's configuration has the tensors that it always had."""
    outer = {name.split(".")[0] for name in Decoder(config()).state_dict()}
    text_side = {"text_to_tokens", "text_norm", "null_text"}
    assert outer == {"unet", "embedding_to_time", "embedding_to_tokens", "null_embedding", *text_side}


# ---- guidance ----------------------------------------------------------------------------------------------


def test_caption_and_embedding_have_scales_of_their_own() -> None:
    """ε(∅) + s (ε(z) − ε(∅)) + s' (ε(z, y) − ε(z)), all in one batch."""
    own, z, features = stage(), unit(2, 7), text(2)
    options: dict[str, Any] = {"sampler": "ddim", "steps": [600]}
    calls = heard(own.network)  # type: ignore[arg-type]
    found = own.sample(z, [1, 2], text=features, guidance=3.0, guidance_text=1.5, **options)
    assert len(calls) == 1 and len(calls[0][0]) == 6
    x = calls[0][0][:2]
    condition = {**inputs(), "x_t": x, "t": torch.tensor([600, 600]), "image_embedding": z}
    null = own.network(**{**condition, "drop_embedding": ~NO, "drop_text": ~NO})[:, :3]
    image = own.network(**{**condition, "drop_text": ~NO})[:, :3]
    both = own.network(**condition)[:, :3]
    epsilon = null + 3.0 * (image - null) + 1.5 * (both - image)
    bar = float(own.process.alphas_cumprod[600])
    assert torch.allclose(found, ((x - (1 - bar) ** 0.5 * epsilon) / bar**0.5).clamp(-1, 1), atol=1e-4)
    # Equal scales are plain guidance, without a third of the work; the configuration may name them too.
    equal = own.sample(z, [1, 2], text=features, guidance=3.0, guidance_text=3.0, **options)
    assert len(calls[-1][0]) == 4
    assert torch.allclose(equal, own.sample(z, [1, 2], text=features, guidance=3.0, **options), atol=1e-5)
    named = DecoderStage(own.network, config(guidance=3.0, guidance_text=1.5))
    assert torch.equal(named.sample(z, [1, 2], text=features, **options), found)
    alone = named.sample(z, [1, 2], **options)  # without a caption the default for captions does not matter
    assert torch.allclose(alone, own.sample(z, [1, 2], guidance=3.0, **options), atol=1e-5)


def test_without_an_embedding_the_captions_scale_is_the_only_one() -> None:
    own, features = stage(), text(2)
    found = own.sample(None, [1, 2], text=features, guidance=9.0, guidance_text=2.0)
    assert torch.allclose(found, own.sample(None, [1, 2], text=features, guidance=2.0), atol=1e-5)


def test_interval_and_rescale_reach_the_guidance() -> None:
    own, z, features = stage(), unit(2, 7), text(2)
    options: dict[str, Any] = {"text": features, "sampler": "ddim", "steps": [100, 600]}
    plain, guided = (own.sample(z, [1, 2], guidance=s, **options) for s in (1.0, 4.0))
    nowhere = own.sample(z, [1, 2], guidance=4.0, guidance_interval=(0.9, 1.0), **options)
    partly = own.sample(z, [1, 2], guidance=4.0, guidance_interval=(0.0, 0.3), **options)
    assert torch.allclose(nowhere, plain, atol=1e-5)
    assert not torch.allclose(partly, plain, atol=1e-3) and not torch.allclose(partly, guided, atol=1e-3)
    rescaled = own.sample(z, [1, 2], guidance=4.0, guidance_rescale=0.7, **options)
    assert not torch.allclose(rescaled, guided, atol=1e-3)
    named = DecoderStage(own.network, config(guidance_interval=[0.9, 1.0], guidance_rescale=0.7))
    assert torch.allclose(named.sample(z, [1, 2], guidance=4.0, **options), plain, atol=1e-5)


def test_scales_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match=r"guidance_text 2\.0 needs a caption, and none is given"):
        stage().sample(unit(1), [0], guidance_text=2.0)
    with pytest.raises(UsageError, match=r"interval is \(0\.8, 0\.2\)"):
        stage().sample(unit(1), [0], guidance_interval=(0.8, 0.2))


# ---- noise conditioning augmentation -----------------------------------------------------------------------


def test_training_noises_the_embedding_and_tells_the_level() -> None:
    own = config(**LEVELS)
    condition = spied(2000, own)
    level, z = condition["noise_level"], unit(2000)
    assert int(level.min()) >= 0 and int(level.max()) <= 1000 and 450 < float(level.float().mean()) < 550
    # In the network's space z has elements of size 1, like the noise: what is left of it is sqrt(ᾱ).
    kept = (condition["image_embedding"] * z).sum(1)
    bar = torch.from_numpy(GaussianDiffusion(own.diffusion).alphas_cumprod).float()
    expected = torch.where(level == 0, torch.tensor(1.0), bar[(level - 1).clamp_min(0)].sqrt())
    assert float((kept - expected).abs().mean()) < 0.3 and abs(float((kept - expected).mean())) < 0.03
    length = condition["image_embedding"].norm(dim=1)
    assert abs(float(length.mean()) - 1) < 0.05


def test_the_level_reaches_the_network_unless_the_embedding_is_dropped() -> None:
    decoder, condition = network(**LEVELS), inputs()
    levels = [torch.tensor([0, 0]), torch.tensor([700, 700])]
    first, second = (decoder(**condition, noise_level=level) for level in levels)
    assert not torch.allclose(first, second, atol=1e-3)
    dropped = {**condition, "drop_embedding": ~NO}
    assert torch.equal(*(decoder(**dropped, noise_level=level) for level in levels))


def test_sampling_noises_the_embedding_as_asked() -> None:
    own, z = stage(**LEVELS), unit(3, 7)
    calls = heard(own.network)  # type: ignore[arg-type]
    clean = own.sample(z, [5, 6, 5])
    assert torch.equal(clean, own.sample(z, [5, 6, 5], embedding_noise_level=0))
    start = calls[0][0][:3]
    noisy = own.sample(z, [5, 6, 5], embedding_noise_level=400)
    assert not torch.allclose(noisy, clean, atol=1e-2)
    assert torch.equal(calls[-own.config.steps][0][:3], start)  # type: ignore[operator]  # x_T is the seed's, whatever the level
    alone = own.sample(z[1:2], [6], embedding_noise_level=400)  # and so is the noise
    assert torch.allclose(alone[0], noisy[1], atol=1e-4)


def test_levels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match=r"embedding_noise_level 3 needs a decoder trained .*was not; leave it out"):
        stage().sample(unit(1), [0], embedding_noise_level=3)
    for level in (-1, 1001):
        with pytest.raises(UsageError, match=rf"embedding_noise_level is {level}; this decoder takes 0 to 1000"):
            stage(**LEVELS).sample(unit(1), [0], embedding_noise_level=level)
    with pytest.raises(UsageError, match=r"embedding_noise_levels is 1001, the process has 1000"):
        config(embedding_noise_levels=1001)


def test_augmented_training_may_start_from_a_plain_decoder(tmp_path: Path) -> None:
    """What is new ends in zeros, so that the network begins by giving the same answer."""
    source = network()
    save_part(tmp_path / "part", KIND, source.config, source.state_dict())
    fresh = Decoder(config(**LEVELS)).eval()
    start_from(fresh, tmp_path / "part")
    condition = inputs()
    assert torch.allclose(fresh(**condition, noise_level=torch.tensor([3, 800])), source(**condition), atol=1e-6)


def test_a_refiner_may_be_added_to_a_trained_decoder(tmp_path: Path) -> None:
    """It too begins by changing nothing."""
    source = network()
    save_part(tmp_path / "part", KIND, source.config, source.state_dict())
    fresh = Decoder(config(unet={**source.config.unet.model_dump(), "refine_channels": 4})).eval()
    start_from(fresh, tmp_path / "part")
    condition = inputs()
    assert torch.equal(fresh(**condition), source(**condition))


# ---- low precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "text": {"kind": "glide", "vocab_size": 20, "length": LENGTH, "width": 16, "depth": 1, "heads": 2},
            "embedding_noise_levels": 1000,
            "inpainting": True,
            "spatial_seed": True,
        },
        {"null_text": "clip", "text_embedding_to_time": True, "embedding_length": "raw"},
    ],
    ids=["default", "own text", "karlo"],
)
def test_a_decoder_loads_in_half_precision(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    source = network(**changes)
    save_part(tmp_path / "part", KIND, source.config, source.state_dict())
    whole, half = (DecoderStage.load(tmp_path / "part", dtype=d) for d in (torch.float32, dtype))
    assert {p.dtype for p in half.network.parameters()} == {dtype}
    features = text(2)
    if source.config.text.kind == "glide":
        features = TextFeatures(torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]]), features.mask, torch.zeros(2, 0))
    options: dict[str, Any] = {"text": features, "sampler": "ddim", "steps": [700], "guidance": 1.5}
    exact, rough = (one.sample(unit(2, 7), [1, 2], **options) for one in (whole, half))
    assert rough.dtype == torch.float32 and float(exact.std()) > 0.1
    # One step from t = 700 multiplies the network's rounding by about 2.
    assert float((exact - rough).abs().mean()) < (0.08 if dtype == torch.bfloat16 else 0.01)


# ---- learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x_start", "v", "epsilon"])
def test_each_prediction_type_learns(prediction: str) -> None:
    diffusion = {"prediction": prediction, "variance": "learned_range", "timestep_bias": 4}
    own = config(drop_embedding=0.0, drop_text=1.0, diffusion=diffusion)
    trained, history = overfit(own, unit(4, 7), text(4), steps=60)
    assert sum(history[-10:]) / 10 < 0.3 * history[0]
    steps: Any = [850] if prediction == "epsilon" else 1  # ε̂ at pure noise says nothing of x_0

    def error(z: Tensor) -> float:
        return worst_error(trained.sample(z, range(4), steps=steps, sampler="ddim", guidance=1.0))

    if prediction != "epsilon":
        assert error(unit(4, 7)) < 1.0 < 1.8 < error(unit(4, 7).flip(0))


def test_karlos_conditioning_and_noised_embeddings_learn() -> None:
    own = config(
        null_text="clip", text_embedding_to_time=True, image_tokens_first=True, image_tokens_interleaved=True,
        embedding_noise_levels=200, drop_embedding=0.1, drop_text=0.3,
        diffusion=DiffusionConfig(prediction="x_start", timestep_bias=4).model_dump(),
    )  # fmt: skip
    trained, history = overfit(own, unit(4, 7), text(4), steps=70)
    assert sum(history[-10:]) / 10 < 0.35 * history[0]
    drawn = trained.sample(unit(4, 7), range(4), text=text(4), steps=1, sampler="ddim", guidance=1.0)
    assert worst_error(drawn) < 1.2
