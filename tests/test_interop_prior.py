"""diffusers' PriorTransformer and our prior: same weights, same answers, and not a bit changed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from diffusers.schedulers import scheduling_unclip
from torch import Tensor
from torch.nn import functional as F

from prior import DiffusionPriorStage, Prior, PriorConfig, PriorStage
from prior.sampling import KIND
from unclip.bundle import save_part
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.diffusion import SeededNoise
from unclip.errors import UnclipError
from unclip.interop.prior import prior_from_diffusers, prior_to_diffusers

DIM, LENGTH, COUNT = 24, 9, 3
SHAPE = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "embedding_dim": DIM,
    "num_embeddings": LENGTH,
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def theirs() -> PriorTransformer:
    torch.manual_seed(0)
    network = PriorTransformer(**SHAPE).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        network.clip_std.abs_().add_(0.2)
    return network


def features(count: int = COUNT, seed: int = 0) -> TextFeatures:
    """Raw embeddings with their lengths; captions of 3, 4, 5, … tokens."""
    mask = torch.arange(LENGTH) < torch.arange(3, 3 + count)[:, None]
    raw = 5 * rand(count, DIM, seed=seed + 1)
    tokens = rand(count, LENGTH, DIM, seed=seed) * mask[..., None]
    return TextFeatures(tokens, mask, F.normalize(raw, dim=1), raw.norm(dim=1))


def empty_text() -> TextFeatures:
    found = features(1, seed=50)
    return TextFeatures(found.tokens, torch.arange(LENGTH)[None] < 2, found.embedding, found.norm)


def ours_of(theirs: PriorTransformer, **sampling: Any) -> DiffusionPriorStage:
    config, state = prior_from_diffusers(theirs.state_dict(), dict(theirs.config), empty_text(), **sampling)
    network = Prior(config)
    network.load_state_dict(state)
    return DiffusionPriorStage(network.requires_grad_(False), config)


def answer(theirs: PriorTransformer, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
    assert text.norm is not None
    return theirs(x, t, text.embedding * text.norm[:, None], text.tokens, text.mask).predicted_image_embedding


@torch.no_grad()
def test_same_weights_give_the_same_answer(theirs: PriorTransformer) -> None:
    stage, text = ours_of(theirs), features()
    x, t = rand(COUNT, DIM, seed=7), torch.tensor([0, 500, 999])
    expected = answer(theirs, x, t, text)
    assert text.norm is not None
    given = {"text_embedding": text.embedding * text.norm[:, None], "text_tokens": text.tokens, "text_mask": text.mask}
    found = stage.network(x, t, **given, drop_text=torch.zeros(COUNT, dtype=torch.bool))
    assert float(expected.abs().mean()) > 0.1
    assert float((found - expected).abs().max()) <= 2e-5
    # The stored features of the empty text take the place of dropped captions, mask included.
    null = empty_text()
    nulls = TextFeatures(null.tokens.expand(3, -1, -1), null.mask.expand(3, -1), null.embedding.expand(3, -1), None)
    assert null.norm is not None
    nulls = TextFeatures(nulls.tokens, nulls.mask, nulls.embedding, null.norm.expand(3))
    dropped = stage.network(x, t, **given, drop_text=torch.ones(COUNT, dtype=torch.bool))
    assert float((dropped - answer(theirs, x, t, nulls)).abs().max()) <= 2e-5
    assert not torch.allclose(dropped, found, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("steps, clip_range", [(25, 10.0), (4, 1.5), (1, 5.0)])
def test_guided_sampling_is_their_pipelines(
    theirs: PriorTransformer, steps: int, clip_range: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of diffusers' UnCLIPPipeline over its scheduler: guidance on x_0, clamping, the small fixed variance."""
    seeds, text, null = [3, 4, 5], features(), empty_text()
    scheduler = UnCLIPScheduler(1000, "fixed_small_log", prediction_type="sample", clip_sample_range=clip_range)
    # Their tables are float32, in which 1 - ᾱ_0 has three digits left; the same formulas are compared in float64.
    betas = torch.from_numpy(ours_of(theirs).process.betas)
    assert torch.allclose(scheduler.betas, betas.float(), atol=1e-7)
    scheduler.betas, scheduler.alphas_cumprod = betas, torch.cumprod(1 - betas, 0)
    scheduler.alphas = 1 - betas
    noise = SeededNoise([seed * 1_000_003 for seed in seeds])
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *_args, **_kwargs: noise(x))
    x = noise.draw((DIM,))
    kept = [999] if steps == 1 else [round(i * 999 / (steps - 1)) for i in range(steps)][::-1]
    for index, t in enumerate(kept):
        time = torch.full((COUNT,), t)
        conditional = answer(theirs, x, time, text)
        assert null.norm is not None
        unconditional = answer(
            theirs,
            x,
            time,
            TextFeatures(null.tokens.expand(3, -1, -1), null.mask.expand(3, -1), null.embedding, null.norm.expand(3)),
        )
        guided = unconditional + 4.0 * (conditional - unconditional)
        if steps == 1:  # their scheduler cannot leap from 999 to the end, where the answer is x̂_0 itself
            x = guided.clamp(-clip_range, clip_range)
        else:
            before = kept[index + 1] if t else None
            x = scheduler.step(guided, t, x, prev_timestep=before).prev_sample
    expected = theirs.post_process_latents(x)
    found = ours_of(theirs, steps=steps, clip_range=clip_range).sample(text, seeds)
    assert float((found - expected).abs().max()) <= 1e-4
    assert float(expected.norm(dim=1).min()) > 0.1


