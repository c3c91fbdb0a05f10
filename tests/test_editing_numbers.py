"""What editing is made of: RePaint's and SDEdit's samplers, masks, and squares of pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unclip.config import DiffusionConfig
from unclip.data.images import ImageError
from unclip.diffusion import GaussianDiffusion, Prediction, SeededNoise, ddim, timesteps_from
from unclip.diffusion.samplers import repaint, sdedit, sdedit_timesteps
from unclip.diffusion.samplers.editing import repaint_levels
from unclip.errors import UsageError
from unclip.frames import Frame, fill_unknown, frame_around, margins, plan_frames, resize
from unclip.masks import check_mask, dilate, feather, mask_box, read_mask, repainted_cells

PROCESS = GaussianDiffusion(DiffusionConfig(variance="fixed_small"))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predicting(x_start: Tensor) -> Any:
    """A denoiser that knows x_0, as it is told."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(x_start.expand_as(x), PROCESS.epsilon_from(x, t, x_start), None)

    return denoise


# ---- RePaint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, jump, times", [(250, 10, 10), (20, 5, 3), (7, 2, 2), (10, 10, 4), (3, 1, 2), (1, 1, 9)]
)
def test_the_way_of_repaint_is_that_of_diffusers(steps: int, jump: int, times: int) -> None:
    from diffusers import RePaintScheduler

    scheduler = RePaintScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps, jump_length=jump, jump_n_sample=times)
    indices = (scheduler.timesteps // (1000 // steps)).tolist()  # of x_t, one below the level
    levels = repaint_levels(steps, jump, times)
    assert levels == [index + 1 for index in indices] + [0]
    assert {abs(a - b) for a, b in pairwise(levels)} == {1}
    halts = len(range(1, steps - jump + 1, jump))
    assert sum(a > b for a, b in pairwise(levels)) == steps + halts * (times - 1) * jump


def test_the_paper_s_way_takes_so_many_steps() -> None:
    """250 steps with j = r = 10: 24 halts, each gone up and down nine times more."""
    levels = repaint_levels(250, 10, 10)
    assert len(levels) - 1 == 250 + 2 * 24 * 9 * 10 == 4570


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_of_repaint_are_those_of_diffusers(eta: float) -> None:
    """Without going back up; there one draw of noise serves both parts, so here too."""
    from diffusers import RePaintScheduler

    count = 10
    kept = [t * (1000 // count) for t in range(count)]
    scheduler = RePaintScheduler(num_train_timesteps=1000, eta=eta, clip_sample=False)
    scheduler.alphas_cumprod = torch.from_numpy(PROCESS.alphas_cumprod)
    scheduler.betas = torch.from_numpy(PROCESS.betas)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(count, jump_length=1, jump_n_sample=1)
    image, x_t, guess = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1), rand(2, 3, 4, 4, seed=2)
    known = (rand(1, 1, 4, 4, seed=3) > 0).double()
    generator, x = torch.Generator().manual_seed(5), x_t
    for t in scheduler.timesteps.tolist():
        epsilon = PROCESS.epsilon_from(x, torch.tensor([t, t]), guess)
        x = scheduler.step(epsilon, t, x, image, known, generator).prev_sample
    mine, drawn = torch.Generator().manual_seed(5), []

    def noise(_: Tensor) -> Tensor:
        fresh = eta == 0 or len(drawn) % 2 == 0
        drawn.append(torch.randn(2, 3, 4, 4, generator=mine, dtype=torch.float64) if fresh else drawn[-1])
        return drawn[-1]

    sampler = repaint(image, known, jump_length=1, resamplings=1)
    ours = sampler(predicting(guess), x_t, PROCESS.steps(kept), noise, eta=eta)
    assert torch.allclose(ours, x, atol=1e-6)


def test_repaint_keeps_what_is_known_and_hears_every_step() -> None:
    image, known, guess = rand(2, 3, 4, 4), torch.zeros(2, 1, 4, 4), rand(2, 3, 4, 4, seed=2)
    known[0, :, :2], known[1, :, :, 1] = 1, 1
    heard: list[tuple[int, int]] = []
    calls: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        calls.append(int(t[0]))
        return predicting(guess)(x, t)  # type: ignore[no-any-return]

    steps = PROCESS.steps(timesteps_from(8, 1000))
    sampler = repaint(image, known, jump_length=2, resamplings=3)
    hear = lambda number, total, _: heard.append((number, total))  # noqa: E731
    drawn = sampler(denoise, rand(2, 3, 4, 4, seed=1), steps, SeededNoise([1, 2]), callback=hear)
    keep = known.bool().expand_as(image)
    assert torch.equal(drawn[keep], image[keep]) and torch.allclose(drawn[~keep], guess[~keep])
    total = 8 + 3 * 2 * 2  # halts at levels 1, 3, 5
    assert len(calls) == total and heard == [(n, total) for n in range(1, total + 1)]


def test_repaint_stays_at_the_level_of_noise_that_the_network_is_told() -> None:
    """Known and unknown part have the variance of q(x_t), upwards and downwards."""
    image = 0.5 * torch.ones(1, 1, 200, 200)
    known = torch.zeros(1, 1, 200, 200)
    known[..., :100] = 1
    seen: list[tuple[float, float, float]] = []

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        bar = float(PROCESS.alphas_cumprod[int(t[0])])
        standard = (x - bar**0.5 * 0.5) / (1 - bar) ** 0.5
        seen.append((float(standard[..., :100].std()), float(standard[..., 100:].std()), float(standard.mean())))
        return Prediction(torch.full_like(x, 0.5), (x - bar**0.5 * 0.5) / (1 - bar) ** 0.5, None)

    sampler = repaint(image, known, jump_length=2, resamplings=3)
    noise = SeededNoise([1])
    sampler(denoise, noise.draw((1, 200, 200)), PROCESS.steps(timesteps_from(8, 1000)), noise)
    for left, right, mean in seen[1:]:
        assert abs(left - 1) < 0.04 and abs(right - 1) < 0.04 and abs(mean) < 0.04


def test_repaint_refuses_numbers_below_one() -> None:
    for name, numbers in (("jump_length", (0, 1)), ("resamplings", (1, 0))):
        with pytest.raises(UsageError, match=f"{name} is 0, expected 1 or more"):
            repaint_levels(5, *numbers)


# ---- SDEdit ------------------------------------------------------------------------------------------------


def test_sdedit_starts_from_the_noised_image() -> None:
    image, noise = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1)
    started: list[Tensor] = []

    def inner(_denoiser: Any, x: Tensor, steps: Any, _noise: Any, **options: Any) -> Tensor:
        started.append(x)
        assert [step.t for step in steps] == [400, 100] and options == {"eta": 0.5}
        return x

    sdedit(image, inner)(predicting(image), noise, PROCESS.steps([100, 400]), torch.randn_like, eta=0.5)
    assert torch.allclose(started[0], PROCESS.q_sample(image, torch.tensor([400, 400]), noise))
    # With the network's x_0 the image itself, DDIM leads back to it.
    back = sdedit(image, ddim)(predicting(image), noise, PROCESS.steps([100, 400]), torch.randn_like)
    assert torch.allclose(back, image)


def test_timesteps_shrink_with_the_strength() -> None:
    whole = timesteps_from(50, 1000)
    assert sdedit_timesteps(whole, 1, 1000) == whole
    assert sdedit_timesteps(whole, 0, 1000) == []
    assert sdedit_timesteps([500, 999], 0.6, 1000) == [300, 599]
    for strength in (0.05, 0.3, 0.6, 0.99):
        shrunk = sdedit_timesteps(whole, strength, 1000)
        assert shrunk[-1] == round(strength * 1000) - 1 and 45 <= len(shrunk) <= 50 and shrunk[0] >= 0
    assert sdedit_timesteps(whole, 0.0004, 1000) == [] and sdedit_timesteps(whole, 0.001, 1000) == [0]
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"strength is .*, expected 0 \(the picture itself\) to 1"):
            sdedit_timesteps(whole, strength, 1000)


