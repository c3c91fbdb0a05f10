"""Corruptions of the upsamplers' condition: kernels, orders, noise, JPEG, camera, and each one's share."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip.config import parse_config
from unclip.errors import UsageError
from upsamplers import bsrgan, camera, corruption, filters
from upsamplers.config import BlurConfig, BSRConfig, BSRGANConfig, CameraConfig, UpsamplerConfig
from upsamplers.network import upsample
from upsamplers.objective import downsample, make_condition

QUIET: dict[str, Any] = {"jpeg_probability": 0.0, "final_jpeg_probability": 0.0, "camera_probability": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth random pictures in [-1, 1]."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator(seed)) * 2 - 1
    return upsample(coarse, (size, size))


# ---- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along, across, angle, centre", [(1.5, 1.5, 0, 0), (2, 1, 0.7, 0), (1, 1.6, 2.5, 1.5)])
def test_a_kernel_sums_to_one_and_has_the_covariance_asked_for(
    along: float, across: float, angle: float, centre: float
) -> None:
    kernel = filters.gaussian_kernel(25, along, across, angle, centre).double()
    offsets = torch.arange(25, dtype=torch.float64) - 12
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    mean = torch.stack([(kernel * x).sum(), (kernel * y).sum()])
    assert torch.allclose(mean, torch.full((2,), float(centre), dtype=torch.float64), atol=1e-4)
    places = torch.stack([x - mean[0], y - mean[1]])
    covariance = torch.einsum("ij,aij,bij->ab", kernel, places, places)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    wanted = turn @ torch.diag(torch.tensor([along**2, across**2])).double() @ turn.T
    assert torch.allclose(covariance, wanted, atol=1e-3)


def test_a_very_narrow_kernel_between_two_pixels_is_still_a_kernel() -> None:
    kernel = filters.gaussian_kernel(5, 0.01, 0.01, centre=0.5)
    assert torch.isfinite(kernel).all() and float(kernel.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_decimation_does_not_move_the_picture(factor: int) -> None:
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    small = bsrgan.decimate(ramp, factor, 0.8)
    expected = torch.nn.functional.avg_pool2d(ramp, factor)
    margin = 13 // factor + 1  # the kernel reaches the repeated edge pixels there
    assert small.shape == expected.shape
    assert torch.allclose(small[..., margin:-margin], expected[..., margin:-margin], atol=1e-5)


# ---- BSRGAN: order, sizes, shares --------------------------------------------------------------------------


def test_the_order_is_uniform_among_those_with_the_resize_before_the_reduction() -> None:
    count, random = 6000, generator()
    orders = [bsrgan.draw_order(random) for _ in range(count)]
    names = sorted(bsrgan.OPERATIONS)
    assert all(sorted(order) == names for order in orders)
    assert all(order.index("resize") < order.index("reduce") for order in orders)
    for name in set(names) - {"resize", "reduce"}:
        places = Counter(order.index(name) for order in orders)
        # 6000 / 7 = 857 expected at each of the seven places, standard deviation 27
        assert len(places) == 7 and all(730 <= number <= 985 for number in places.values())
    pairs = Counter((order.index("resize"), order.index("reduce")) for order in orders)
    assert len(pairs) == 21 and all(215 <= number <= 360 for number in pairs.values())  # 286 expected, deviation 17


@pytest.mark.parametrize("factor, size", [(4, (32, 48)), (2, (20, 12)), (3, (9, 15)), (4, (4, 8))])
def test_the_result_has_the_low_size_and_range(factor: int, size: tuple[int, int]) -> None:
    for seed in range(12):
        image = upsample(images(1, 16, seed), size)
        result = bsrgan.degrade(image, factor, BSRGANConfig(camera_probability=1.0), generator(seed))
        assert result.shape == (1, 3, size[0] // factor, size[1] // factor)
        assert bool(torch.isfinite(result).all()) and float(result.abs().max()) <= 1


def test_each_operation_happens_as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: Counter[str] = Counter()

    def count(name: str, module: Any = bsrgan) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            heard[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for name in ("random_jpeg", "random_camera", "decimate", "random_mixing", "resize"):
        count(name)
    kernels: list[tuple[int, float, float]] = []
    original = filters.gaussian_kernel

    def kernel(size: int, first: float, second: float, angle: float = 0.0, centre: float = 0.0) -> Tensor:
        kernels.append((size, first, second))
        return original(size, first, second, angle, centre)

    monkeypatch.setattr(bsrgan, "gaussian_kernel", kernel)
    config = BSRGANConfig()
    runs, image = 400, images(1, 8)
    for seed in range(runs):
        bsrgan.degrade(image, 4, config, generator(seed))
    assert heard["random_jpeg"] == pytest.approx(runs * 1.9, abs=4 * 6)  # 0.9 among the others, and the last one
    assert heard["random_camera"] == pytest.approx(runs * 0.25, abs=4 * 8.7)
    assert heard["decimate"] == pytest.approx(runs * 0.25, abs=4 * 8.7)
    assert heard["random_mixing"] == pytest.approx(runs * 0.2, abs=4 * 8)
    assert heard["resize"] == pytest.approx(runs * (1 + 0.75 + 0.25), abs=4 * 12.2)  # reduction, resize, halving
    blurs = [entry for entry in kernels if entry[1] != entry[2]]
    plain = len(kernels) - heard["decimate"] - len(blurs)
    assert len(blurs) + plain == 2 * runs
    assert len(blurs) == pytest.approx(runs, abs=4 * 14.1)  # half of two blurs each
    assert {size for size, first, second in blurs} == set(range(7, 26, 2))


def test_the_same_seed_degrades_alike_in_any_batch() -> None:
    config = UpsamplerConfig(low_size=8, high_size=32, corruption=BSRGANConfig(probability=0.6))
    batch = images(6, 32)
    together = make_condition(batch, config, generator(3))
    assert torch.equal(together, make_condition(batch, config, generator(3)))
    seeds = corruption.draw_seeds(6, generator(3))
    plain = downsample(batch, config)
    untouched = [i for i in range(6) if torch.equal(together[i], plain[i])]
    assert 0 < len(untouched) < 6
    for i in set(range(6)) - set(untouched):
        alone = bsrgan.degrade_seeded(batch[i : i + 1], 4, config.corruption, [seeds[i] + 1])  # type: ignore[arg-type]
        assert torch.equal(together[i : i + 1], alone)
    mild = BSRConfig()
    assert torch.equal(
        corruption.corrupt_seeded(plain, mild, seeds)[2:4], corruption.corrupt_seeded(plain[2:4], mild, seeds[2:4])
    )


def test_the_share_of_degraded_images_is_counted() -> None:
    config = UpsamplerConfig(low_size=2, high_size=4, corruption=BSRGANConfig(probability=0.3, **QUIET))
    batch = images(1, 4).expand(500, -1, -1, -1)
    result = make_condition(batch, config, generator())
    changed = int((result != downsample(batch[:1], config)).flatten(1).any(1).sum())
    assert 109 <= changed <= 191  # 150 expected, standard deviation 10.2


def test_blur_keeps_its_share_and_meaning() -> None:
    batch = images(400, 8)
    result = corruption.corrupt(batch, BlurConfig(probability=0.5), generator())
    blurred = corruption.gaussian_blur(batch)
    sharp = (result == batch).flatten(1).all(1)
    assert 160 <= int(sharp.sum()) <= 240
    assert torch.allclose(result[~sharp], blurred[~sharp], atol=1e-6)


# ---- noise, JPEG -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, shares", [("colour", (1, 0, 0)), ("grey", (0, 1, 0)), ("correlated", (0, 0, 1))])
def test_the_noise_has_the_level_and_correlation_of_its_kind(kind: str, shares: tuple[int, int, int]) -> None:
    config = BSRGANConfig(noise_shares=shares, noise_sigma=(10, 10))
    grey = torch.zeros(1, 3, 128, 128)
    scale = bsrgan.Scale(4, (1, 1))
    noise = bsrgan.OPERATIONS["noise"](grey, scale, config, generator(5))[0].flatten(1) * 127.5  # in 8-bit levels
    covariance = torch.cov(noise)
    if kind == "colour":
        assert torch.allclose(covariance, 100 * torch.eye(3), atol=4)
    elif kind == "grey":
        assert torch.allclose(covariance, 100 * torch.ones(3, 3), atol=4)
    else:
        random = generator(5)
        filters.between((10, 10), random)
        filters.uniform(random)
        mixing = bsrgan.random_mixing(3, random).float()
        assert torch.allclose(covariance, 100 * mixing @ mixing.T, atol=4)
        assert float((covariance - covariance.diag().diag()).abs().max()) > 1


def test_the_mixing_matrix_has_eigenvalues_between_zero_and_one() -> None:
    random = generator()
    values = torch.cat([torch.linalg.eigvalsh(m @ m.T) for m in (bsrgan.random_mixing(3, random) for _ in range(300))])
    assert float(values.min()) >= -1e-9 and float(values.max()) < 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.05)


def test_jpeg_qualities_fill_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    heard: Counter[int] = Counter()
    save = Image.Image.save

    def spy(self: Any, file: Any, format: str | None = None, **options: Any) -> None:
        heard[options["quality"]] += 1
        save(self, file, format=format, **options)

    monkeypatch.setattr(Image.Image, "save", spy)
    random, image = generator(), images(1, 8)
    for _ in range(300):
        filters.random_jpeg(image, (30, 35), random)
    assert set(heard) == {30, 31, 32, 33, 34, 35}
    assert all(24 <= number <= 76 for number in heard.values())  # 50 expected, standard deviation 6.5


# ---- camera ------------------------------------------------------------------------------------------------


def test_light_and_display_values_are_inverse() -> None:
    values = torch.linspace(-1, 1, 201).view(1, 1, 1, -1).expand(1, 3, 3, -1)
    assert torch.allclose(camera.from_light(camera.to_light(values)), values, atol=2e-5)
    light = camera.to_light(values)
    assert float(light.min()) == pytest.approx(0, abs=1e-6) and float(light.max()) == pytest.approx(1, abs=1e-5)
    assert bool((light[..., 1:] > light[..., :-1]).all())


def test_demosaicking_restores_flat_colours_and_ramps() -> None:
    colour = torch.tensor([0.2, 0.5, 0.7]).view(1, 3, 1, 1).expand(1, 3, 10, 11)
    assert torch.allclose(camera.demosaic(camera.mosaic(colour)), colour, atol=1e-6)
    ramp = (torch.arange(16.0).view(1, 1, -1, 1) + 2 * torch.arange(12.0).view(1, 1, 1, -1)).expand(1, 3, -1, -1) / 64
    restored = camera.demosaic(camera.mosaic(ramp))
    assert torch.allclose(restored[..., 2:-2, 2:-2], ramp[..., 2:-2, 2:-2], atol=1e-6)


def test_a_bayer_sensor_sees_one_red_two_green_and_one_blue_of_four() -> None:
    for channel, places in enumerate([{(0, 0)}, {(0, 1), (1, 0)}, {(1, 1)}]):
        light = torch.zeros(1, 3, 4, 4)
        light[:, channel] = 1
        seen = {(int(y) % 2, int(x) % 2) for y, x in camera.mosaic(light)[0, 0].nonzero()}
        assert seen == places


@pytest.mark.parametrize("light", [0.1, 0.5, 0.8])
def test_sensor_noise_has_the_variance_of_shot_and_read_noise(light: float) -> None:
    seen = camera.sensor_noise(torch.full((1, 1, 200, 200), light), 0.002, 1e-4, generator())
    assert float(seen.mean()) == pytest.approx(light, abs=1e-3)
    assert float(seen.var()) == pytest.approx(0.002 * light + 1e-4, rel=0.04)


def test_a_noiseless_camera_gives_the_picture_back_and_a_noisy_one_does_not() -> None:
    picture = images(1, 32)[:, :1].expand(-1, 3, -1, -1) * 0.8
    clear = CameraConfig(shot_noise=(1e-8, 1e-8), read_noise_spread=0)
    noisy = CameraConfig(shot_noise=(0.012, 0.012), read_noise_spread=0)
    first = camera.random_camera(picture, clear, generator())
    second = camera.random_camera(picture, noisy, generator())
    assert float((first - picture).abs().mean()) < 0.01
    assert float((second - picture).abs().mean()) > 0.05
    tiny = camera.random_camera(picture[..., :2, :2], noisy, generator())
    assert tiny.shape == (1, 3, 2, 2) and bool(torch.isfinite(tiny).all())


# ---- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kernel_sizes": [7, 24]}, "odd"),
        ({"noise_shares": [0.5, 0.5, 0.5]}, "sum to 1"),
        ({"jpeg_quality": [95, 30]}, "jpeg_quality"),
        ({"shrink": [1, 20]}, "shrink"),
        ({"kernels": []}, "kernels"),
        ({"kernels": ["lanczos"]}, "kernels"),
        ({"camera": {"red_gain": [0.5, 2]}}, "red_gain"),
        ({"jpeg_qualty": [1, 2]}, "did you mean 'corruption.jpeg_quality'"),
    ],
)
def test_a_bad_degradation_is_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config(UpsamplerConfig, {"corruption": {"kind": "bsrgan", **changes}})