def test_there_and_back_changes_no_bit(theirs: PriorTransformer, tmp_path: Path) -> None:
    config, state = prior_from_diffusers(theirs.state_dict(), dict(theirs.config), empty_text())
    save_part(tmp_path / "prior", KIND, config, state)
    stage = PriorStage.load(tmp_path / "prior")
    body, back = prior_to_diffusers(stage.config, stage.network.state_dict())  # type: ignore[arg-type]
    before = theirs.state_dict()
    assert set(back) == set(before)
    for name, tensor in before.items():
        assert back[name].shape == tensor.shape and torch.equal(back[name], tensor), name
    assert {name: body[name] for name in SHAPE} == SHAPE and body["_class_name"] == "PriorTransformer"
    again = PriorTransformer.from_config(body)
    again.load_state_dict(back)


def test_guidance_without_the_empty_text_is_refused(theirs: PriorTransformer) -> None:
    config, state = prior_from_diffusers(theirs.state_dict(), dict(theirs.config))
    network = Prior(config)
    network.load_state_dict(state)
    stage = DiffusionPriorStage(network, config)
    with pytest.raises(UnclipError, match=r"features of the empty text.*take guidance 1"):
        stage.sample(features(), [0, 1, 2], steps=2)
    assert stage.sample(features(), [0, 1, 2], steps=2, guidance=1.0).shape == (COUNT, DIM)
    network.store_null(empty_text(), "raw")
    stage.sample(features(), [0, 1, 2], steps=2)


def test_raw_features_are_asked_for(theirs: PriorTransformer) -> None:
    text = features()
    with pytest.raises(UnclipError, match="raw length"):
        ours_of(theirs).sample(TextFeatures(text.tokens, text.mask, text.embedding), [0, 1, 2], steps=2)


def test_karlos_parameters_to_the_last_one() -> None:
    """diffusers counts the 2 × 768 statistics as parameters, Karlo's figure does not; here they are buffers."""
    with torch.device("meta"):
        whole = PriorTransformer()
        config, _ = prior_from_diffusers(whole.state_dict(), dict(whole.config))
        ours = Prior(config)
    assert sum(p.numel() for p in whole.parameters()) == 1_022_028_544 + 2 * 768
    assert sum(p.numel() for p in ours.parameters()) == 1_022_028_544


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"added_emb_type": None}, "added_emb_type None; only 'prd'"),
        ({"embedding_proj_norm_type": "layer"}, "embedding_proj_norm_type 'layer'; only None"),
        ({"clip_embed_dim": 7}, "clip_embed_dim 7; only 24"),
        ({"num_layers": 2}, "no PriorTransformer of 2 blocks: unknown transformer_blocks.2"),
        ({"num_layers": 4}, "missing transformer_blocks.3"),
        ({"num_embeddings": 10}, r"positional_embedding is \(1, 13, 32\), expected \(14, 32\)"),
    ],
)
def test_other_shapes_are_refused(theirs: PriorTransformer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnclipError, match=message):
        prior_from_diffusers(theirs.state_dict(), {**theirs.config, **changes})


def test_a_prior_of_another_shape_cannot_go_there() -> None:
    config = parse_config(PriorConfig, {"width": 16, "depth": 1, "heads": 2})
    with pytest.raises(UnclipError, match=r"attention_bias is False; norm_bias is False.*karlo\.yaml"):
        prior_to_diffusers(config, {})
