"""Latents on tiny random networks: the inversion's mathematics, the file, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_bundle import make_bundle
from helpers_diffusion import process
from torch import Tensor

from decoder import DecoderConfig
from unclip import Latents, Prompt, UnCLIP, UnclipError, UsageError
from unclip.bundle import load_weights, read_part_json, save_part
from unclip.config import parse_config
from unclip.diffusion import Prediction, SeededNoise, ddim, timesteps_from
from unclip.diffusion.latents import highest_level, invert, kept_share, lowest_level, replay
from unclip.digest import digest
from unclip.geometry import angle_between, peak_signal_to_noise

RNG = torch.Generator().manual_seed(0)
PICTURES = torch.rand(2, 3, 64, 64, generator=RNG) * 2 - 1


def tiny(tiny_parts: dict[str, Path], root: Path) -> Path:
    """The tiny bundle with a decoder that predicts x_0: an untrained one of ε knows nothing of its own noise."""
    body = read_part_json(tiny_parts["decoder"], "decoder")["config"]
    config = parse_config(DecoderConfig, {**body, "diffusion": {**body["diffusion"], "prediction": "x_start"}})
    save_part(root / "decoder", "decoder", config, load_weights(tiny_parts["decoder"]))
    return make_bundle(root / "bundle", {**tiny_parts, "decoder": root / "decoder"})


@pytest.fixture(scope="module")
def bundle(tiny_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tiny_parts, tmp_path_factory.mktemp("x_start"))


@pytest.fixture(scope="module")
def model(bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(bundle, device="cpu", size=64)


@pytest.fixture(scope="module")
def latents(model: UnCLIP) -> Latents:
    return model.encode(PICTURES, steps=8, refinements=2)


def test_what_a_blind_denoiser_leaves_out_survives_the_round_trip() -> None:
    """x̂_0 = 0.7 x_0 whatever x_t says: the level is where the missing 30 % are as large as the noise."""
    ours = process(schedule="cosine", prediction="x_start")
    x_start = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(0.7 * x_start, ours.epsilon_from(x_t, t, 0.7 * x_start), None)

    levels = lowest_level(denoise, x_start, ours)
    for row, t in enumerate(levels.tolist()):
        missing = float(0.3 * x_start[row].square().mean().sqrt())
        ratio = ours.sqrt_one_minus_alphas_cumprod / ours.sqrt_alphas_cumprod
        assert ratio[t - 1] < missing <= ratio[t]
    steps = ours.steps(timesteps_from(100, 1000, lowest=int(levels.max())))
    x_end = invert(denoise, x_start, steps, refinements=2)
    assert float(x_end.square().mean().sqrt()) == pytest.approx(1, abs=0.2)
    assert torch.allclose(replay(denoise, x_end, steps, SeededNoise([0, 0, 0])), x_start, atol=0.03)
    whole = ddim(denoise, x_end, steps, SeededNoise([0, 0, 0]))  # which ends on x̂_0
    assert torch.allclose(whole, 0.7 * x_start, atol=1e-6)


def test_where_an_inversion_ends_depends_on_what_is_predicted() -> None:
    for schedule in ("cosine", "linear"):
        ours = process(schedule=schedule, prediction="epsilon")
        top = highest_level(ours)
        assert ours.sqrt_alphas_cumprod[top] >= 0.02 > ours.sqrt_alphas_cumprod[top + 1]
    for prediction in ("x_start", "v"):
        assert highest_level(process(schedule="cosine", prediction=prediction)) == 999


def test_eta_one_forgets_the_noise_and_the_share_says_how_much_is_left() -> None:
    """With x̂_0 = 0 the state is pure noise, so that its correlation with x_T is the share."""
    ours = process(schedule="linear", prediction="x_start")

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        zero = torch.zeros_like(x_t)
        return Prediction(zero, ours.epsilon_from(x_t, t, zero), None)

    steps = ours.steps([60, 300, 600, 999])
    x_end = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))
    assert kept_share(steps, 0.0) == 1
    shares = [kept_share(steps, eta) for eta in (0.0, 0.3, 0.6, 1.0)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.05
    level = math.sqrt((1 - steps[-1].alpha_bar) / steps[-1].alpha_bar)
    for eta, share in zip((0.3, 0.6), shares[1:3], strict=True):
        end = replay(denoise, x_end, steps, SeededNoise([5]), eta=eta) / level
        assert float((end * x_end).mean()) == pytest.approx(share**2, abs=0.02)  # weighed by the share once more
        assert float(end.square().mean()) == pytest.approx(share**2, abs=0.02)
    with pytest.raises(UsageError, match="2 or more timesteps, got 1"):
        replay(denoise, x_end, steps[:1], SeededNoise([5]))


def test_a_tiny_decoder_gives_its_pictures_back_in_any_batch(model: UnCLIP, latents: Latents) -> None:
    back = model.reconstruct(latents, output="tensor")
    assert isinstance(back, Tensor)
    assert bool((peak_signal_to_noise(back, PICTURES) > 30).all())
    alone = model.reconstruct(latents[1:], output="tensor")
    assert isinstance(alone, Tensor) and torch.allclose(alone, back[1:], atol=1e-4)
    trip = model.round_trip(PICTURES[:1], steps=8, refinements=2)
    assert trip.psnr > 30 and trip.image.shape == (1, 3, 64, 64)
    assert len(model.reconstruct(PICTURES[:1], steps=3)) == 1


def test_upsamplers_follow_a_reconstruction(bundle: Path) -> None:
    whole = UnCLIP.from_pretrained(bundle, device="cpu", size=256)
    trip = whole.round_trip(PICTURES[:1], steps=2, size=256)
    assert trip.image.shape == (1, 3, 256, 256)
    assert [p.size for p in whole.reconstruct(trip.latents, size=256)] == [(256, 256)]  # type: ignore[union-attr]


def test_latents_survive_their_file(model: UnCLIP, latents: Latents, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    latents.save(file)
    again = Latents.load(file)
    assert torch.equal(again.embedding, latents.embedding) and again.noise is not None and latents.noise is not None
    assert torch.equal(again.noise, latents.noise)
    assert again.timesteps == latents.timesteps and again.origin == latents.origin == model.origin


def test_latents_of_another_model_are_refused(bundle: Path, latents: Latents) -> None:
    other = UnCLIP.from_pretrained(bundle, device="cpu", size=64)
    other.reconstruct(latents[:1])
    with torch.no_grad():
        next(other.decoder.network.parameters()).add_(1e-3)
    with pytest.raises(UnclipError, match=r"belong to the model 'tiny' \(decoder \w{8}\), and this is 'tiny'"):
        other.reconstruct(latents)
    foreign = replace(latents, origin=replace(other.origin, clip="0" * 16))
    with pytest.raises(UnclipError, match=r"\(CLIP 00000000\).*encode the picture again with this model"):
        other.variations(foreign[:1])


def test_a_decoder_sampled_otherwise_is_the_same_decoder(model: UnCLIP) -> None:
    network, config = model.decoder.network, model.decoder.config
    assert digest(network, config.model_copy(update={"steps": 7, "guidance": 2.0})) == digest(network, config)
    assert digest(network, config.model_copy(update={"embedding_scale": 2.0})) != digest(network, config)
    # Nor does it matter how the weights lie in memory.
    body = {name: torch.randn(shape) for name, shape in (("a", (40, 3, 3, 3)), ("b", (2, 2)), ("c", ()), ("d", (0, 4)))}

    class Weights(torch.nn.Module):
        def __init__(self, strided: bool) -> None:
            super().__init__()
            for name, tensor in body.items():
                turned = tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.ndim else tensor
                self.register_buffer(name, turned if strided else tensor)

    assert digest(Weights(True)) == digest(Weights(False))


def test_latents_serve_the_model_in_another_precision(bundle: Path, latents: Latents) -> None:
    half = UnCLIP.from_pretrained(bundle, device="cpu", size=64, dtype=torch.bfloat16)
    assert next(half.decoder.network.parameters()).dtype == torch.bfloat16
    (drawn,) = half.reconstruct(latents[:1], output="tensor")
    (exact,) = UnCLIP.from_pretrained(bundle, device="cpu", size=64).reconstruct(latents[:1], output="tensor")
    assert (drawn - exact).abs().mean() < 0.1


def test_files_that_hold_no_latents_are_refused(latents: Latents, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UnclipError, match="there is no file of latents at"):
        Latents.load(tmp_path / "none.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors")
    with pytest.raises(UnclipError, match="is damaged or not a safetensors file"):
        Latents.load(text)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"embedding": torch.zeros(1, 4)}, foreign)
    with pytest.raises(UnclipError, match="holds no latents; expected what `unclip reconstruct` wrote"):
        Latents.load(foreign)
    broken = replace(latents, noise=torch.full_like(latents.noise, math.nan))  # type: ignore[arg-type]
    broken.save(tmp_path / "nan.safetensors")
    with pytest.raises(UnclipError, match="holds NaN or infinity"):
        Latents.load(tmp_path / "nan.safetensors")
    with pytest.raises(UsageError, match="latents without noise are embeddings alone"):
        replace(latents, noise=None).to_bytes()
    with pytest.raises(UnclipError, match="cannot write"):
        latents.save(tmp_path / "text.safetensors" / "below")


def test_an_interpolation_is_uniform_and_begins_and_ends_at_its_pictures(model: UnCLIP, latents: Latents) -> None:
    ends = [latents[:1], latents[1:]]
    way = model.between(ends, frames=9)
    assert len(way) == 9 and way.noise is not None and latents.noise is not None
    turns = angle_between(way.embedding[:-1], way.embedding[1:])
    assert float((turns - turns.mean()).abs().max()) < 1e-5
    assert torch.equal(way[:1].embedding, ends[0].embedding) and torch.equal(way[8:].embedding, ends[1].embedding)
    assert torch.equal(way.noise[:1], latents.noise[:1]) and torch.equal(way.noise[8:], latents.noise[1:])
    pictures = model.frames_of(way, output="tensor")
    assert isinstance(pictures, Tensor)
    assert torch.allclose(pictures[[0, 8]], model.reconstruct(latents, output="tensor"), atol=1e-5)  # type: ignore[arg-type]
    assert bool((peak_signal_to_noise(pictures[[0, 8]], PICTURES) > 30).all())
    loop = model.between(ends, frames=3, loop=True)
    assert len(loop) == 4 and torch.allclose(loop.embedding[1], loop.embedding[3], atol=1e-6)


def test_fixed_noise_is_what_decode_draws(model: UnCLIP) -> None:
    ends = list(PICTURES[:, None])
    pictures = model.interpolate(ends, frames=3, noise="fixed", seed=4, output="tensor")
    z = model.embed_image(PICTURES)
    assert isinstance(pictures, Tensor)
    assert torch.allclose(pictures[[0, 2]], model.decode(z, seed=4, output="tensor"), atol=1e-3)


def test_a_prompt_stands_for_what_sample_draws(model: UnCLIP) -> None:
    wanted = model.sample("pizza", seed=3, size=64, output="tensor")
    way = model.between([Prompt("pizza"), PICTURES[:1]], frames=2, seed=3, steps=8, refinements=3)
    assert torch.allclose(way.embedding[0], model.predict_embedding("pizza", seed=3)[0], atol=1e-6)
    drawn = model.frames_of(way, seed=3, output="tensor")
    assert isinstance(drawn, Tensor) and float(peak_signal_to_noise(drawn[:1], wanted)) > 30


def test_variations_of_latents_follow_eta_and_seed(model: UnCLIP, latents: Latents) -> None:
    one = latents[:1]
    same = model.variations(one, num_images=2, eta=0.0, output="tensor")
    assert torch.equal(same[0], same[1])
    assert torch.allclose(same[:1], model.reconstruct(one, output="tensor"), atol=1e-5)  # type: ignore[arg-type]
    varied = model.variations(one, num_images=2, seed=6, eta=0.5, output="tensor")
    assert not torch.allclose(varied[0], varied[1], atol=1e-2)
    alone = model.variations(one, seed=7, eta=0.5, output="tensor")
    assert torch.allclose(alone[0], varied[1], atol=1e-4)
    assert torch.equal(model.variations(one, eta=1.0, output="tensor"), model.variations(one, output="tensor"))


def test_text_diffs_turn_towards_the_text(model: UnCLIP, latents: Latents) -> None:
    way = model.toward(latents[:1], "rainbow", base="pizza", max_theta=0.5, frames=7)
    assert way.noise is not None and latents.noise is not None
    assert torch.equal(way.embedding[0], latents.embedding[0])
    assert all(torch.equal(noise, latents.noise[0]) for noise in way.noise)
    z_t, z_t0 = model.clip.encode_text(["rainbow", "pizza"]).embedding
    z_d = (z_t - z_t0) / (z_t - z_t0).norm()
    turns = angle_between(way.embedding, latents.embedding[:1])
    half = angle_between(latents.embedding[0], z_d) / 2
    assert torch.allclose(turns, torch.linspace(0, 1, 7, dtype=torch.float64) * half, atol=1e-5)
    towards = way.embedding @ z_d
    assert bool((towards[1:] > towards[:-1]).all())
    empty = model.toward(latents[:1], "rainbow", frames=2)
    z_e = model.clip.encode_text([""]).embedding[0]
    wanted = angle_between(latents.embedding[0], z_t - z_e) / 2
    assert float(angle_between(empty.embedding[0], empty.embedding[1])) == pytest.approx(float(wanted), abs=1e-5)


def test_what_is_refused(model: UnCLIP, latents: Latents) -> None:
    one, two = latents[:1], latents[1:]
    for call, message in (
        (lambda: model.between([one]), "between 2 or more, got 1"),
        (lambda: model.between([one, two], frames=1), "frames is 1, expected 2 or more"),
        (lambda: model.between([one, one]), "ends 1 and 2 have the same CLIP embedding"),
        (lambda: model.between([one, two, two]), "ends 2 and 3 have the same CLIP embedding"),
        (lambda: model.between([one, replace(two, embedding=-one.embedding)]), "opposite directions"),
        (lambda: model.between([one, latents]), "these latents are of several"),
        (lambda: model.between([one, replace(two, timesteps=(1, 999))]), "over different timesteps"),
        (lambda: model.between([one, Prompt(" ")]), "is empty"),
        (lambda: model.between([one, two], noise="white"), "noise is 'white', expected 'inverted' or 'fixed'"),
        (lambda: model.between([one, two], guidance=3.0), "guidance is of no use here"),
        (lambda: model.toward(one, "pizza", max_theta=0.0), "max_theta is 0, expected above 0"),
        (lambda: model.toward(one, "pizza", max_theta=1.5), "max_theta is 1.5, expected above 0"),
        (lambda: model.toward(one, "pizza", frames=1), "frames is 1, expected 2 or more"),
        (lambda: model.toward(one, "pizza", base="pizza"), "the same CLIP embedding"),
        (lambda: model.toward(one, " "), "prompt 1 is empty"),
        (lambda: model.variations(one, eta=1.5), "eta is 1.5, expected 0 .* to 1"),
        (lambda: model.variations(latents), "variations takes one image, got 2"),
        (lambda: model.reconstruct(one, eta=-0.1), "eta is -0.1"),
        (lambda: model.reconstruct(one, sampler="ddpm"), "sampler is of no use here"),
        (lambda: model.encode(PICTURES, steps=1), "2 or more timesteps, got 1"),
        (lambda: model.encode(PICTURES, refinements=-1), "refinements is -1"),
        (lambda: model.round_trip(PICTURES), "takes one image, got 2"),
    ):
        with pytest.raises(UsageError, match=message):
            call()  # type: ignore[no-untyped-call]
