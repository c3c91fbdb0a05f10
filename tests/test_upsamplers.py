"""Upsamplers: corruptions, network, objective, sampling, recipes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_upsampler import randomised, scenes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unclip.config import load_config, parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError
from upsamplers import corruption
from upsamplers.config import BlurConfig, BSRConfig, NoCorruptionConfig, UpsamplerConfig, UpsamplerRunConfig
from upsamplers.network import Upsampler, upsample
from upsamplers.objective import downsample, upsampler_loss
from upsamplers.sampling import KIND, UpsamplerStage
from upsamplers.start import start_from, with_start

CONFIGS = Path(__file__).parents[1] / "configs" / "upsampler"
SMALL: dict[str, Any] = {
    "low_size": 16,
    "high_size": 64,
    "unet": {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "patch_size": 4},
    "diffusion": {"prediction": "x_start"},
    "residual": True,
    "steps": 2,
    "lowest_timestep": 60,
}
# Recipe → (parameters, most GFLOP of one forward pass over a whole image; 0 leaves it unmeasured).
RECIPES = {
    "paper_64_to_256": (729_702_083, 0),
    "paper_256_to_1024": (282_059_139, 0),
    "karlo": (2 * 691_579_523, 0),
    "imagen_256_to_1024": (410_265_859, 0),
    "latent_256_to_1024": (100_844_484, 0),
    "emoji_64_to_256": (2_117_952, 10),
    "emoji_256_to_1024": (1_049_328, 20),
    "synthetic_64_to_256": (0, 10),
    "synthetic_256_to_1024": (0, 20),
}
CONTINUED = {"emoji_64_to_256_drafts": "emoji_64_to_256"}  # recipes that go on with a trained upsampler, and its own


def small(**changes: Any) -> UpsamplerConfig:
    return parse_config(UpsamplerConfig, {**SMALL, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random pictures in [-1, 1]."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator(seed)) * 2 - 1
    return upsample(coarse, (size, size))


# ---- corruption --------------------------------------------------------------------------------------------


def test_blur_kernel_is_the_closed_form() -> None:
    side = math.exp(-1 / (2 * 0.6**2))
    row = torch.tensor([side, 1.0, side]) / (1 + 2 * side)
    impulse = torch.full((1, 3, 7, 7), -1.0)
    impulse[:, :, 3, 3] = 1.0
    blurred = (corruption.gaussian_blur(impulse) + 1) / 2
    assert torch.allclose(blurred[0, 1, 2:5, 2:5], torch.outer(row, row), atol=1e-6)
    assert torch.allclose(corruption.gaussian_blur(torch.ones(1, 3, 5, 9)), torch.ones(1, 3, 5, 9), atol=1e-6)


def test_anisotropic_kernel_turns_with_its_angle() -> None:
    kernel = corruption.gaussian_kernel(9, 2.0, 0.5)
    assert torch.allclose(corruption.gaussian_kernel(9, 2.0, 0.5, math.pi / 2), kernel.T, atol=1e-6)
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
def test_bsr_keeps_size_and_range_and_follows_its_seed(size: tuple[int, int]) -> None:
    before = upsample(images(6, 16), size)
    first = corruption.bsr(before, BSRConfig(), generator(1))
    assert first.shape == before.shape
    assert float(first.abs().max()) <= 1
    assert torch.equal(first, corruption.bsr(before, BSRConfig(), generator(1)))
    assert not torch.allclose(first, corruption.bsr(before, BSRConfig(), generator(2)))


def test_bsr_applies_each_operation_once_in_a_uniform_order(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def recorder(name: str) -> corruption.Operation:
        def operation(image: Tensor, _config: BSRConfig, _generator: torch.Generator) -> Tensor:
            heard.append(name)
            return image

        return operation

    names = list(corruption.OPERATIONS)
    for name in names:
        monkeypatch.setitem(corruption.OPERATIONS, name, recorder(name))
    count = 2400
    corruption.bsr(torch.zeros(count, 3, 2, 2), BSRConfig(), generator())
    orders = Counter(tuple(heard[i : i + 4]) for i in range(0, len(heard), 4))
    assert len(heard) == 4 * count and all(sorted(order) == sorted(names) for order in orders)
    assert len(orders) == 24
    assert all(60 <= number <= 145 for number in orders.values())  # 100 expected, ±4.5 standard deviations


def test_bsr_strength_is_bounded_by_its_configuration() -> None:
    before = images(8, 32)
    weak = BSRConfig(blur_sigma=(0.1, 0.2), resize_scale=(1, 1), noise_sigma=(0, 1), jpeg_quality=(95, 98))
    strong = BSRConfig(blur_sigma=(2, 3), resize_scale=(0.2, 0.3), noise_sigma=(20, 30), jpeg_quality=(5, 10))
    errors = [float((corruption.bsr(before, c, generator()) - before).pow(2).mean()) for c in (weak, strong)]
    assert errors[0] < 2e-3 < 1e-2 < errors[1]


@pytest.mark.parametrize("kind", [BlurConfig, BSRConfig])
def test_probability_is_the_share_of_corrupted_images(kind: type[BlurConfig] | type[BSRConfig]) -> None:
    before = images(1, 8).expand(1000, -1, -1, -1)
    after = corruption.corrupt(before, kind(probability=0.3), generator())
    changed = int((after != before).flatten(1).any(1).sum())
    assert 240 <= changed <= 360  # 300 expected, standard deviation 14.5
    assert torch.equal(corruption.corrupt(before, NoCorruptionConfig(), generator()), before)


# ---- network -----------------------------------------------------------------------------------------------


def test_untrained_residual_network_is_the_interpolation() -> None:
    low_res, t = images(2, 8), torch.tensor([3, 900])
    output = Upsampler(small())(torch.randn(2, 3, 32, 32, generator=generator()), t, low_res)
    assert torch.equal(output, upsample(low_res, (32, 32)))


def test_plain_network_with_learned_variance_has_six_channels() -> None:
    config = small(residual=False, diffusion={"prediction": "epsilon", "variance": "learned_range"})
    output = Upsampler(config)(torch.zeros(1, 3, 16, 16), torch.tensor([5]), torch.zeros(1, 3, 4, 4))
    assert output.shape == (1, 6, 16, 16)


@pytest.mark.parametrize("height, width", [(32, 32), (28, 36), (4, 20), (37, 61)])
def test_padding_only_touches_sizes_that_need_it(height: int, width: int) -> None:
    network = randomised(small())
    x_t = torch.randn(1, 3, height, width, generator=generator())
    output = network(x_t, torch.tensor([500]), images(1, 9))
    assert output.shape == x_t.shape and bool(torch.isfinite(output).all())


# ---- objective ---------------------------------------------------------------------------------------------


def test_loss_corrupts_and_reduces_the_condition() -> None:
    truth, seen = images(400, 16), []

    def network(x_t: Tensor, _t: Tensor, low_res: Tensor) -> Tensor:
        seen.append(low_res)
        return torch.zeros_like(x_t)

    for probability in (0.0, 0.5, 1.0):
        config = small(corruption={"kind": "blur", "probability": probability})
        process = GaussianDiffusion(config.diffusion)
        losses = upsampler_loss(network, process, config, {"image": truth}, generator())
        assert losses["loss"].shape == (400,)
        assert torch.allclose(losses["loss"], truth.pow(2).flatten(1).mean(1), atol=1e-6)  # x_0 from zeros
    clean = downsample(truth, config)
    assert clean.shape == (400, 3, 4, 4)
    changed = [int((low_res != clean).flatten(1).any(1).sum()) for low_res in seen]
    assert changed[0] == 0 and changed[2] == 400
    assert 155 <= changed[1] <= 245  # 200 expected, standard deviation 10
    blurred = corruption.gaussian_blur(clean)
    assert torch.allclose(seen[2], blurred, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_with_learned_variance_is_finite(prediction: str) -> None:
    config = small(residual=False, diffusion={"prediction": prediction, "variance": "learned_range"})
    process = GaussianDiffusion(config.diffusion)
    losses = upsampler_loss(Upsampler(config), process, config, {"image": images(3, 16)}, generator())
    assert set(losses) == {"mse", "vb", "loss", "quartile"} and bool(torch.isfinite(losses["loss"]).all())


def test_small_model_learns_to_beat_bicubic() -> None:
    truth = scenes(8, 64)
    config = small(unet={**SMALL["unet"], "model_channels": 32}, corruption={"kind": "none"})
    torch.manual_seed(0)
    network, process, random = Upsampler(config), GaussianDiffusion(config.diffusion), generator()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(150):
        loss = upsampler_loss(network, process, config, {"image": truth}, random)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low_res = downsample(truth, config)
    result = UpsamplerStage.from_network(network).sample(low_res, range(8))
    error = float((result - truth).pow(2).mean())
    bicubic = float((upsample(low_res, (64, 64)) - truth).pow(2).mean())
    assert error < 0.5 * bicubic


# ---- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(16, 16), (11, 19), (1, 3)])
def test_whole_images_of_any_size(height: int, width: int) -> None:
    low_res = upsample(images(1, 8), (height, width))
    result = UpsamplerStage.from_network(randomised(small())).sample(low_res, [0])
    assert result.shape == (1, 3, 4 * height, 4 * width)
    assert bool(torch.isfinite(result).all()) and float(result.abs().max()) <= 1


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 1.0)])
def test_a_seed_gives_one_picture_in_any_batch(
    sampler: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = UpsamplerStage.from_network(randomised(small(sampler=sampler, eta=eta, steps=4)))
    low_res, seeds = images(3, 16), [7, 8, 7]
    together = stage.sample(low_res, seeds)
    alone = torch.cat([stage.sample(low_res[i : i + 1], [seeds[i]]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[:1], stage.sample(low_res[:1], [9]), atol=1e-3)
    monkeypatch.setattr("upsamplers.sampling._PIXELS_AT_ONCE", 2 * 64 * 64)
    heard: list[tuple[int, int]] = []
    in_parts = stage.sample(low_res, seeds, callback=lambda number, total, _: heard.append((number, total)))
    assert torch.allclose(together, in_parts, atol=1e-5)
    assert heard == [(i, 8) for i in range(1, 9)]  # two parts of four steps


def test_timesteps_end_where_configured() -> None:
    stage = UpsamplerStage.from_network(Upsampler(small()))
    assert stage.timesteps() == [60, 999] and stage.timesteps(1) == [999]
    assert stage.timesteps(4)[0] == 60 and len(stage.timesteps(4)) == 4
    with pytest.raises(UsageError, match="sampling steps"):
        stage.sample(images(1, 8), [0], steps=0)


@pytest.mark.parametrize(
    "low_res, seeds, message",
    [
        (torch.zeros(1, 4, 8, 8), [0], "shape"),
        (torch.zeros(3, 8, 8), [0], "shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [0], "floating point"),
        (torch.zeros(1, 3, 0, 8), [0], "at least one pixel"),
        (torch.zeros(0, 3, 8, 8), [], "at least one image"),
        (torch.zeros(2, 3, 8, 8), [0], "one seed an image"),
        (torch.full((1, 3, 8, 8), math.nan), [0], "NaN"),
        (torch.full((1, 3, 8, 8), 255.0), [0], "127.5"),
    ],
)
def test_bad_input_is_refused(low_res: Tensor, seeds: Sequence[int], message: str) -> None:
    with pytest.raises(UnclipError, match=message):
        UpsamplerStage.from_network(Upsampler(small())).sample(low_res, seeds)


def test_saved_model_gives_the_same_picture(tmp_path: Path) -> None:
    from unclip.bundle import save_part

    network = randomised(small())
    save_part(tmp_path / "part", KIND, network.config, network.state_dict())
    stage = UpsamplerStage.load(tmp_path / "part")
    low_res = images(1, 8)
    expected = UpsamplerStage.from_network(network).sample(low_res, [3])
    assert stage.config == network.config
    assert torch.equal(stage.sample(low_res, [3]), expected)
    with pytest.raises(UnclipError, match=r"config\.json"):
        UpsamplerStage.load(tmp_path / "nowhere")


# ---- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_builds_with_its_stated_size(name: str) -> None:
    config = load_config(UpsamplerRunConfig, CONFIGS / f"{name}.yaml")
    parameters, most_gflop = RECIPES[name]
    assert config.data.crop_size == config.model.high_size // 4  # unCLIP, App. C
    with torch.device("meta"):
        network = Upsampler(config.model)
        count = sum(p.numel() for p in network.parameters())
        assert count == parameters or (parameters == 0 and count < 300_000), count
        if most_gflop:
            size, low = config.model.high_size, config.model.low_size
            with FlopCounterMode(display=False) as counter:
                network(torch.empty(1, 3, size, size), torch.zeros(1).long(), torch.empty(1, 3, low, low))
            assert counter.get_total_flops() <= most_gflop * 1e9


@pytest.mark.parametrize("name", sorted(CONTINUED))
def test_a_recipe_that_goes_on_fits_what_it_starts_from(name: str) -> None:
    before = load_config(UpsamplerRunConfig, CONFIGS / f"{CONTINUED[name]}.yaml").model
    config = load_config(UpsamplerRunConfig, CONFIGS / f"{name}.yaml", ["init_from=emoji"])
    filled, start = with_start(config)
    assert start is not None and filled.model.unet == before.unet
    assert (filled.model.low_size, filled.model.high_size) == (before.low_size, before.high_size)
    assert filled.data.low_size == before.low_size and filled.data.has_low
    start_from(Upsampler(filled.model), start.folder)


def test_every_recipe_is_tested() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {*RECIPES, *CONTINUED}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unet": {"attention_resolutions": [16]}}, "convolutions only"),
        ({"diffusion": {"prediction": "epsilon"}}, "x_start"),
        ({"high_size": 40}, "multiple"),
        ({"steps": 990}, "do not fit"),
        ({"corruption": {"kind": "blur", "kernel_size": 4}}, "odd"),
        ({"corruption": {"kind": "bsr", "resize_scale": [2, 1]}}, "resize_scale"),
        ({"corruption": {"kind": "blurr"}}, "kind"),
        ({"corruption": {"kind": "blur", "sigmaa": 1}}, "sigma"),
    ],
)
def test_bad_configuration_is_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**changes)


def test_data_and_model_must_agree() -> None:
    with pytest.raises(UsageError, match="high_size 64"):
        parse_config(UpsamplerRunConfig, {"model": SMALL, "data": {"image_size": 256}})
    with pytest.raises(UsageError, match="divisible"):
        parse_config(UpsamplerRunConfig, {"model": SMALL, "data": {"image_size": 64, "crop_size": 18}})
