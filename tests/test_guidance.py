"""Guidance: classifier-free in all its forms, by gradients, and the treatment of x̂_0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_diffusion import (
    MODES,
    SPREAD,
    T,
    draw_mixture,
    exact_mixture,
    generator,
    log_responsibility,
    normal,
    process,
)
from torch import Tensor, nn
from torch.nn import functional as F

from unclip.config import XStartClipConfig, parse_config
from unclip.diffusion import (
    Prediction,
    classifier_guidance,
    clip_from,
    clip_guidance,
    dynamic_threshold,
    get_sampler,
    make_denoiser,
    noise_augment,
    sample_levels,
    spaced_timesteps,
    static_clip,
)
from unclip.errors import UsageError


class Spy:
    """Puts out its condition's value, and a variance channel that tells the halves apart."""

    def __init__(self, double: bool = False) -> None:
        self.batches: list[int] = []
        self.double = double

    def __call__(self, x: Tensor, t: Tensor, *, y: Tensor, other: Tensor | None) -> Tensor:
        assert len(x) == len(t) == len(y) and other is None
        self.batches.append(len(x))
        output = x + y[:, None]
        return torch.cat([output, y[:, None].expand_as(x)], dim=1) if self.double else output


CONDITION = {"y": torch.tensor([1.0, 2.0, 3.0]), "other": None}
WEAKER = {"y": torch.tensor([0.5, 1.0, 1.5]), "other": None}
NULL = {"y": torch.tensor([-1.0]), "other": None}  # one row stands for all


def guided(scale: Any, spy: Spy, condition: Any = CONDITION, t: int = 100, **options: Any) -> tuple[Prediction, Tensor]:
    ours = process(prediction="x_start", variance="learned_range" if spy.double else "fixed_small")
    x = normal(3, 2, seed=1).float()
    denoiser = make_denoiser(spy, ours, condition, NULL, scale, **options)
    return denoiser(x, torch.full((3,), t)), x


# ---- classifier-free ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_guidance_is_the_stated_combination_in_one_call(scale: float) -> None:
    spy = Spy()
    prediction, x = guided(scale, spy)
    conditional = x + torch.tensor([[1.0], [2.0], [3.0]])
    expected = (x - 1) + scale * (conditional - (x - 1))
    assert torch.allclose(prediction.x_start, expected, atol=1e-6)
    assert spy.batches == [3 if scale == 1 else 6]  # 1 is the conditional model, at its price
    if scale == 1:
        assert torch.equal(prediction.x_start, conditional)
    if scale == 0:
        assert torch.equal(prediction.x_start, x - 1)


@pytest.mark.parametrize("scale", [3.0, [2.0, 5.0]])
def test_guidance_takes_the_variance_of_the_full_condition(scale: Any) -> None:
    chain = CONDITION if isinstance(scale, float) else [WEAKER, CONDITION]
    prediction, _ = guided(scale, Spy(double=True), chain)
    assert prediction.variance_fraction is not None
    expected = torch.tensor([[1.0], [1.5], [2.0]]).expand(3, 2)  # (y + 1)/2
    assert torch.equal(prediction.variance_fraction, expected)


@pytest.mark.parametrize(
    "scales, rows",
    [([2.0, 5.0], 9), ([3.0, 3.0], 6), ([1.0, 4.0], 6), ([1.0, 1.0], 3), ([2.0, 0.0], 9), ([0.0, 2.0], 9)],
)
def test_a_chain_of_conditions_is_the_stated_sum_in_one_call(scales: list[float], rows: int) -> None:
    """out(∅) + s_1 (out(c_1) − out(∅)) + s_2 (out(c_2) − out(c_1)), and what cancels is not computed."""
    spy = Spy()
    prediction, x = guided(scales, spy, [WEAKER, CONDITION])
    null, weak, full = (x + y for y in (-1.0, WEAKER["y"][:, None], CONDITION["y"][:, None]))  # type: ignore[index]
    expected = null + scales[0] * (weak - null) + scales[1] * (full - weak)
    assert torch.allclose(prediction.x_start, expected, atol=1e-5)
    assert spy.batches == [rows]


def test_a_chain_of_equal_scales_is_plain_guidance() -> None:
    chained, _ = guided([3.0, 3.0], Spy(), [WEAKER, CONDITION])
    plain, _ = guided(3.0, Spy())
    assert torch.equal(chained.x_start, plain.x_start) and torch.equal(chained.epsilon, plain.epsilon)


