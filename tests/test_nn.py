"""The U-Net and its blocks: shapes, conditioning, masks, and parity with other implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from unclip.config import parse_config
from unclip.errors import UsageError
from unclip.nn import UNet, UNetConfig, timestep_embedding
from unclip.nn.blocks import AttentionBlock, BlockOptions, ConvResample, ResBlock, group_norm

CONTEXT = 12
SMALL: dict[str, Any] = {
    "image_size": 16,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "head_channels": 8,
}


def unet(in_channels: int = 3, out_channels: int = 3, context: int | None = None, **changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(parse_config(UNetConfig, {**SMALL, **changes}), in_channels, out_channels, context)


def randomised(module: nn.Module, size: float = 0.1) -> nn.Module:
    """Nothing stays zero, so that every input reaches the output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module.eval()


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, multiple",
    [
        ({}, 2),
        ({"channel_mult": [1, 2, 2]}, 4),
        ({"patch_size": 4}, 8),
        ({"patch_size": 4, "refine_channels": 5}, 8),
        ({"channel_mult": [2], "num_res_blocks": 3}, 1),
        ({"num_res_blocks": [0, 2]}, 2),
        ({"channel_mult": [1, 1, 3], "num_res_blocks": [2, 0, 1], "patch_size": 2}, 8),
    ],
)
def test_output_has_the_input_size(changes: dict[str, Any], multiple: int) -> None:
    network = unet(5, 7, **changes)
    assert network.multiple == multiple
    for height, width in ((multiple * 2, multiple * 2), (multiple * 4, multiple * 6)):
        output = network(rand(2, 5, height, width), torch.tensor([3, 900]))
        assert output.shape == (2, 7, height, width) and output.dtype == torch.float32


def test_untrained_output_is_zero() -> None:
    """conv_out starts at zero (ADM), as does the end of every residual branch."""
    network = unet(context=CONTEXT)
    output = network(rand(2, 3, 16, 16), torch.tensor([3, 900]), context=rand(2, 4, CONTEXT))
    assert torch.equal(output, torch.zeros_like(output))


