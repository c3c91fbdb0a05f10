"""The diffusion prior: sequence and masks, dropped captions, normalisation, sampling, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_prior import DIM, LENGTH, TOKEN, config, inputs, network, rand, sequence_of, text
from torch import Tensor
from torch.nn import functional as F

from prior import DiffusionPriorStage, PriorStage, prior_loss
from prior.network import GROUPS
from prior.sampling import KIND, best_of
from unclip.bundle import save_part
from unclip.clip import TextFeatures
from unclip.diffusion import GaussianDiffusion
from unclip.errors import UnclipError, UsageError

# ---- sequence and masks ------------------------------------------------------------------------------------


def test_sequence_is_in_the_papers_order() -> None:
    """Text tokens, text embedding, timestep, noised image embedding, query (unCLIP §2.2)."""
    prior, given = network(), inputs()
    base, mask = sequence_of(prior, given)
    assert base.shape == (2, LENGTH + 4, 32)
    assert torch.equal(mask, torch.cat([given["text_mask"], torch.ones(2, 4, dtype=torch.bool)], dim=1))
    changes = {
        "text_tokens": (rand(2, LENGTH, TOKEN, seed=8), list(range(LENGTH))),
        "text_embedding": (rand(2, DIM, seed=8), [LENGTH]),
        "t": (torch.tensor([7, 8]), [LENGTH + 1]),
        "x_t": (rand(2, DIM, seed=8), [LENGTH + 2]),
    }
    for name, (value, places) in changes.items():
        other, _ = sequence_of(prior, {**given, name: value})
        moved = (other != base).any(dim=2).all(dim=0).nonzero().flatten().tolist()
        assert moved == places, name
    query = prior.query + prior.positions[LENGTH + 3]
    assert torch.allclose(base[:, -1], query.expand(2, -1))


def test_the_answer_is_read_at_the_query_which_sees_everything() -> None:
    prior, given = network(), inputs()
    given["text_mask"] = torch.ones_like(given["text_mask"])
    base = prior(**given)
    assert base.shape == (2, DIM) and base.dtype == torch.float32
    for token in range(LENGTH):
        tokens = given["text_tokens"].clone()
        tokens[:, token] += 1
        assert not torch.allclose(prior(**{**given, "text_tokens": tokens}), base, atol=1e-5), token
    for name in ("text_embedding", "x_t", "t"):
        assert not torch.allclose(prior(**{**given, name: given[name] + 1}), base, atol=1e-5), name
    hidden: list[Tensor] = []
    prior.transformer.register_forward_hook(lambda _module, _args, output: hidden.append(output))
    output = prior(**given)
    assert torch.allclose(output, prior.out(hidden[0][:, -1]))


def test_attention_is_causal() -> None:
    prior, given = network(), inputs()
    given["text_mask"] = torch.ones_like(given["text_mask"])
    hidden: list[Tensor] = []
    prior.transformer.register_forward_hook(lambda _module, _args, output: hidden.append(output))
    tokens = given["text_tokens"].clone()
    tokens[:, 3] += 1
    prior(**given)
    prior(**{**given, "text_tokens": tokens})
    assert torch.allclose(hidden[0][:, :3], hidden[1][:, :3], atol=1e-6)
    later = (hidden[0] - hidden[1]).abs().amax(dim=2)[:, 3:]
    assert bool((later > 1e-4).all())


def test_padding_has_no_effect() -> None:
    prior, given = network(), inputs(5)
    base = prior(**given)
    padding = ~given["text_mask"][..., None] & torch.ones(5, LENGTH, TOKEN, dtype=torch.bool)
    assert bool(padding.any())
    tokens = torch.where(padding, 50 * rand(5, LENGTH, TOKEN, seed=9), given["text_tokens"])
    assert torch.allclose(prior(**{**given, "text_tokens": tokens}), base, atol=1e-6)


def test_dropped_captions_leave_no_trace_and_learn_their_nulls() -> None:
    prior, given = network(), inputs(3)
    given["drop_text"] = torch.tensor([False, True, True])
    other = text(3, seed=20)
    changed = {
        "text_embedding": other.embedding, "text_tokens": other.tokens, "text_mask": other.mask.flip(1)
    }  # fmt: skip
    before, after = prior(**given), prior(**{**given, **changed})
    assert torch.equal(before[1:], after[1:]) and not torch.allclose(before[0], after[0], atol=1e-4)
    before[1:].pow(2).sum().backward()
    for null in (prior.null_tokens, prior.null_text):
        assert null.grad is not None and float(null.grad.abs().max()) > 0


# ---- objective ---------------------------------------------------------------------------------------------


class Spy:
    """Counts the dropped captions; answers with zeros."""

    def __init__(self) -> None:
        self.dropped: list[Tensor] = []
        self.seen: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, *, drop_text: Tensor, **_features: Tensor) -> Tensor:
        self.dropped.append(drop_text)
        self.seen.append(x_t)
        return torch.zeros_like(x_t)


def test_captions_are_dropped_for_one_sample_in_ten() -> None:
    prior, spy, count = network(normalisation="scale"), Spy(), 100_000
    process, generator = GaussianDiffusion(prior.config.diffusion), torch.Generator().manual_seed(0)
    truth = F.normalize(rand(count, DIM, seed=5), dim=1)
    losses = prior_loss(spy, prior, process, prior.config, truth, text(count), generator)
    dropped = int(spy.dropped[0].sum())
    assert 9620 <= dropped <= 10_380  # 10,000 expected, ±4 standard deviations
    assert set(losses) == {"mse", "loss", "cosine", "quartile"}
    assert all(v.shape == (count,) for v in losses.values())
    # Unit vectors times sqrt(dim) have elements of mean square 1: the loss of answering zero.
    assert torch.allclose(losses["loss"], torch.ones(count), atol=1e-5)
    for rate, expected in ((0.0, 0), (1.0, 500)):
        prior_loss(spy, prior, process, config(drop_text=rate), truth[:500], text(500), generator)
        assert int(spy.dropped[-1].sum()) == expected


def test_loss_is_the_error_of_the_unnoised_embedding() -> None:
    """The truth as answer costs nothing, in the stored statistics' space, and its cosine is 1."""
    prior = network()
    prior.mean.copy_(rand(DIM, seed=1))  # type: ignore[operator]
    prior.std.copy_(rand(DIM, seed=2).abs() + 0.1)  # type: ignore[operator]
    truth = F.normalize(rand(8, DIM, seed=5), dim=1)
    normalised = (truth - rand(DIM, seed=1)) / (rand(DIM, seed=2).abs() + 0.1)
    process, generator = GaussianDiffusion(prior.config.diffusion), torch.Generator().manual_seed(0)

    def answer(x_t: Tensor, t: Tensor, **_features: Tensor) -> Tensor:
        return normalised

    losses = prior_loss(answer, prior, process, prior.config, truth, text(8), generator)
    assert torch.allclose(losses["loss"], torch.zeros(8), atol=1e-8)
    assert torch.allclose(losses["cosine"], torch.ones(8), atol=1e-5)


