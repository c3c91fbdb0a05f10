"""A model folder whose prior is autoregressive: loaded, sampled, described; options it cannot follow are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_bundle import WIDTHS, make_bundle
from torch.nn import functional as F

from prior import AutoregressivePriorConfig, AutoregressivePriorStage, build_network
from prior.codes import measure_codes
from prior.sampling import KIND
from prior.statistics import store_codes
from unclip import UnCLIP
from unclip.bundle import save_part
from unclip.clip import FrozenCLIP
from unclip.config import parse_config
from unclip.errors import UsageError

CODES = 5


@pytest.fixture(scope="module")
def bundle(tiny_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("autoregressive")
    body = {"kind": "autoregressive", "width": 16, "depth": 1, "heads": 2, "components": CODES, "buckets": 32}
    config = parse_config(AutoregressivePriorConfig, {**WIDTHS, **body, "null_text": "clip", "guidance": 2.0})
    torch.manual_seed(0)
    network = build_network(config)
    seen = F.normalize(torch.randn(100, WIDTHS["embedding_dim"]), dim=1)
    store_codes(network, measure_codes(seen, CODES, 0.01), 0.2 * torch.randn(100))  # type: ignore[arg-type]
    network.store_null(FrozenCLIP.load(str(tiny_parts["clip"])).encode_text([""]), "unit")
    save_part(root / "prior", KIND, config, network.state_dict())
    parts = {name: tiny_parts[name] for name in ("clip", "decoder")} | {"prior": root / "prior"}
    return make_bundle(root / "model", parts)


def test_it_draws_and_gives_a_seed_the_same_embedding(bundle: Path) -> None:
    model = UnCLIP.from_pretrained(bundle)
    assert isinstance(model.prior, AutoregressivePriorStage)
    heard: list[tuple[str, int, int]] = []
    embedding = model.predict_embedding(["pizza", "rainbow"], seed=[3, 4], progress=lambda *said: heard.append(said))
    assert heard == [("prior", k + 1, CODES) for k in range(CODES)]
    alone = model.predict_embedding("rainbow", seed=4)
    assert torch.allclose(alone[0], embedding[1], atol=1e-4)
    assert model.sample("pizza", size=64, seed=0)[0].size == (64, 64)


def test_steps_are_refused_before_anything_is_drawn(bundle: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    message = "steps 5 is asked of the prior, which is autoregressive"
    with pytest.raises(UsageError, match=message):
        UnCLIP.from_pretrained(bundle).sample("pizza", size=64, prior_steps=5)
    code, _, error = run_cli("sample", "--model", bundle, "--prompt", "pizza", "--size", 64, "--prior-steps", 5)
    assert code == 2 and message in error and "\n" not in error.strip()


def test_it_is_described(bundle: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, output, _ = run_cli("info", "--model", bundle, "--json")
    prior = json.loads(output)["model"]["parts"]["prior"]
    assert code == 0
    assert prior["defaults"] == {"kind": "autoregressive", "components": CODES, "guidance": 2.0, "candidates": 1}
    assert "kind autoregressive" in run_cli("info", "--model", bundle)[1]