def test_untrained_blocks_are_the_identity() -> None:
    x, emb = rand(2, 16, 8, 8), rand(2, 32, seed=1)
    assert torch.equal(ResBlock(16, 16, 32)(x, emb), x)
    assert torch.equal(AttentionBlock(16, 8, CONTEXT)(x, rand(2, 3, CONTEXT)), x)
    down, up = ResBlock(16, 16, 32, resample="down")(x, emb), ResBlock(16, 16, 32, resample="up")(x, emb)
    assert torch.allclose(down, x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean(dim=(3, 5)), atol=1e-6)
    assert torch.equal(up, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_a_refiner_sees_over_the_edges_of_patches() -> None:
    """It starts by changing nothing. Then a pixel depends on its neighbours in other patches, three pixels far."""
    with_one = unet(patch_size=4, channel_mult=[1], num_res_blocks=0, refine_channels=6)
    without = unet(patch_size=4, channel_mult=[1], num_res_blocks=0)
    shared = without.state_dict()
    for value in shared.values():
        value.add_(0.1 * torch.randn_like(value))
    without.load_state_dict(shared)
    assert all(name.startswith("refiner.") for name in with_one.load_state_dict(shared, strict=False).missing_keys)
    x, t = rand(2, 3, 16, 16), torch.tensor([3, 900])
    assert torch.equal(with_one(x, t), without(x, t))
    randomised(with_one)
    first = with_one(x, t)
    assert not torch.allclose(first, with_one(x, torch.tensor([900, 3])), atol=1e-3)  # it knows the timestep
    moved = with_one.refiner(torch.zeros(1, 3, 16, 16), rand(1, 3, 16, 16), rand(1, 64))
    picture = torch.zeros(1, 3, 16, 16)
    picture[..., 7, 7] = 1
    changed = with_one.refiner(picture, rand(1, 3, 16, 16), rand(1, 64)) - moved - picture
    rows = changed[0].abs().amax(dim=(0, 2)).nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (4, 10)


def test_attention_sits_where_the_configuration_says() -> None:
    network = unet(channel_mult=[1, 2, 2], attention_resolutions=[8])
    found = [stage.attention is not None for stage in network.down]
    # level 16: block, down; level 8: block with attention, down; level 4: block
    assert found == [False, False, True, False, False]
    assert network.middle.attention is None  # the middle runs at 4
    assert [stage.attention is not None for stage in network.up] == [False, False, True, True, False, False]
    whole = unet(patch_size=2, channel_mult=[1, 2], attention_resolutions=[8, 4])
    assert whole.middle.attention is not None  # 16 px in patches of 2, halved once
    assert all(stage.attention is not None for stage in whole.up)


def test_bottom_map_and_embedding_are_added() -> None:
    network = randomised(unet())
    assert isinstance(network, UNet)
    assert (network.bottom_size, network.bottom_channels, network.embedding_dim) == (8, 32, 64)
    x, t = rand(1, 3, 16, 16), torch.tensor([400])
    plain = network(x, t)
    zero = network(x, t, embedding=torch.zeros(1, 64), bottom=torch.zeros(1, 32, 8, 8))
    assert torch.equal(plain, zero)
    assert not torch.allclose(plain, network(x, t, embedding=rand(1, 64)), atol=1e-3)
    assert not torch.allclose(plain, network(x, t, bottom=rand(1, 32, 8, 8)), atol=1e-3)


def test_time_and_samples_matter_and_samples_do_not_mix() -> None:
    network = randomised(unet())
    x, t = rand(2, 3, 16, 16), torch.tensor([10, 800])
    both = network(x, t)
    assert not torch.allclose(both, network(x, t.flip(0)), atol=1e-3)
    assert torch.allclose(both[1:], network(x[1:], t[1:]), atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_res_blocks": [1, 1, 1]}, "names 3 levels, channel_mult 2"),
        ({"head_channels": 12}, "head_channels 12 does not divide the 32 channels"),
        ({"head_channels": 12, "attention_resolutions": [], "middle_attention": True}, "does not divide the 32 chann"),
        ({"channel_mult": [1, 1.3]}, r"channel_mult 1\.3 times model_channels 16 is no whole number of channels"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        unet(**changes)


def test_unknown_key_of_the_network_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'patch_size'"):
        unet(patchsize=2)


# ---- context -----------------------------------------------------------------------------------------------


def test_masked_context_has_no_influence() -> None:
    network = randomised(unet(context=CONTEXT))
    x, t, context = rand(2, 3, 16, 16), torch.tensor([10, 800]), rand(2, 5, CONTEXT)
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    output = network(x, t, context=context, context_mask=mask)
    other = torch.where(mask[..., None], context, 100 * rand(2, 5, CONTEXT, seed=9))
    assert torch.equal(output, network(x, t, context=other, context_mask=mask))
    assert torch.allclose(output[:1], network(x[:1], t[:1], context=context[:1, :2]), atol=1e-5)


def test_context_that_is_seen_has_influence() -> None:
    network = randomised(unet(context=CONTEXT))
    x, t, context = rand(2, 3, 16, 16), torch.tensor([10, 800]), rand(2, 5, CONTEXT)
    everything = network(x, t, context=context)
    assert not torch.allclose(everything, network(x, t), atol=1e-4)
    for token in range(5):
        other = context.clone()
        other[0, token] += 3
        changed = network(x, t, context=other)
        assert not torch.allclose(everything[0], changed[0], atol=1e-4)
        assert torch.allclose(everything[1], changed[1], atol=1e-6)  # of its own sample only
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(everything, network(x, t, context=context, context_mask=mask), atol=1e-6)


def test_attention_agrees_with_a_naive_softmax() -> None:
    block = randomised(AttentionBlock(32, 8, CONTEXT), 0.3)
    assert isinstance(block, AttentionBlock) and block.context_kv is not None and block.heads == 4
    x, context = rand(2, 32, 3, 5), rand(2, 4, CONTEXT, seed=1)
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    normed = block.norm(x)
    result = torch.empty_like(x)
    for sample in range(2):
        tokens = normed[sample].reshape(32, 15).T
        query, key, value = (tokens @ block.qkv.weight.T + block.qkv.bias).split(32, dim=1)
        extra = (context[sample] @ block.context_kv.weight.T + block.context_kv.bias)[mask[sample]]
        # One softmax goes over both.
        key, value = torch.cat([key, extra[:, :32]]), torch.cat([value, extra[:, 32:]])
        heads = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            scores = query[:, part] @ key[:, part].T / math.sqrt(8)
            heads.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ value[:, part])
        attended = torch.cat(heads, dim=1) @ block.out.weight.T + block.out.bias
        result[sample] = x[sample] + attended.T.reshape(32, 3, 5)
    assert torch.allclose(block(x, context, mask), result, atol=1e-5)


# ---- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, out", [(32, 32), (32, 64)])
@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("shift", [True, False])
def test_residual_block_agrees_with_diffusers(channels: int, out: int, resample: str | None, shift: bool) -> None:
    options = BlockOptions(scale_shift_norm=shift, norm_groups=16, norm_eps=1e-3)
    ours = randomised(ResBlock(channels, out, 24, resample=resample, options=options))
    assert isinstance(ours, ResBlock)
    theirs = ResnetBlock2D(
        in_channels=channels,
        out_channels=out,
        temb_channels=24,
        groups=16,
        eps=1e-3,
        time_embedding_norm="scale_shift" if shift else "default",
        down=resample == "down",
        up=resample == "up",
        conv_shortcut=channels != out,
    )
    names = {
        "norm_in": "norm1", "conv_in": "conv1", "embedding": "time_emb_proj", "norm_out": "norm2",
        "conv_out": "conv2", "shortcut": "conv_shortcut",
    }  # fmt: skip
    state = {}
    for name, tensor in ours.state_dict().items():
        first, rest = name.split(".", 1)
        state[f"{names[first]}.{rest}"] = tensor
    theirs.load_state_dict(state)
    theirs.eval()
    x, emb = rand(2, channels, 8, 8), rand(2, 24, seed=1)
    assert torch.allclose(ours(x, emb), theirs(x, emb), atol=1e-5)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_plain_resampling_agrees_with_diffusers(direction: str) -> None:
    ours = randomised(ConvResample(16, direction))
    theirs = Downsample2D(16, use_conv=True, padding=1) if direction == "down" else Upsample2D(16, use_conv=True)
    theirs.conv.load_state_dict(ours.conv.state_dict())
    x, emb = rand(2, 16, 8, 6), rand(2, 24, seed=1)
    assert torch.allclose(ours(x, emb), theirs(x), atol=1e-6)
    assert ours(x, emb).shape[-2:] == ((4, 3) if direction == "down" else (16, 12))


def test_network_without_scale_shift_and_residual_resampling() -> None:
    network = unet(scale_shift_norm=False, resblock_updown=False, context=CONTEXT)
    widths = {block.embedding.out_features // block.conv_in.out_channels for block in network.modules()
              if isinstance(block, ResBlock)}  # fmt: skip
    assert widths == {1}
    kinds = [type(stage.res) for stage in network.down]
    assert kinds == [ResBlock, ConvResample, ResBlock]
    assert [type(stage.resample) for stage in network.up] == [type(None), ConvResample, type(None), type(None)]
    randomised(network)
    x, t = rand(2, 3, 16, 16), torch.tensor([10, 800])
    output = network(x, t, context=rand(2, 5, CONTEXT))
    assert output.shape == x.shape and not torch.allclose(output, network(x, t.flip(0)), atol=1e-3)


@pytest.mark.parametrize("wanted, expected", [(None, False), (True, True), (False, False)])
def test_attention_in_the_middle_may_be_asked_for(wanted: bool | None, expected: bool) -> None:
    network = unet(attention_resolutions=[], middle_attention=wanted)
    assert (network.middle.attention is not None) == expected
    assert (unet(middle_attention=False).middle.attention is None) and unet().middle.attention is not None


def test_levels_may_be_a_fraction_of_the_width() -> None:
    network = unet(channel_mult=[0.5, 1.5], head_channels=24)
    assert [stage.res.conv_out.out_channels for stage in network.down] == [8, 8, 24]
    assert network.embedding_dim == 64
    assert network.config.channel_mult == (0.5, 1.5) and unet().config.channel_mult == (1, 2)
    assert all(isinstance(mult, int) for mult in unet().config.channel_mult)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    """Computed in half, normalised in float32: a feature map too large for half's squares keeps its statistics."""
    whole = randomised(unet(context=CONTEXT)).requires_grad_(False)
    x, t, context = rand(2, 3, 16, 16), torch.tensor([10, 800]), rand(2, 5, CONTEXT)
    exact = whole(x, t, context=context)
    half = whole.to(dtype)
    output = half(x, t, context=context.to(dtype))
    assert output.dtype == torch.float32
    assert float((output - exact).abs().mean()) < (0.03 if dtype == torch.bfloat16 else 0.004) * float(exact.std())
    norm, large = group_norm(32).to(dtype), (3e4 * rand(1, 32, 4, 4).clamp(-2, 2)).to(dtype)
    assert norm(large).dtype == dtype
    assert torch.allclose(norm(large).float(), group_norm(32)(large.float()), atol=2e-2)


def test_skip_is_concatenated_after_the_input() -> None:
    block = randomised(ResBlock(48, 32, 24))
    x, skip, emb = rand(2, 32, 4, 4), rand(2, 16, 4, 4, seed=1), rand(2, 24, seed=2)
    assert torch.equal(block(x, emb, skip), block(torch.cat([x, skip], dim=1), emb))


@pytest.mark.parametrize("channels, groups", [(64, 32), (48, 16), (40, 8), (7, 1)])
def test_narrow_layers_get_as_many_groups_as_divide_them(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_timestep_embedding_agrees_with_diffusers() -> None:
    t = torch.tensor([0, 1, 17, 999])
    theirs = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(timestep_embedding(t, 64), theirs, atol=1e-4)
    assert timestep_embedding(t.to(torch.int32), 8).dtype == torch.float32
    assert torch.equal(timestep_embedding(t, 8)[0], torch.tensor([1.0] * 4 + [0.0] * 4))


# ---- activation checkpointing ------------------------------------------------------------------------------


def test_activation_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpoint_activations: bool) -> tuple[dict[str, Tensor], int]:
        network = unet(context=CONTEXT, checkpoint_activations=checkpoint_activations, dropout=0.2)
        randomised(network).train()
        calls = []
        network.down[0].register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(2)
        output = network(rand(2, 3, 16, 16), torch.tensor([3, 900]), context=rand(2, 4, CONTEXT))
        output.pow(2).mean().backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, len(calls)

    (plain, once), (saved, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)  # the second run is the point of it
    assert set(plain) == set(saved) == set(dict(unet(context=CONTEXT).named_parameters()))
    assert all(torch.allclose(plain[name], saved[name], atol=1e-7) for name in plain)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in plain.values())
