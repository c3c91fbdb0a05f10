"""Where tensors lie on a GPU, shown without one: losses and samplers on PyTorch's fake tensors of a CUDA device.

Fake tensors have shapes, types and devices and no values; an operation on two devices fails as it would on a GPU. What
reads values (random states, checks of ranges) is stood in for below; the values themselves are what test_gpu.py is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils._device
from helpers_prior import DIM, LENGTH, SMALL, TOKEN
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from decoder import Decoder, DecoderConfig, DecoderStage, decoder_loss
from prior import Prior, PriorConfig, prior_loss
from prior.sampling import build_stage
from unclip.clip import TextFeatures
from unclip.config import parse_config
from unclip.diffusion import GaussianDiffusion
from upsamplers import UpsamplerStage
from upsamplers.config import UpsamplerConfig
from upsamplers.network import Upsampler

GPU = torch.device("cuda", 0)
GENERATOR: Any = SimpleNamespace(device=GPU)  # a real one needs the device
DECODER = {
    "embedding_dim": DIM, "token_dim": TOKEN, "text_length": LENGTH, "context_dim": 32,
    "unet": {"image_size": 32, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
             "attention_resolutions": [16], "head_channels": 32},
    "diffusion": {"variance": "learned_range"},
}  # fmt: skip
KARLO = {"embedding_length": "raw", "image_tokens_first": True, "text_embedding_to_time": True, "null_text": "clip"}
DECODERS = {
    "plain": {},
    "seeds": {"spatial_seed": True, "text_seed": True, "embedding_hidden": 32},
    "noise levels": {"embedding_noise_levels": 100},
    "shaped noise": {"embedding_noise": 0.3, "embedding_noise_shape": "data"},
    "karlo": KARLO,
    "inpainting": {"inpainting": True},
    "v": {"diffusion": {"prediction": "v", "loss_weighting": "min_snr", "variance": "fixed_small"}},
}
UPSAMPLER = {
    "low_size": 16, "high_size": 64, "steps": 3,
    "unet": {"image_size": 64, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1},
}  # fmt: skip
UPSAMPLERS = {
    "plain": {},
    "noise": {"noise_augmentation": 100, "noise_level": 10},
    "residual": {"residual": True, "diffusion": {"prediction": "x_start"}},
}


def _drawing(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(*arguments: Any, generator: Any = None, **options: Any) -> Tensor:
        if generator is not None:
            options.setdefault("device", generator.device)
        return draw(*arguments, **options)

    return drawn


def _as_tensor(value: Any, dtype: Any = None, device: Any = None) -> Tensor:
    return value.to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.utils._device._device_constructors()  # remembers torch's own functions, before they are replaced
    for name in ("rand", "randn", "randint", "randperm"):
        monkeypatch.setattr(torch, name, _drawing(getattr(torch, name)))
    monkeypatch.setattr(torch, "as_tensor", _as_tensor)
    monkeypatch.setattr(DecoderStage, "_check", lambda *_: None)
    monkeypatch.setattr(UpsamplerStage, "_check", lambda *_: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_gpu(build: Callable[[Any], nn.Module], config: Any) -> Any:
    with GPU:
        return build(config)


def text(count: int) -> TextFeatures:
    with GPU:
        mask = torch.ones(count, LENGTH, dtype=torch.bool)
        return TextFeatures(torch.randn(count, LENGTH, TOKEN), mask, torch.randn(count, DIM), torch.rand(count))


@pytest.mark.parametrize("change", DECODERS.values(), ids=DECODERS)
def test_decoder(change: dict[str, Any]) -> None:
    config = parse_config(DecoderConfig, {**DECODER, **change})
    network, process = on_gpu(Decoder, config), GaussianDiffusion(config.diffusion)
    images, embedding = torch.randn(4, 3, 32, 32, device=GPU), torch.randn(4, DIM, device=GPU)
    loss = decoder_loss(network, process, config, images, embedding, text(4), GENERATOR)["loss"]
    assert loss.device == GPU
    stage = DecoderStage(network, config, GPU)
    for sampler in ("ddpm", "ddim", "dpmpp_2m", "unipc", "plms"):
        drawn = stage.sample(
            torch.randn(3, DIM, device=GPU), [1, 2, 3], text=text(3), steps=4, sampler=sampler, guidance=3.0,
            guidance_text=2.0, guidance_rescale=0.5, negative=text(3),
        )  # fmt: skip
        assert (drawn.device, drawn.dtype, tuple(drawn.shape)) == (GPU, torch.float32, (3, 3, 32, 32))


@pytest.mark.parametrize("change", [{}, {"normalisation": "scale"}, {"embedding_length": "raw"}], ids=str)
def test_prior(change: dict[str, Any]) -> None:
    config = parse_config(PriorConfig, {**SMALL, **change})
    network, process = on_gpu(Prior, config), GaussianDiffusion(config.diffusion)
    network.computes_padding = True  # parts by length are chosen by values
    truth = torch.randn(4, DIM, device=GPU)
    assert prior_loss(network, network, process, config, truth, text(4), GENERATOR)["loss"].device == GPU
    stage = build_stage(config, network, GPU)
    for sampler in ("ddpm", "ddim", "dpmpp_2m"):
        drawn = stage.sample(text(3), [1, 2, 3], steps=4, sampler=sampler, guidance=3.0, candidates=2)
        assert (drawn.device, tuple(drawn.shape)) == (GPU, (3, DIM))


@pytest.mark.parametrize("place", [torch.device("cpu"), GPU], ids=str)
@pytest.mark.parametrize("change", UPSAMPLERS.values(), ids=UPSAMPLERS)
def test_upsampler(change: dict[str, Any], place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(UpsamplerConfig, {**UPSAMPLER, **change})
    network = on_gpu(Upsampler, config)
    monkeypatch.setattr(Upsampler, "to", lambda self, _: self)  # moves parameters' data, which fake ones lack
    stage = UpsamplerStage(network, GPU)
    drawn = stage.sample(torch.randn(2, 3, 15, 9, device=place), [1, 2])
    assert (drawn.device, tuple(drawn.shape)) == (GPU, (2, 3, 60, 36))


def test_two_devices_would_be_found() -> None:
    with pytest.raises(RuntimeError, match=r"cuda|same device"):
        torch.randn(3, device=GPU) + torch.randn(3)
