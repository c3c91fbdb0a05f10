"""What the U-Net's blocks save while no gradients are recorded: the same results, with less work and memory."""

from __future__ import annotations

import resource
from typing import Any

import helpers_decoder
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from unclip.nn import UNet, UNetConfig, watch_attention
from unclip.nn.blocks import BlockOptions, ResBlock
from unclip.nn.config import EfficientUNetConfig
from unclip.nn.efficient_unet import EfficientUNet
from unclip.nn.sparing import conv_and_shift, conv_and_shortcut, doubled_conv
from unclip.nn.storage import kept_for_reuse


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double().eval()


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Wrapped(nn.Module):
    """What an adapter makes of a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x) + 1  # type: ignore[no-any-return]


def twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


# ---- doubling and convolving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_a_doubled_map_is_convolved_without_being_made(bias: bool, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias).double()
    x = rand(2, 3, *size).requires_grad_()
    wanted, got = conv(twice(x)), doubled_conv(x, conv)
    assert got.shape == (2, 4, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    inputs = (x, *conv.parameters())
    pull = rand(*wanted.shape, seed=2)
    for one, other in zip(*(torch.autograd.grad(out, inputs, pull) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_four_ninths_of_the_products_are_left() -> None:
    conv, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 16, 16)
    counts = []
    for run in (lambda: conv(twice(x)), lambda: doubled_conv(x, conv)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    weights = 2 * 8 * 8 * 9 * 16  # the sums of the weights, which do not grow with the picture
    assert counts[1] - weights == pytest.approx(counts[0] * 4 / 9)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 5, padding=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16),
        Wrapped(nn.Conv2d(4, 4, 3, padding=1)),
    ],
)
def test_any_other_convolution_of_a_doubled_map_is_done_as_it_stands(conv: nn.Module) -> None:
    x = rand(1, 4, 4, 4).to(next(conv.parameters()).dtype)
    assert torch.equal(doubled_conv(x, conv), conv(twice(x)))


# ---- blocks and networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_block_gives_without_gradients_what_it_gives_with_them(
    scale_shift: bool, resample: str | None, batch: int, layout: torch.memory_format
) -> None:
    out = 8 if resample else 6
    skip = None if resample else rand(batch, 3, 4, 4, seed=3).contiguous(memory_format=layout)
    block = randomised(ResBlock(8 + (3 if skip is not None else 0), out, 16, 0.0, resample, BlockOptions(scale_shift)))
    x, emb = rand(batch, 8, 4, 4).contiguous(memory_format=layout), rand(batch, 16, seed=4)
    before = [part.clone() for part in (x, emb, *([] if skip is None else [skip]))]
    wanted = block(x, emb, skip)
    with torch.no_grad():
        got = block(x, emb, skip)
    assert wanted.requires_grad and not got.requires_grad
    torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-12)
    given = (x, emb, *([] if skip is None else [skip]))
    assert all(torch.equal(one, other) for one, other in zip(before, given, strict=True))  # and it is left alone


@pytest.mark.parametrize("name", ["conv_in", "conv_out", "shortcut"])
def test_what_an_adapter_wraps_around_a_layer_is_heard(name: str) -> None:
    block = randomised(ResBlock(8, 6, 16, options=BlockOptions(scale_shift_norm=False)))
    setattr(block, name, Wrapped(getattr(block, name)))
    x, emb = rand(1, 8, 4, 4).contiguous(memory_format=torch.channels_last), rand(1, 16)
    with torch.no_grad():
        got = block(x, emb)
    torch.testing.assert_close(got, block(x, emb).detach(), rtol=0, atol=1e-12)


def test_a_sum_goes_into_the_convolution_beside_it() -> None:
    """Of one sample the shift is a part of the bias, and the shortcut's product adds to what is there."""
    conv, shortcut = (nn.Conv2d(4, 4, size, padding=size // 2).double() for size in (3, 1))
    x = rand(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.profiler.profile() as seen:
        conv_and_shift(x, conv, rand(1, 4, 1, 1))
        conv_and_shortcut(x, conv, x, shortcut)
    sums = [event.input_shapes for event in seen.events() if event.name in ("aten::add", "aten::add_")]
    assert len(sums) == 2  # of biases alone: (C,) + (C,)
    convolutions = [event for event in seen.events() if event.name == "aten::conv2d"]
    assert len(convolutions) == 2  # the shortcut's is none


@pytest.mark.parametrize("kind", ["adm", "ddpm", "efficient"])
def test_a_network_gives_without_gradients_what_it_gives_with_them(kind: str) -> None:
    torch.manual_seed(0)
    network: nn.Module
    if kind == "efficient":
        config = EfficientUNetConfig(
            model_channels=8, channel_mult=(1, 2), num_res_blocks=(1, 2), bottom_attention=True, head_channels=8
        )
        network = EfficientUNet(config, 3, 3)
    else:
        shape: dict[str, Any] = {"image_size": 8, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
        plain = UNetConfig(
            **shape, attention_resolutions=(4,), head_channels=8, resblock_updown=kind == "adm",
            scale_shift_norm=kind == "adm",
        )  # fmt: skip
        network = UNet(plain, 3, 3)
    network = randomised(network)
    x, t = rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.tensor([3, 700])
    with torch.no_grad():
        got = network(x, t)
    torch.testing.assert_close(got, network(x, t).detach(), rtol=0, atol=1e-5)  # the last map is made float32


# ---- a caption's padding -----------------------------------------------------------------------------------------


def test_padding_behind_the_longest_caption_is_not_read() -> None:
    network = helpers_decoder.network()
    batch = helpers_decoder.inputs(2)
    batch["text_mask"] = torch.arange(helpers_decoder.LENGTH)[None] < torch.tensor([2, 3])[:, None]
    batch |= {name: torch.zeros(2, dtype=torch.bool) for name in ("drop_embedding", "drop_text")}
    wanted = network(**batch)
    x_t, t = batch.pop("x_t"), batch.pop("t")
    with torch.no_grad():
        read = network.read(**batch)
        got = network.conditioned(x_t, t, read)
        with watch_attention(network, lambda maps: None):  # who watches counts all places
            watched = network.read(**batch)
    tokens = network.config.image_tokens
    assert (read.mask.shape[1], watched.mask.shape[1]) == (tokens + 3, tokens + helpers_decoder.LENGTH)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


# ---- memory ------------------------------------------------------------------------------------------------------


def test_memory_of_feature_maps_is_not_given_back_between_layers() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(2):
            maps = [torch.ones(5 * 2**20) for _ in range(8)]  # 160 MiB, beyond what glibc keeps
            del maps
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_for_reuse(torch.device("cpu")):
        faults()
        kept = faults()
    assert faults() > 160 * 2**20 // resource.getpagesize() > 20 * kept
