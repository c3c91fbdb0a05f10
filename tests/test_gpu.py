"""What only a CUDA device can show: bf16 training, and that sampling there agrees with the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import decoder.train
import prior.train
from decoder import Decoder, DecoderConfig, DecoderRunConfig, DecoderStage, decoder_loss
from prior import PriorRunConfig
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.diffusion import GaussianDiffusion
from unclip.training import current

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = parse_config(
    DecoderConfig,
    {
        "embedding_dim": 16,
        "token_dim": 24,
        "text_length": 6,
        "context_dim": 32,
        "spatial_seed": True,
        "unet": {
            "image_size": 32,
            "patch_size": 2,
            "model_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [8],
            "head_channels": 32,
        },
        "diffusion": {"prediction": "v", "variance": "learned_range"},
    },
)


@pytest.fixture(autouse=True)
def _exact_float32() -> Any:
    """TF32 would make the comparison with the CPU a loose one."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def network(zeros: bool = False) -> Decoder:
    """With `zeros` as built, else with nothing at zero, so that every layer matters."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    if not zeros:
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder


def conditions(count: int) -> tuple[Tensor, TextFeatures]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6) <= (torch.arange(count) % 5 + 1)[:, None]
    tokens = torch.randn(count, 6, 24, generator=generator) * mask[..., None]
    embedding = F.normalize(torch.randn(count, 16, generator=generator), dim=1)
    return embedding, TextFeatures(tokens, mask, embedding)


def test_decoder_trains_in_bfloat16_autocast() -> None:
    """Parameters, output and loss stay float32, the loss agrees with float32's, and it falls."""
    device = torch.device("cuda")
    decoder, process = network(zeros=True).to(device), GaussianDiffusion(CONFIG.diffusion)
    embedding, text = conditions(8)
    embedding, text = embedding.to(device), text.to(device)
    picture = torch.linspace(-1, 1, 32, device=device).expand(8, 3, 32, 32)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)

    def loss_at(seed: int, autocast: bool) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return decoder_loss(decoder, process, CONFIG, picture, embedding, text, generator)

    history = []
    for step in range(60):
        losses = loss_at(step, True)
        assert all(value.dtype == torch.float32 and value.shape == (8,) for value in losses.values())
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and bool(torch.isfinite(g).all()) for g in gradients)
        optimizer.step()
        history.append(losses["mse"].mean().item())
    assert all(p.dtype == torch.float32 for p in decoder.parameters())
    assert sum(history[-10:]) < 0.7 * sum(history[:10])
    with torch.no_grad():
        rough, exact = (loss_at(7, autocast)["mse"] for autocast in (True, False))
    assert torch.allclose(rough, exact, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_sampling_agrees_with_the_cpu(sampler: str) -> None:
    embedding, text = conditions(3)
    results = [
        DecoderStage(network().to(device), CONFIG, device).sample(
            embedding, [1, 2, 3], text=text, sampler=sampler, steps=6, guidance=2.0
        )
        for device in ("cpu", "cuda")
    ]
    assert results[1].device.type == "cuda" and results[1].dtype == torch.float32
    assert float(results[0].std()) > 0.1
    assert torch.allclose(results[0], results[1].cpu(), atol=5e-3)


@pytest.mark.parametrize("stage", ["decoder", "prior"])
def test_a_run_draws_and_measures_on_the_way(tiny_clip_folder: Path, tmp_path: Path, stage: str) -> None:
    """The copy that draws goes to the device with everything it meets there."""
    assert current().device.type == "cuda"
    settings = {"run_dir": str(tmp_path), "steps": 2, "batch_size": 4, "sample_every": 1, "log_every": 1,
                "wandb": {"mode": "disabled"}}  # fmt: skip
    body: dict[str, Any] = {
        "clip": str(tiny_clip_folder), "data": {"image_size": 16, "synthetic": {"size": 32}}, "train": settings,
    }  # fmt: skip
    if stage == "decoder":
        unet = {"image_size": 16, "patch_size": 4, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1,
                "attention_resolutions": [], "head_channels": 16}  # fmt: skip
        body["model"] = {"unet": unet, "context_dim": 16, "steps": 2}
        decoder.train.run(parse_config(DecoderRunConfig, body), current())
        assert (tmp_path / "samples" / "step-00000002.png").is_file()
    else:
        body["model"] = {"width": 32, "depth": 1, "heads": 2, "steps": 2}
        prior.train.run(parse_config(PriorRunConfig, body), current())
        assert "cos_prediction_real" in (tmp_path / "metrics.jsonl").read_text()