@pytest.mark.parametrize("t, inside", [(0, False), (199, True), (500, True), (799, True), (800, False), (999, False)])
def test_outside_its_interval_guidance_is_the_conditional_model(t: int, inside: bool) -> None:
    spy = Spy()
    prediction, _ = guided(4.0, spy, t=t, interval=(0.2, 0.8))
    plain, _ = guided(4.0 if inside else 1.0, Spy(), t=t)
    assert torch.equal(prediction.x_start, plain.x_start)
    assert spy.batches == [6 if inside else 3]


def test_an_interval_looks_at_each_sample() -> None:
    ours, spy = process(prediction="x_start"), Spy()
    denoiser = make_denoiser(spy, ours, CONDITION, NULL, 4.0, interval=(0.2, 0.8))
    x, t = normal(3, 2, seed=1).float(), torch.tensor([500, 950, 300])
    found = denoiser(x, t).x_start
    conditional = x + CONDITION["y"][:, None]  # type: ignore[index]
    expected = (x - 1) + 4 * (conditional - (x - 1))
    assert torch.allclose(found[[0, 2]], expected[[0, 2]], atol=1e-6)
    assert torch.equal(found[1], conditional[1]) and spy.batches == [6]


def test_rescale_keeps_the_conditional_deviation() -> None:
    weight = normal(16, 16, seed=3).float()

    def network(x: Tensor, t: Tensor, *, y: Tensor) -> Tensor:
        return torch.tanh(x @ weight + y[:, None])

    ours, x, t = process(prediction="v"), normal(4, 16, seed=1).float(), torch.full((4,), 300)
    condition, null = {"y": torch.arange(4.0)}, {"y": torch.zeros(1)}

    def output(scale: float, rescale: float) -> Tensor:
        prediction = make_denoiser(network, ours, condition, null, scale, rescale=rescale)(x, t)
        return ours.velocity(prediction.x_start, t, prediction.epsilon)

    plain, full, half, wanted = output(6.0, 0.0), output(6.0, 1.0), output(6.0, 0.5), output(1.0, 0.7)
    assert torch.allclose(full.std(1), wanted.std(1), rtol=1e-4)
    assert bool((plain[1:].std(1) > 1.2 * wanted[1:].std(1)).all())
    assert torch.allclose(half, 0.5 * (plain + full), atol=1e-5)
    assert torch.allclose(full / full.std(1, keepdim=True), plain / plain.std(1, keepdim=True), atol=1e-4)


def test_guidance_that_cannot_be_is_refused() -> None:
    ours = process()
    with pytest.raises(UsageError, match=r"1 guidance scales for 2 conditions; expected one scale each"):
        make_denoiser(Spy(), ours, [WEAKER, CONDITION], NULL, 3.0)
    for interval in ((0.5, 0.2), (-0.1, 0.5), (0.0, 1.5)):
        with pytest.raises(UsageError, match=r"guidance interval is \(.*0 <= low <= high <= 1"):
            make_denoiser(Spy(), ours, CONDITION, NULL, 3.0, interval=interval)
    with pytest.raises(UsageError, match=r"rescale is 1.5, expected 0 \(none\) to 1"):
        make_denoiser(Spy(), ours, CONDITION, NULL, 3.0, rescale=1.5)


# ---- x̂_0 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_epsilon_follows_the_clipped_x_start(scale: float) -> None:
    prediction, x = guided(scale, Spy(), clip=static_clip(1.5))
    assert float(prediction.x_start.abs().max()) == 1.5
    ours, t = process(), torch.tensor([100, 100, 100])
    assert torch.allclose(ours.q_sample(prediction.x_start, t, prediction.epsilon), x, atol=1e-5)


def test_static_clip() -> None:
    assert static_clip(2.0)(torch.tensor([-5.0, 0.3, 7.0])).tolist() == pytest.approx([-2, 0.3, 2])


def test_dynamic_threshold_divides_by_the_percentile_of_each_sample() -> None:
    inside = torch.linspace(-0.9, 0.9, 101)
    outside = torch.linspace(-4, 4, 101)
    result = dynamic_threshold(0.9)(torch.stack([inside, outside]).view(2, 1, 1, 101))
    assert torch.equal(result[0].flatten(), inside)  # s is at least 1
    s = torch.quantile(outside.abs(), 0.9)
    assert 3 < float(s) < 4
    assert torch.allclose(result[1].flatten(), outside.clamp(-s, s) / s)