# ---- reading masks -----------------------------------------------------------------------------------------


def drawn(mode: str) -> Image.Image:
    """Left half white, right half black; with alpha only the upper half is opaque."""
    image = Image.new("L", (8, 6), 0)
    ImageDraw.Draw(image).rectangle((0, 0, 3, 5), fill=255)
    if mode in ("RGBA", "LA"):
        alpha = Image.new("L", (8, 6), 0)
        ImageDraw.Draw(alpha).rectangle((0, 0, 7, 2), fill=255)
        image = image.convert(mode)
        image.putalpha(alpha)
        return image
    if mode == "I;16":
        return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "I;16"])
def test_white_means_repaint_in_every_mode(mode: str, tmp_path: Path) -> None:
    drawn(mode).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask.shape == (6, 8) and mask.dtype == torch.float32
    assert bool((mask[:, :4] == 1).all()) and bool((mask[:, 4:] == 0).all())
    assert torch.equal(read_mask(tmp_path / "mask.png", invert=True), 1 - mask)
    assert torch.equal(read_mask(drawn(mode)), mask)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_counts_as_black_or_is_the_mask(mode: str) -> None:
    mask = read_mask(drawn(mode))
    assert bool((mask[:3, :4] == 1).all()) and mask.sum() == 12
    hole = read_mask(drawn(mode), "alpha")
    assert bool((hole[:3] == 0).all()) and bool((hole[3:] == 1).all())