# ---- normalisation -----------------------------------------------------------------------------------------


def test_statistics_travel_with_the_weights_and_are_used(tmp_path: Path) -> None:
    prior = network()
    mean, std = rand(DIM, seed=1), rand(DIM, seed=2).abs() + 0.1
    prior.mean.copy_(mean)  # type: ignore[operator]
    prior.std.copy_(std)  # type: ignore[operator]
    x = rand(3, DIM, seed=4)
    assert torch.allclose(prior.normalise(x), (x - mean) / std)
    assert torch.allclose(prior.denormalise(prior.normalise(x)), x, atol=1e-6)
    save_part(tmp_path / "part", KIND, prior.config, prior.state_dict())
    stage = PriorStage.load(tmp_path / "part")
    assert stage.config == prior.config
    assert torch.equal(stage.network.mean, mean) and torch.equal(stage.network.std, std)
    features = text(2)
    expected = DiffusionPriorStage(prior, prior.config).sample(features, [1, 2])
    assert torch.equal(stage.sample(features, [1, 2]), expected)
    stage.network.mean.zero_()  # type: ignore[operator]
    assert not torch.allclose(stage.sample(features, [1, 2]), expected, atol=1e-3)


def test_scale_brings_unit_vectors_to_the_noise() -> None:
    for scale, factor in ((None, DIM**0.5), (17.2, 17.2)):
        prior = network(normalisation="scale", scale=scale)
        assert torch.allclose(prior.normalise(torch.ones(1, DIM)), torch.tensor(factor))