def test_the_treatment_of_x_start_is_configured() -> None:
    x, own = torch.linspace(-4, 4, 9)[None], static_clip(3.0)
    assert clip_from(None, own) is own and clip_from(None) is None
    assert clip_from(XStartClipConfig(kind="none"), own) is None
    static = clip_from(XStartClipConfig(kind="static", limit=2.0), own)
    dynamic = clip_from(XStartClipConfig(kind="dynamic", percentile=0.5), own)
    assert static is not None and dynamic is not None
    assert torch.equal(static(x), x.clamp(-2, 2)) and torch.equal(dynamic(x), x.clamp(-2, 2) / 2)
    with pytest.raises(UsageError, match=r"percentile"):
        parse_config(XStartClipConfig, {"kind": "dynamic", "percentile": 1.5})


# ---- gradients ---------------------------------------------------------------------------------------------


def fresh_noise(x: Tensor, random: torch.Generator = generator(7)) -> Tensor:  # noqa: B008
    return torch.randn(x.shape, generator=random, dtype=x.dtype)


@pytest.mark.parametrize("t", [20, 300, 900])
def test_the_exact_classifier_makes_the_exact_conditional_model(t: int) -> None:
    """Bayes: ∇ log p(x_t) + ∇ log p(y|x_t) = ∇ log p(x_t|y)."""
    ours, x = process(), normal(50, 2, seed=t)
    steps = torch.full((50,), t)
    for mode in (0, 1):
        steered = classifier_guidance(
            exact_mixture(ours), ours, lambda x, t, mode=mode: log_responsibility(ours, x, t)[:, mode]
        )
        found, expected = steered(x, steps), exact_mixture(ours, mode)(x, steps)
        assert torch.allclose(found.x_start, expected.x_start, atol=1e-8)
        assert torch.allclose(found.epsilon, expected.epsilon, atol=1e-8)


def test_the_mean_of_ddpm_moves_by_the_variance_times_the_gradient() -> None:
    """μ̂ = μ + s Σ ∇ log p(y|x_t) with Σ = β/sqrt(α), β to first order (Dhariwal & Nichol 2021, algorithm 1)."""
    ours, x, direction = process(), normal(4, 2), torch.tensor([0.3, -0.2], dtype=torch.float64)
    steps = [step for step in ours.steps(list(range(T))) if step.t in (400, 399)]
    plain = exact_mixture(ours)
    steered = classifier_guidance(plain, ours, lambda x, t: x @ direction, 2.5)

    def one(denoiser: Any) -> Tensor:
        first: list[Tensor] = []

        def stop(x: Tensor, t: Tensor) -> Prediction:
            first.append(x)
            return denoiser(x, t)

        get_sampler("ddpm")(stop, x, steps, torch.zeros_like)
        return first[1]

    beta = steps[0].beta
    assert torch.allclose(one(steered) - one(plain), 2.5 * beta / (1 - beta) ** 0.5 * direction.expand(4, 2), atol=1e-9)