def test_soft_masks_keep_their_greys() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert torch.allclose(read_mask(grey), torch.arange(256).view(16, 16) / 255)
    array = np.linspace(0, 1, 12).reshape(3, 4)
    assert torch.allclose(read_mask(array).double(), torch.from_numpy(array))
    assert torch.equal(read_mask(torch.ones(1, 2, 3, dtype=torch.bool)), torch.ones(2, 3))


@pytest.mark.parametrize(
    "source, channel, message",
    [
        (torch.zeros(2, 3, 3), "brightness", r"a mask of shape \(2, 3, 3\); expected \(H, W\) or \(1, H, W\)"),
        (torch.zeros(0, 3), "brightness", r"a mask of shape \(0, 3\)"),
        (torch.full((2, 2), 255, dtype=torch.uint8), "brightness", "divide 8-bit values by 255"),
        (torch.tensor([[0.0, float("nan")]]), "brightness", r"values outside 0 \(keep\) to 1 \(repaint\)$"),
        (drawn("L"), "alpha", r"the mask has no transparency \(its mode is L\)"),
        (drawn("L"), "red", "unknown mask channel 'red'; known: brightness, alpha"),
        (3, "brightness", "a mask of type int; expected a path, a PIL image, an array or a tensor"),
    ],
)
def test_masks_that_cannot_be_read(source: Any, channel: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_mask(source, channel)


def test_mask_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_text("white")
    with pytest.raises(ImageError, match=r"mask.png is not an image"):
        read_mask(tmp_path / "mask.png")
    with pytest.raises(ImageError, match="there is no image file at"):
        read_mask(tmp_path / "none.png")


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(6, 9), "the mask is 9x6 pixels, the picture 8x6; expected the same size"),
        (torch.zeros(6, 8), "black everywhere, so that nothing is to be repainted; white means repaint"),
        (torch.ones(6, 8), "white everywhere, so that nothing of the picture is kept; white means repaint"),
    ],
)
def test_masks_that_do_not_fit_or_leave_nothing(mask: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_mask(mask, 8, 6)


# ---- growing and softening ---------------------------------------------------------------------------------


def test_dilation_draws_a_disc() -> None:
    mask = torch.zeros(15, 17)
    mask[6, 9] = 0.5
    y, x = torch.meshgrid(torch.arange(15) - 6, torch.arange(17) - 9, indexing="ij")
    for radius in (1, 2, 5, 40):
        assert torch.equal(dilate(mask, radius), 0.5 * (y**2 + x**2 <= radius**2).float())
    assert torch.equal(dilate(mask, 0), mask)
    with pytest.raises(UsageError, match="dilate is -1, expected 0 pixels or more"):
        dilate(mask, -1)


def test_a_feather_lies_inside_the_mask() -> None:
    mask = torch.zeros(20, 40)
    mask[:, 10:] = 1
    soft = feather(mask, 4)
    ramp = torch.cat([torch.zeros(10), torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.ones(26)])
    assert torch.equal(soft, ramp.expand(20, -1))
    assert torch.equal(feather(mask, 0), mask)
    assert bool((feather(torch.ones(5, 5), 3) == 1).all())  # the picture's border makes no ramp
    with pytest.raises(UsageError, match="feather is -2"):
        feather(mask, -2)


@pytest.mark.parametrize("pixels", [1, 3, 8])
def test_only_the_surroundings_of_a_mask_are_worked_on(pixels: int) -> None:
    """And the result is that of the whole picture, which a faint spot in each corner makes them work on."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((slice(12, 30), slice(20, 41)), (slice(0, 9), slice(30, 60)), (slice(25, 40), slice(9, 22))):
        mask = torch.zeros(40, 60)
        part = mask[rows, columns]
        part.copy_((torch.rand(part.shape, generator=generator) > 0.3) * torch.rand(part.shape, generator=generator))
        spots = torch.zeros(40, 60)
        spots[[0, 0, -1, -1], [0, -1, 0, -1]] = 1e-6
        before = mask.clone()
        grown = dilate(torch.maximum(mask, spots), pixels)
        assert torch.equal(dilate(mask, pixels), torch.where(grown > 1e-6, grown, 0))
        soft = feather(torch.maximum(mask, spots), pixels)
        torch.testing.assert_close(feather(mask, pixels), soft, atol=1e-6, rtol=0)
        assert torch.equal(mask, before)
    empty = torch.zeros(5, 5)
    assert torch.equal(dilate(empty, 2), empty) and torch.equal(feather(empty, 2), empty)


def test_box_and_cells_of_a_mask() -> None:
    mask = torch.zeros(12, 12)
    mask[5, 3:9] = 0.25
    assert mask_box(mask) == (3, 5, 9, 6)
    cells = repainted_cells(mask, 4)
    assert torch.equal(cells[0, 0].nonzero(), torch.tensor([[1, 1], [1, 2]]))  # rows 3–5, columns 3–8
    large = repainted_cells(mask, 24)[0, 0]
    assert bool(large[10:12, 6:18].all()) and not bool(large[14:].any())


# ---- squares of a picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box, crop, context, expected",
    [
        ((10, 10, 20, 20), "fit", None, Frame(0, 0, 60)),
        ((90, 10, 95, 20), "fit", None, Frame(40, 0, 60)),
        ((45, 20, 55, 30), "fit", None, Frame(20, 0, 60)),
        ((5, 20, 95, 30), "fit", None, Frame(5, -15, 90)),
        ((10, 10, 20, 20), "whole", None, Frame(0, -20, 100)),
        ((40, 20, 60, 30), "mask", None, Frame(30, 5, 40)),
        ((40, 20, 60, 30), "mask", 0.0, Frame(40, 15, 20)),
        ((0, 0, 20, 10), "mask", 0.25, Frame(0, 0, 30)),
        ((0, 0, 100, 60), "mask", 3.0, Frame(0, -20, 100)),
    ],
)
def test_the_square_around_a_mask(box: Any, crop: Any, context: float | None, expected: Frame) -> None:
    assert frame_around(box, 100, 60, crop, context) == expected


@pytest.mark.parametrize(
    "crop, context, message",
    [
        ("middle", None, "unknown crop 'middle'; known: fit, whole, mask"),
        ("fit", 0.5, "context 0.5 is for crop 'mask' alone; with 'fit' leave it out"),
        ("mask", -1.0, "context is -1.0, expected 0"),
        ("mask", float("inf"), "context is inf"),
    ],
)
def test_squares_that_cannot_be(crop: Any, context: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        frame_around((0, 0, 1, 1), 100, 60, crop, context)


def test_cutting_and_pasting() -> None:
    picture = torch.arange(6 * 4).view(1, 4, 6)
    inside = Frame(1, 1, 3)
    assert torch.equal(inside.cut(picture), picture[:, 1:4, 1:4])
    assert torch.equal(inside.paste(picture, inside.cut(picture)), picture)
    beyond = Frame(0, -1, 6)
    square = beyond.cut(picture)
    assert torch.equal(square[:, 1:5], picture) and torch.equal(square[:, 0], picture[:, 0])
    assert torch.equal(square[:, 5], picture[:, 3])  # mirrored, the border twice
    assert torch.equal(beyond.cut(picture, fill=-7)[:, [0, 5]], torch.full((1, 2, 6), -7))
    assert torch.equal(beyond.paste(picture, square + 100), picture + 100)
    assert torch.equal(Frame(-20, -20, 45).paste(picture, Frame(-20, -20, 45).cut(picture)), picture)


@pytest.mark.parametrize("overlap", [0.1, 0.5, 0.75])
@pytest.mark.parametrize(
    "canvas, box, edge",
    [
        ((300, 100), (100, 0, 200, 100), 100),
        ((300, 260), (90, 80, 190, 160), 100),
        ((700, 150), (0, 20, 400, 120), 100),
        ((90, 400), (20, 380, 70, 400), 100),
        ((101, 100), (0, 0, 100, 100), 100),
    ],
)
def test_frames_cover_the_canvas_outwards(canvas: tuple[int, int], box: Any, edge: int, overlap: float) -> None:
    width, height = canvas
    known = torch.zeros(height, width)
    known[box[1] : box[3], box[0] : box[2]] = 1
    frames = plan_frames(width, height, box, edge, overlap)
    for frame in frames:
        seen = frame.cut(known, fill=0.0)
        assert bool((seen > 0).any()), "a frame without anything known"
        if edge <= min(width, height, box[2] - box[0], box[3] - box[1]):  # no less than the overlap both ways
            assert float(seen.mean()) >= overlap * overlap - 0.02
        known = frame.paste(known, torch.ones(edge, edge))
    assert bool((known == 1).all())
    assert len(frames) < 4 * (width / (edge * (1 - overlap)) + 2) * (height / (edge * (1 - overlap)) + 2)


def test_frames_need_an_overlap() -> None:
    for overlap in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match=r"overlap is .*, expected a share of the frame above 0 and below 1"):
            plan_frames(300, 100, (0, 0, 100, 100), 100, overlap)


def test_margins() -> None:
    assert margins(100, 60, (1, 2, 3, 4), None) == (1, 2, 3, 4)
    assert margins(100, 60, (0, 0, 0, 0), (151, 60)) == (25, 0, 26, 0)
    for sides, to, message in (
        ((0, 0, 0, 0), None, "nothing to add"),
        ((0, 0, 0, 0), (100, 60), "nothing to add"),
        ((0, 0, 0, 0), (90, 90), "the picture is 100x60 pixels and cannot be outpainted to 90x90"),
        ((1, 0, 0, 0), (190, 90), "give either the size of the whole"),
        ((0, -1, 0, 0), None, "top is -1, expected 0 pixels or more"),
        ((20_000, 0, 0, 0), None, "outpainting to 20100x60 pixels; expected at most 16384"),
    ):
        with pytest.raises(UsageError, match=message):
            margins(100, 60, sides, to)


def test_what_is_unknown_bleeds_nothing_into_what_is_known() -> None:
    """A constant picture stays constant, whatever stands where nothing is known, for odd edges too."""
    for edge in (1, 7, 64, 100):
        known = torch.ones(edge, edge)
        known[edge // 3 :, edge // 2 :] = 0
        squares = torch.where(known.bool(), 0.25, 99.0).expand(2, 3, -1, -1)
        filled = fill_unknown(squares, known)
        expected = 0.25 if edge > 1 else 0.0  # a single pixel that is unknown
        assert torch.allclose(filled, torch.full_like(filled, expected), atol=1e-5)
    image = rand(1, 3, 9, 9).float()
    assert torch.equal(fill_unknown(image, torch.ones(9, 9)), image)
    assert not bool(fill_unknown(image, torch.zeros(9, 9)).any())
    assert torch.equal(resize(image, 9), image) and resize(image, 4).shape == (1, 3, 4, 4)
