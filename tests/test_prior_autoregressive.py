"""The autoregressive prior: sequence, cache, drawing of codes, sampling, objective, folder, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_prior import DIM, LENGTH, TOKEN, rand, text
from torch import Tensor
from torch.nn import functional as F

from prior import (
    AutoregressivePrior,
    AutoregressivePriorConfig,
    AutoregressivePriorStage,
    PriorStage,
    autoregressive_loss,
    build_stage,
    read_prior_config,
)
from prior.codes import measure_codes
from prior.sampling import KIND, draw_codes
from prior.statistics import settle, store_codes
from unclip.bundle import load_weights, save_part, write_json
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.errors import UnclipError, UsageError

CODES = 7
SMALL: dict[str, Any] = {
    "kind": "autoregressive",
    "embedding_dim": DIM,
    "token_dim": TOKEN,
    "text_length": LENGTH,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "components": CODES,
    "buckets": 32,
    "dot_buckets": 8,
}


def config(**changes: Any) -> AutoregressivePriorConfig:
    return parse_config(AutoregressivePriorConfig, {**SMALL, **changes})


def embeddings(count: int = 400, seed: int = 5) -> Tensor:
    return F.normalize(rand(count, DIM, seed=seed) * torch.linspace(2, 0.2, DIM), dim=1)


def network(**changes: Any) -> AutoregressivePrior:
    """Random weights, shaken so that every condition shows, with statistics of random embeddings."""
    torch.manual_seed(0)
    chosen = config(**changes)
    prior = AutoregressivePrior(chosen)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    store_codes(prior, measure_codes(embeddings(), chosen.components, 0.01), 0.3 * rand(400, seed=6))
    return prior.eval()


def stage(**changes: Any) -> AutoregressivePriorStage:
    prior = network(**changes)
    return AutoregressivePriorStage(prior, prior.config)


def inputs(count: int = 3) -> dict[str, Tensor]:
    features = text(count)
    return {
        "dot": torch.arange(count) % 8,
        "text_embedding": features.embedding,
        "text_tokens": features.tokens,
        "text_mask": features.mask,
        "drop_text": torch.zeros(count, dtype=torch.bool),
    }


def some_codes(count: int = 3, seed: int = 9) -> Tensor:
    return torch.randint(0, 32, (count, CODES), generator=torch.Generator().manual_seed(seed))


# ---- sequence ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sequence_is_caption_dot_product_and_codes() -> None:
    prior, given, codes = network(), inputs(), some_codes()
    caught: list[Tensor] = []
    prior.transformer.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    prior(codes, **given)
    assert caught[0].shape == (3, LENGTH + 2 + CODES - 1, 32)  # the last code predicts nothing
    other = some_codes(seed=10)
    changes = {
        "text_tokens": (rand(3, LENGTH, TOKEN, seed=8), list(range(LENGTH))),
        "text_embedding": (rand(3, DIM, seed=8), [LENGTH]),
        "dot": ((given["dot"] + 1) % 8, [LENGTH + 1]),
    }
    for name, (value, places) in changes.items():
        prior(codes, **{**given, name: value})
        moved = (caught[-1] != caught[0]).any(2).all(0).nonzero().flatten().tolist()
        assert moved == places, name
    for place in range(CODES):
        changed = codes.clone()
        changed[:, place] = (other[:, place] + (other[:, place] == codes[:, place])) % 32
        prior(changed, **given)
        moved = (caught[-1] != caught[0]).any(2).all(0).nonzero().flatten().tolist()
        assert moved == ([LENGTH + 2 + place] if place < CODES - 1 else [])


@torch.no_grad()
def test_a_code_is_predicted_from_those_before_it_alone() -> None:
    prior, given, codes = network(), inputs(), some_codes()
    base = prior(codes, **given)
    assert base.shape == (3, CODES, 32) and base.dtype == torch.float32
    for place in range(CODES):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 1) % 32
        moved = (prior(changed, **given) - base).abs().amax(dim=(0, 2)) > 1e-4
        assert moved.tolist() == [k > place for k in range(CODES)]
    for name in ("text_embedding", "dot"):
        value = (given["dot"] + 1) % 8 if name == "dot" else given[name] + 1
        assert bool(((prior(codes, **{**given, name: value}) - base).abs().amax((0, 2)) > 1e-4).all()), name


@torch.no_grad()
def test_padding_has_no_effect_and_a_dropped_caption_leaves_no_trace() -> None:
    prior, given, codes = network(), inputs(), some_codes()
    padding = ~given["text_mask"][..., None]
    noisy = torch.where(padding, 50 * rand(3, LENGTH, TOKEN, seed=9), given["text_tokens"])
    base = prior(codes, **given)
    assert torch.allclose(prior(codes, **{**given, "text_tokens": noisy}), base, atol=1e-5)
    given["drop_text"] = torch.tensor([False, True, True])
    other = text(3, seed=20)
    changed = {
        "dot": (given["dot"] + 3) % 8,
        "text_embedding": other.embedding,
        "text_tokens": other.tokens,
        "text_mask": other.mask.flip(1),
    }
    before, after = prior(codes, **given), prior(codes, **{**given, **changed})
    assert torch.equal(before[1:], after[1:]) and not torch.allclose(before[0], after[0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "norm_bias": True, "components": 1}])
def test_cached_keys_and_values_change_nothing(changes: dict[str, Any]) -> None:
    prior, given = network(**changes), inputs()
    count = prior.config.components
    assert count is not None
    codes = some_codes()[:, :count]
    whole = prior(codes, **given)
    logits, generation = prior.start(**given)
    steps = [logits, *(prior.advance(generation, codes[:, k]) for k in range(count - 1))]
    assert torch.allclose(torch.stack(steps, 1), whole, atol=1e-5)
    assert generation.count == count - 1


# ---- drawing codes -----------------------------------------------------------------------------------------


def test_codes_are_drawn_by_their_probability() -> None:
    probability = torch.tensor([0.1, 0.0, 0.4, 0.3, 0.2])
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = probability.log().expand(100_000, -1)

    def shares(**how: float) -> Tensor:
        return torch.bincount(draw_codes(logits, uniform, **how), minlength=5) / 100_000

    assert torch.allclose(shares(), probability, atol=0.006) and float(shares()[1]) == 0
    flat = probability.sqrt() / probability.sqrt().sum()
    assert torch.allclose(shares(temperature=2.0), flat, atol=0.006)
    # Nucleus: 0.4 + 0.3 hold 0.7 of it; for 0.71 the next one is needed.
    assert torch.allclose(shares(top_p=0.7), torch.tensor([0, 0, 0.4, 0.3, 0]) / 0.7, atol=0.006)
    assert torch.allclose(shares(top_p=0.71), torch.tensor([0, 0, 0.4, 0.3, 0.2]) / 0.9, atol=0.006)
    assert float(shares(top_p=0.01)[2]) == float(shares(temperature=0.0)[2]) == 1
    edge = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert draw_codes(torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(2, -1), edge).tolist() == [1, 1]


# ---- sampling ----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_embedding_in_any_batch() -> None:
    prior, features = stage(candidates=2), text(4)
    together = prior.sample(features, [5, 6, 7, 5], guidance=2.0)
    assert together.shape == (4, DIM) and torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-5)
    for index, seed in enumerate([5, 6, 7, 5]):
        alone = prior.sample(features[index : index + 1], [seed], guidance=2.0)
        assert torch.allclose(alone[0], together[index], atol=1e-4)
    assert not torch.allclose(together[:1], prior.sample(features[:1], [8], guidance=2.0), atol=1e-2)


def test_what_is_drawn_is_what_the_uncached_network_would_draw() -> None:
    """Guidance mixes logits as l(∅) + s · (l(y) − l(∅)), at every code, given the codes before it."""
    prior, features, scale = stage(), text(3), 3.0
    heard: list[tuple[int, int, Tensor]] = []
    drawn = prior.sample(features, [1, 2, 3], guidance=scale, callback=lambda *said: heard.append(said))
    uniform = torch.stack(
        [
            torch.rand(CODES + 1, generator=torch.Generator().manual_seed(seed * 1_000_003), dtype=torch.float64)
            for seed in (1, 2, 3)
        ]
    )
    given = {**inputs(), "dot": prior.network.dots.draw(uniform[:, 0], 0.5)}
    assert int(given["dot"].min()) >= 4  # the upper half of 8
    codes = torch.zeros(3, CODES, dtype=torch.long)
    with torch.no_grad():
        for k in range(CODES):
            conditional = prior.network(codes, **given)[:, k]
            unconditional = prior.network(codes, **{**given, "drop_text": torch.ones(3, dtype=torch.bool)})[:, k]
            codes[:, k] = draw_codes(unconditional + scale * (conditional - unconditional), uniform[:, k + 1])
        decoded = prior.network.codes.decode(codes)
    assert torch.allclose(drawn, F.normalize(decoded, dim=1), atol=1e-4)
    assert [said[:2] for said in heard] == [(k + 1, CODES) for k in range(CODES)]
    assert torch.allclose(heard[-1][2], decoded, atol=1e-4)


def test_the_best_of_several_candidates_is_kept() -> None:
    prior, features = stage(), text(6)
    seeds = list(range(6))
    one, three = (prior.sample(features, seeds, candidates=count) for count in (1, 3))
    scores = [(drawn * features.embedding).sum(1) for drawn in (one, three)]
    assert bool((scores[1] >= scores[0] - 1e-5).all()) and bool((scores[1] > scores[0] + 1e-3).any())


def test_temperature_percentile_and_guidance_act() -> None:
    prior, features = stage(), text(3)
    cold = [prior.sample(features, seeds, temperature=0.0, dot_percentile=0.99) for seeds in ([1, 2, 3], [4, 5, 6])]
    assert torch.equal(*cold)  # only the dot product was left to chance, and just its highest token above 0.99
    assert not torch.allclose(cold[0], prior.sample(features, [1, 2, 3], temperature=1.0), atol=1e-2)
    plain, guided = (prior.sample(features, [1, 2, 3], guidance=scale) for scale in (1.0, 5.0))
    assert not torch.allclose(plain, guided, atol=1e-2)
    silent = [prior.sample(other, [1, 2, 3], guidance=0.0) for other in (features, text(3, seed=30))]
    assert torch.allclose(*silent, atol=1e-5)  # at scale 0 the caption is not heard


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 20}, "steps 20 is asked of the prior, which is autoregressive.*each of 7 components"),
        ({"sampler": "ddim"}, "sampler ddim is asked of the prior"),
        ({"candidates": 0}, "candidates is 0"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a number of 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"dot_percentile": 1.0}, "dot_percentile is 1.0"),
    ],
)
def test_options_that_mean_nothing_here_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stage().sample(text(1), [0], **options)


# ---- objective ---------------------------------------------------------------------------------------------


class Spy:
    """Answers with fixed logits and remembers what it was given."""

    def __init__(self, logits: Tensor | None = None) -> None:
        self.logits, self.given = logits, []  # type: ignore[var-annotated]

    def __call__(self, codes: Tensor, **given: Tensor) -> Tensor:
        self.given.append({"codes": codes, **given})
        return torch.zeros(*codes.shape, 32) if self.logits is None else self.logits


def test_loss_is_the_cross_entropy_of_the_codes() -> None:
    prior, truth = network(), embeddings(50)
    generator = torch.Generator().manual_seed(0)
    blind = autoregressive_loss(Spy(), prior, prior.config, truth, text(50), generator)
    assert set(blind) == {"loss", "accuracy", "cosine"} and all(value.shape == (50,) for value in blind.values())
    assert torch.allclose(blind["loss"], torch.full((50,), math.log(32)), atol=1e-5)
    codes = prior.codes.encode(truth)
    known = autoregressive_loss(Spy(50 * F.one_hot(codes, 32).float()), prior, prior.config, truth, text(50), generator)
    assert torch.allclose(known["loss"], torch.zeros(50), atol=1e-6)
    assert torch.equal(known["accuracy"], torch.ones(50))
    assert torch.allclose(known["cosine"], F.cosine_similarity(prior.codes.decode(codes), truth), atol=1e-6)
    assert float(known["cosine"].mean()) > 0.9


def test_the_network_is_told_the_true_dot_product() -> None:
    prior, truth, features, spy = network(), embeddings(20), text(20), Spy()
    autoregressive_loss(spy, prior, prior.config, truth, features, torch.Generator().manual_seed(0))
    expected = prior.dots.quantise((truth * features.embedding).sum(1))
    assert torch.equal(spy.given[0]["dot"], expected) and len(set(expected.tolist())) > 3


# ---- folder and configuration ------------------------------------------------------------------------------


def test_the_folder_is_whole_and_loads_as_its_own_kind(tmp_path: Path) -> None:
    before = stage()
    save_part(tmp_path / "part", KIND, before.config, before.network.state_dict())
    after = PriorStage.load(tmp_path / "part")
    assert isinstance(after, AutoregressivePriorStage) and after.config == before.config
    assert {"codes.components", "codes.low", "dots.edges", "dots.shares"} <= set(load_weights(tmp_path / "part"))
    features = text(2)
    assert torch.equal(after.sample(features, [1, 2]), before.sample(features, [1, 2]))


def test_half_precision_leaves_the_statistics_whole(tmp_path: Path) -> None:
    before = stage(null_text="clip")
    before.network.store_null(text(1, seed=60), "unit")
    save_part(tmp_path / "part", KIND, before.config, before.network.state_dict())
    after = PriorStage.load(tmp_path / "part", dtype=torch.bfloat16)
    assert after.network.out.weight.dtype == torch.bfloat16
    assert torch.equal(after.network.codes.components, before.network.codes.components)
    drawn = after.sample(text(3), [1, 2, 3], guidance=2.0)
    assert drawn.dtype == torch.float32 and torch.allclose(drawn.norm(dim=1), torch.ones(3), atol=1e-5)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    write_json(tmp_path / "part" / "config.json", {"format": 1, "kind": "prior", "config": {"kind": "flow"}})
    with pytest.raises(UnclipError, match="prior of kind 'flow'; this version knows diffusion, autoregressive"):
        read_prior_config(tmp_path / "part")


def test_components_are_settled_by_the_data() -> None:
    unsettled = config(components=None, largest_error=0.05)
    with pytest.raises(UsageError, match="components is not settled"):
        build_stage(unsettled)
    settled, found = settle(unsettled, embeddings())
    assert found is not None and settled.components == len(found.components) and 1 < len(found.components) < DIM  # type: ignore[union-attr]
    assert build_stage(settled).network.codes.components.shape == (len(found.components), DIM)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"components": 13}, "components 13 is more than the embedding's 12"),
        ({"steps": 20}, "unknown key 'steps'"),
        ({"dot_percentile": 1.0}, "dot_percentile"),
        ({"buckets": 1}, "buckets"),
    ],
)
def test_bad_configuration_is_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


# ---- learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_encoder": {"width": 32, "depth": 1, "heads": 2}, "attention_bias": True},
        {"null_text": "clip", "norm_bias": True},
    ],
    ids=["plain", "text_encoder", "null_clip"],
)
def test_a_few_pairs_are_learned(changes: dict[str, Any]) -> None:
    """Six captions, each with a small cloud of images: what is drawn has a cosine above 0.95 with its cloud's centre.

    Without clouds the dot product alone would tell the six apart, and a drawn one would contradict the caption.
    """
    torch.manual_seed(0)
    chosen = config(**changes, components=5)  # what six points vary in
    truth, features = embeddings(6, seed=40), text(6)
    across = F.normalize(features.embedding - (features.embedding * truth).sum(1, keepdim=True) * truth, dim=1)
    features = TextFeatures(features.tokens, features.mask, 0.6 * truth + 0.8 * across)
    index = torch.arange(6).repeat(80)
    cloud = F.normalize(truth[index] + 0.02 * rand(480, DIM, seed=41), dim=1)
    prior = AutoregressivePrior(chosen)
    store_codes(prior, measure_codes(cloud, 5, 0.01), (cloud * features.embedding[index]).sum(1))
    if chosen.null_text == "clip":
        prior.store_null(text(1, seed=60), "unit")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=6e-3)
    for step in range(80):
        batch = torch.arange(24) + 24 * (step % 20)
        losses = autoregressive_loss(prior, prior, chosen, cloud[batch], features[index[batch]], generator)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
    # The six fill 30 codes; without the nucleus, what little probability lies elsewhere would be drawn now and then.
    drawn = AutoregressivePriorStage(prior, chosen).sample(features, range(6), top_p=0.9)
    cosine = F.cosine_similarity(drawn, truth)
    assert float(cosine.min()) > 0.95, cosine