class Classifier(nn.Module):
    """Knows noise: (x_t, t) -> features."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = t[:, None].float() / T
        return self.out(self.layers(torch.cat([x.float(), level, level.square()], dim=1)))


def train(module: nn.Module, loss: Any, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for number in range(steps):
        optimizer.zero_grad()
        loss(number).backward()
        optimizer.step()
    return module.requires_grad_(False)


def share_of(mode: int, x: Tensor) -> float:
    return float(((x[:, None] - MODES).square().sum(-1).argmin(1) == mode).double().mean())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_trained_classifier_leads_to_its_class(sampler: str) -> None:
    ours = process(schedule="linear")
    torch.manual_seed(0)
    classifier = Classifier(32, 2)

    def loss(number: int) -> Tensor:
        x_start, which = draw_mixture(256, seed=2 * number)
        t = ours.sample_timesteps(256, generator(number))
        return F.cross_entropy(classifier(ours.q_sample(x_start, t, normal(256, 2, seed=number)), t), which)

    train(classifier, loss)
    steps = ours.steps(spaced_timesteps(T, 40))

    def draw(scale: float) -> Tensor:
        def log_probability(x: Tensor, t: Tensor) -> Tensor:
            return classifier(x, t).log_softmax(1)[:, 0]

        steered = classifier_guidance(exact_mixture(ours), ours, log_probability, scale, static_clip(1.5))
        with torch.inference_mode():  # as the stages sample
            return get_sampler(sampler)(steered, normal(300, 2), steps, fresh_noise)

    drawn = draw(1.0)
    assert share_of(0, draw(0.0)) < 0.45  # 0.3 of the data
    assert share_of(0, drawn) > 0.9
    there = drawn[(drawn - MODES[0]).norm(dim=1) < 0.7]
    assert torch.allclose(there.mean(0), MODES[0], atol=0.1)
    assert bool((there.std(0) < 1.6 * SPREAD).all())


@pytest.mark.parametrize("at", ["x_t", "x_start"])
def test_a_trained_pair_of_towers_leads_to_the_caption(at: Any) -> None:
    """A noise-aware CLIP of two captions, and a clean one used on x̂_0."""
    ours = process(schedule="linear")
    torch.manual_seed(1)
    towers = nn.ModuleDict({"image": Classifier(32, 4), "text": nn.Embedding(2, 4)})

    def similarity_of(x: Tensor, t: Tensor) -> Tensor:
        """Cosines to both captions, (B, 2)."""
        return F.normalize(towers["image"](x, t), dim=1) @ F.normalize(towers["text"].weight, dim=1).T

    def loss(number: int) -> Tensor:
        x, which = draw_mixture(256, seed=2 * number)
        t = torch.zeros(256, dtype=torch.long)
        if at == "x_t":
            t = ours.sample_timesteps(256, generator(number))
            x = ours.q_sample(x, t, normal(256, 2, seed=number))
        return F.cross_entropy(10 * similarity_of(x, t), which)

    train(towers, loss)

    def similarity(x: Tensor, t: Tensor) -> Tensor:
        return similarity_of(x, t if at == "x_t" else torch.zeros_like(t))[:, 0]

    shares = []
    for scale in (0.0, 15.0):
        steered = clip_guidance(exact_mixture(ours), ours, similarity, scale, static_clip(1.5), at=at)
        with torch.inference_mode():
            x = get_sampler("ddim")(steered, normal(300, 2), ours.steps(spaced_timesteps(T, 40)), fresh_noise)
        shares.append(share_of(0, x))
    assert shares[0] < 0.45 and shares[1] > 0.9


def test_gradients_leave_pure_noise_alone_and_respect_the_clip() -> None:
    ours = process(zero_terminal_snr=True, prediction="v")
    x = normal(3, 2)

    def plain(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(torch.full_like(x, 0.2), x, None)

    steered = classifier_guidance(plain, ours, lambda x, t: 100 * x.sum(1), 5.0, static_clip(1.0))
    end = steered(x, torch.full((3,), T - 1))
    assert torch.allclose(end.x_start, torch.full_like(x, 0.2)) and torch.allclose(end.epsilon, x)
    middle = steered(x, torch.full((3,), 500))
    assert torch.equal(middle.x_start, torch.ones_like(x))
    t = torch.full((3,), 500)
    assert torch.allclose(ours.q_sample(middle.x_start, t, middle.epsilon), x)


def test_gradients_through_a_network_with_conditions_made_in_inference_mode() -> None:
    ours, layer = process(prediction="x_start"), nn.Linear(2, 2).requires_grad_(False)
    with torch.inference_mode():
        condition = {"y": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        denoiser = make_denoiser(lambda x, t, y: layer(x) * y, ours, condition)
        steered = clip_guidance(denoiser, ours, lambda x, t: x.sum(1), 1.0, at="x_start")
        x, t = torch.ones(2, 2), torch.full((2,), 500)
        plain, found = denoiser(x, t), steered(x, t)
    bar = float(ours.alphas_cumprod[500])
    shift = (condition["y"] @ layer.weight) * (1 - bar) / bar**0.5
    assert torch.allclose(found.x_start - plain.x_start, shift, rtol=1e-4, atol=1e-5)


# ---- noise conditioning augmentation -----------------------------------------------------------------------


def test_noise_augmentation_is_q_at_the_level() -> None:
    ours, x, noise = process(), normal(4, 3), normal(4, 3, seed=1)
    noised, levels = noise_augment(x, torch.tensor([0, 1, 500, T]), noise, ours)
    assert levels.tolist() == [0, 1, 500, T]
    assert torch.equal(noised[0], x[0])
    expected = ours.q_sample(x, torch.tensor([0, 0, 499, T - 1]), noise)
    assert torch.equal(noised[1:], expected[1:])
    same, level = noise_augment(x, 500, noise, ours)
    assert level.tolist() == [500] * 4 and torch.equal(same[2], noised[2])


def test_noise_levels_are_uniform_and_checked() -> None:
    drawn = sample_levels(30_000, 4, generator())
    counts = torch.bincount(drawn, minlength=5)
    assert len(counts) == 5 and int(counts.min()) > 5650 and int(counts.max()) < 6350  # 6000, five deviations
    ours, x = process(), normal(2, 3)
    for level in (-1, T + 1):
        with pytest.raises(UsageError, match=rf"noise levels from {level} to {level}; expected 0 \(none\) to 1000"):
            noise_augment(x, level, x, ours)
    with pytest.raises(UsageError, match=r"shape \(3,\) for 2 samples"):
        noise_augment(x, torch.tensor([1, 2, 3]), x, ours)
