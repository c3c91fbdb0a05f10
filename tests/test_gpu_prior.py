"""What only a CUDA device can show of the autoregressive prior: sampling there agrees with the CPU, and bf16 trains."""

from __future__ import annotations

import pytest
import torch
from test_prior_autoregressive import embeddings, stage, text
from torch.nn import functional as F

from prior import autoregressive_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_cached_sampling_agrees_with_the_cpu() -> None:
    here, there, features = stage(candidates=2), stage(candidates=2), text(4)
    there.network.to("cuda")
    there.device = torch.device("cuda")
    expected = here.sample(features, [1, 2, 3, 4], guidance=2.0)
    found = there.sample(features, [1, 2, 3, 4], guidance=2.0)
    assert found.is_cuda and float(F.cosine_similarity(found.cpu(), expected).min()) > 0.999


def test_it_trains_in_bfloat16() -> None:
    prior = stage().network.to("cuda").train()
    truth, features = embeddings(32).to("cuda"), text(32).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", torch.bfloat16):
            loss = autoregressive_loss(prior, prior, prior.config, truth, features, generator)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
