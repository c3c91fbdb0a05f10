"""Options of the diffusion prior: its own text encoder, the empty text as null, raw lengths, clamping, old folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_prior import LENGTH, SMALL, inputs, network, sequence_of, text
from torch import Tensor

from prior import DiffusionPriorStage, PriorConfig, PriorStage
from prior.sampling import KIND
from unclip.bundle import save_part, write_json
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.errors import UnclipError


def test_a_text_encoder_of_its_own_reads_the_tokens() -> None:
    """Every real token reaches every other one before the prior (it is bidirectional), padding reaches none."""
    prior, given = network(text_encoder={"width": 16, "depth": 1, "heads": 2}), inputs(3)
    base, _ = sequence_of(prior, given)
    assert base.shape == (3, LENGTH + 4, 32)
    tokens = given["text_tokens"].clone()
    tokens[:, 1] += 1
    other, _ = sequence_of(prior, {**given, "text_tokens": tokens})
    moved = (other != base).any(dim=2)
    assert bool(moved[:, :2].all()) and not bool(moved[:, LENGTH:].any())
    noisy = torch.where(given["text_mask"][..., None], given["text_tokens"], given["text_tokens"] + 50)
    assert torch.allclose(prior(**given), prior(**{**given, "text_tokens": noisy}), atol=1e-5)


def test_the_empty_text_stands_for_no_caption(tmp_path: Path) -> None:
    prior, given = network(null_text="clip"), inputs(3)
    assert not prior.has_null and not any(name.startswith("null") for name, _ in prior.named_parameters())
    with pytest.raises(UnclipError, match=r"features of the empty text.*store_null"):
        DiffusionPriorStage(prior, prior.config).sample(text(1), [0], guidance=2.0)
    empty = text(1, seed=60)
    prior.store_null(empty, "unit")
    as_caption = {
        "text_embedding": empty.embedding.expand(3, -1),
        "text_tokens": empty.tokens.expand(3, -1, -1),
        "text_mask": empty.mask.expand(3, -1),
    }
    dropped = {**given, "drop_text": torch.ones(3, dtype=torch.bool)}
    assert torch.equal(prior(**dropped), prior(**{**given, **as_caption}))
    save_part(tmp_path / "part", KIND, prior.config, prior.state_dict())
    loaded = PriorStage.load(tmp_path / "part")
    expected = DiffusionPriorStage(prior, prior.config).sample(text(2), [1, 2], guidance=3.0)
    assert torch.equal(loaded.sample(text(2), [1, 2], guidance=3.0), expected)


def test_raw_embeddings_keep_their_length() -> None:
    prior = network(embedding_length="raw")
    stage, features = DiffusionPriorStage(prior, prior.config), text(3)
    features = TextFeatures(features.tokens, features.mask, features.embedding, torch.tensor([8.0, 9.0, 10.0]))
    given = {**inputs(3), "text_embedding": features.embedding * 9}
    assert not torch.allclose(prior(**given), prior(**inputs(3)), atol=1e-3)
    drawn = stage.sample(features, [1, 2, 3], candidates=1)
    assert float((drawn.norm(dim=1) - 1).abs().min()) > 1e-3
    with pytest.raises(UnclipError, match="raw length"):
        stage.sample(text(3), [1, 2, 3])


@pytest.mark.parametrize("clip, largest", [({"clip_range": 0.5}, 0.5), ({"clip_range": None}, None)])
def test_x_start_is_clamped_in_the_normalised_space(clip: dict[str, Any], largest: float | None) -> None:
    prior = network(**clip)
    seen: list[Tensor] = []
    DiffusionPriorStage(prior, prior.config).sample(
        text(4), [1, 2, 3, 4], steps=3, callback=lambda _number, _total, x_start: seen.append(x_start)
    )
    extent = max(float(x.abs().max()) for x in seen)
    assert len(seen) == 3 and (extent <= 0.5 if largest else extent > 0.5)


def test_folders_of_earlier_versions_hold_diffusion_priors(tmp_path: Path) -> None:
    """Their config.json names no kind and none of the later options; keys of the weights are the same."""
    prior = network()
    old = {name: SMALL[name] for name in ("embedding_dim", "token_dim", "text_length", "width", "depth", "heads")}
    save_part(tmp_path / "part", KIND, prior.config, prior.state_dict())
    write_json(tmp_path / "part" / "config.json", {"format": 1, "kind": KIND, "config": old})
    stage = PriorStage.load(tmp_path / "part")
    assert isinstance(stage, DiffusionPriorStage) and stage.config == parse_config(PriorConfig, old)