# ---- sampling ----------------------------------------------------------------------------------------------


def test_best_of_keeps_the_larger_dot_product() -> None:
    embedding = torch.eye(3)[:2]
    candidates = torch.tensor([[[0.2, 1.0, 0.0], [0.6, 0.0, 0.8]], [[0.0, 0.9, 0.1], [1.0, 0.3, 0.0]]])
    assert torch.equal(best_of(candidates, embedding), torch.stack([candidates[0, 1], candidates[1, 0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_best_of_is_not_decided_by_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(200, 64), dim=1)
    candidates = torch.nn.functional.normalize(embedding[:, None] + 0.003 * torch.randn(200, 2, 64), dim=2)
    exact = best_of(candidates.double(), embedding.double()).float()
    with torch.autocast("cpu", dtype):
        assert torch.equal(best_of(candidates, embedding), exact)


def test_two_candidates_are_drawn_and_the_nearer_kept() -> None:
    stage, features = DiffusionPriorStage(network(), config()), text(6)
    seeds = list(range(6))
    one = stage.sample(features, seeds, candidates=1)
    two = stage.sample(features, seeds, candidates=2)
    assert torch.equal(two, stage.sample(features, seeds))  # the default
    scores = [(drawn * features.embedding).sum(1) for drawn in (one, two)]
    changed = (one - two).abs().amax(1) > 1e-4
    assert bool((scores[1] >= scores[0] - 1e-5).all()) and 0 < int(changed.sum()) < 6
    assert torch.allclose(two.norm(dim=1), torch.ones(6), atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_seed_gives_the_same_embedding_in_any_batch(sampler: str) -> None:
    stage, features = DiffusionPriorStage(network(), config(sampler=sampler)), text(4)
    together = stage.sample(features, [5, 6, 7, 5], guidance=2.0)
    for index, seed in enumerate([5, 6, 7, 5]):
        alone = stage.sample(features[index : index + 1], [seed], guidance=2.0)
        assert torch.allclose(alone[0], together[index], atol=1e-5)
    assert not torch.allclose(together[:1], stage.sample(features[:1], [8], guidance=2.0), atol=1e-3)


def test_guidance_moves_away_from_the_captionless_answer() -> None:
    stage, features = DiffusionPriorStage(network(), config(candidates=1)), text(3)
    plain, guided = (stage.sample(features, [1, 2, 3], guidance=scale) for scale in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=1e-3)
    # At scale 0 only the choice among candidates knows the caption.
    silent = stage.sample(features, [1, 2, 3], guidance=0.0)
    other = stage.sample(text(3, seed=30), [1, 2, 3], guidance=0.0)
    assert torch.allclose(silent, other, atol=1e-6)
    assert not torch.allclose(plain, silent, atol=1e-3)


@pytest.mark.parametrize("options, message", [({"steps": 0}, "0 sampling steps"), ({"candidates": 0}, "candidates")])
def test_zero_is_refused_and_not_read_as_the_default(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DiffusionPriorStage(network(), config()).sample(text(1), [0], **options)


def test_features_of_another_clip_are_refused() -> None:
    stage, features = DiffusionPriorStage(network(), config()), text(2)
    other = TextFeatures(rand(2, LENGTH, TOKEN + 1), features.mask, features.embedding)
    with pytest.raises(UnclipError, match=r"\(2, 6, 11\).*\(2, 6, 10\)"):
        stage.sample(other, [0, 1])
    with pytest.raises(UnclipError, match=r"\(2, 12\) for 3 seeds.*\(3, 12\)"):
        stage.sample(features, [0, 1, 2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "heads 3 does not divide width 32"),
        ({"diffusion": {"variance": "learned_range"}}, "fixed_small or fixed_large"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_bad_configuration_is_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


# ---- learning ----------------------------------------------------------------------------------------------


MID = {"loss_weighting": "min_snr", "timestep_bias": 2.0}  # where a caption matters to ε and v


@pytest.mark.parametrize(
    "changes, steps, guidance",
    [
        ({}, 90, 1.0),
        ({"diffusion": {"prediction": "epsilon", **MID}, "clip_range": 3.0}, 200, 3.0),
        ({"diffusion": {"prediction": "v", **MID}, "clip_range": 3.0}, 200, 1.0),
        ({"text_encoder": {"width": 32, "depth": 1, "heads": 2}}, 90, 1.0),
        ({"null_text": "clip", "attention_bias": True, "norm_bias": True}, 90, 1.0),
    ],
    ids=["x_start", "epsilon", "v", "text_encoder", "karlo"],
)
def test_a_few_pairs_are_learned(changes: dict[str, Any], steps: int, guidance: float) -> None:
    """Sampled embeddings of six memorised captions have a cosine above 0.9 with the truth."""
    prior = network(width=64, depth=1, **changes).train()
    features, truth = text(6), F.normalize(rand(6, DIM, seed=40), dim=1)
    prior.mean.copy_(truth.mean(0))  # type: ignore[operator]
    prior.std.copy_(truth.std(0))  # type: ignore[operator]
    if prior.config.null_text == "clip":
        prior.store_null(text(1, seed=60), "unit")
    process, generator = GaussianDiffusion(prior.config.diffusion), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, fused=True)
    batch = torch.arange(6).repeat(6)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        losses = prior_loss(prior, prior, process, prior.config, truth[batch], features[batch], generator)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
    drawn = DiffusionPriorStage(prior, prior.config).sample(features, range(6), steps=25, guidance=guidance)
    cosine = F.cosine_similarity(drawn, truth)
    assert float(cosine.min()) > 0.9, cosine


# ---- padding is not computed -------------------------------------------------------------------------------

LONG = 40


def long_inputs(count: int) -> dict[str, Tensor]:
    """Captions of 3, 4, 5 … of 40 tokens, every fifth one dropped."""
    mask = torch.arange(LONG) < torch.arange(3, 3 + count)[:, None]
    drop = torch.arange(count) % 5 == 4
    return {**inputs(count), "text_tokens": rand(count, LONG, TOKEN), "text_mask": mask, "drop_text": drop}


@pytest.mark.parametrize(
    "options", [{}, {"null_text": "clip"}, {"text_encoder": {"width": 16, "depth": 1, "heads": 2}}]
)
def test_training_leaves_padding_out_and_changes_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, given = network(text_length=LONG, **options), long_inputs(12)
    if options.get("null_text") == "clip":
        prior.clip_null_tokens.copy_(rand(LONG, TOKEN, seed=5))
        prior.clip_null_mask[:2] = True
    seen: list[int] = []
    prior.transformer.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:2].numel()))

    def answer() -> tuple[Tensor, dict[str, Tensor], int]:
        seen.clear()
        prior.zero_grad()
        output = prior(**given)
        output.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None}
        return output.detach(), gradients, sum(seen)

    prior.train()
    trained, gradients, tokens = answer()
    prior.eval()
    evaluated, _, trimmed = answer()
    monkeypatch.setattr(prior, "_filled", lambda *_: None)
    whole, expected, every = answer()
    assert every == 12 * (LONG + 4)
    assert tokens < 0.7 * every and tokens < trimmed + 1
    assert torch.allclose(trained, whole, atol=1e-5) and torch.allclose(evaluated, whole, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-4), name


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_transformer_runs_equally_often_whatever_the_batch(count: int, dropped: bool) -> None:
    """Otherwise processes that share out the weights (ZeRO 3) would wait for each other for ever."""
    prior, given = network(text_length=LONG).train(), long_inputs(count)
    calls: list[None] = []
    prior.transformer.register_forward_hook(lambda *_: calls.append(None))
    given["drop_text"][:] = dropped
    output = prior(**given)
    output.sum().backward()
    assert output.shape == (count, DIM) and len(calls) == GROUPS + 2  # the null: read, continued
    assert all(p.grad is not None for p in prior.parameters())
