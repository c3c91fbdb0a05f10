"""Karlo's networks as diffusers has them and ours: same weights, same answers, and not a bit changed on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn
from torch.nn import functional as F

from decoder import Decoder, DecoderConfig, DecoderStage
from unclip.clip import TextFeatures
from unclip.errors import UnclipError
from unclip.interop.decoder import decoder_from_diffusers, decoder_to_diffusers
from unclip.interop.super_resolution import upsampler_from_diffusers, upsampler_to_diffusers
from unclip.interop.unet import unet_from_diffusers, unet_to_diffusers
from unclip.nn import UNet
from upsamplers import Upsampler

DIM, LENGTH, CONTEXT, COUNT = 20, 7, 24, 3
SHAPE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "dropout": 0.1,
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(network: nn.Module, seed: int) -> Any:
    """Nothing is zero or one, so that every tensor matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval().requires_grad_(False)


def conditional(**changes: Any) -> UNet2DConditionModel:
    body: dict[str, Any] = {
        **SHAPE,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 16,
        "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift",
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**body, **changes})


def super_resolution(seed: int = 0, **changes: Any) -> UNet2DModel:
    body: dict[str, Any] = {
        **SHAPE,
        "in_channels": 6,
        "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 3,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 3,
        "add_attention": False,
    }
    torch.manual_seed(seed)
    return UNet2DModel(**{**body, **changes})


@pytest.fixture(scope="module")
def theirs() -> tuple[UNet2DConditionModel, UnCLIPTextProjModel]:
    projection = UnCLIPTextProjModel(clip_embeddings_dim=DIM, time_embed_dim=128, cross_attention_dim=CONTEXT)
    return shaken(conditional(), 1), shaken(projection, 2)


def model(network: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return network.state_dict(), dict(network.config)


def features(count: int = COUNT, seed: int = 0) -> TextFeatures:
    """Raw embeddings with their lengths; captions of 2, 3, 4, … tokens."""
    mask = torch.arange(LENGTH) < torch.arange(2, 2 + count)[:, None]
    raw = 3 * rand(count, DIM, seed=seed + 1)
    return TextFeatures(rand(count, LENGTH, DIM, seed=seed), mask, F.normalize(raw, dim=1), raw.norm(dim=1))


def empty_text(count: int) -> TextFeatures:
    """What stands for the CLIP's features of '', for so many samples."""
    one = features(1, 50)
    assert one.norm is not None
    tokens, mask = one.tokens.expand(count, -1, -1), one.mask.expand(count, -1)
    return TextFeatures(tokens, mask, one.embedding.expand(count, -1), one.norm.expand(count))


def ours_of(theirs: tuple[Any, Any], **changes: Any) -> tuple[Decoder, DecoderConfig]:
    config, state = decoder_from_diffusers(
        model(theirs[0]), model(theirs[1]), empty_text(1), text_length=LENGTH, **changes
    )
    network = Decoder(config).eval()
    network.load_state_dict(state)
    return network.requires_grad_(False), config


def answer(theirs: tuple[Any, Any], x: Tensor, t: Tensor, image: Tensor, text: TextFeatures) -> Tensor:
    """diffusers' UnCLIPPipeline, one step of its decoder without guidance."""
    unet, projection = theirs
    assert text.norm is not None
    context, added = projection(
        image_embeddings=image,
        prompt_embeds=text.embedding * text.norm[:, None],
        text_encoder_hidden_states=text.tokens,
        do_classifier_free_guidance=False,
    )
    mask = F.pad(text.mask, (projection.config.clip_extra_context_tokens, 0), value=True)
    return unet(x, t, encoder_hidden_states=context, class_labels=added, attention_mask=mask).sample


def largest_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


# ---- decoder -----------------------------------------------------------------------------------------------


def given(text: TextFeatures, image: Tensor, dropped: tuple[str, ...] = ()) -> dict[str, Tensor]:
    assert text.norm is not None
    count = len(image)
    return {
        "image_embedding": image,
        "text_tokens": text.tokens,
        "text_mask": text.mask,
        "text_embedding": text.embedding * text.norm[:, None],
        "drop_embedding": torch.full((count,), "embedding" in dropped),
        "drop_text": torch.full((count,), "text" in dropped),
    }


def test_decoder_gives_the_same_answer(theirs: tuple[Any, Any]) -> None:
    network, _ = ours_of(theirs)
    x, t, image, text = rand(COUNT, 3, 16, 16, seed=3), torch.tensor([0, 500, 999]), 2 * rand(COUNT, DIM), features()
    expected = answer(theirs, x, t, image, text)
    assert expected.shape == (COUNT, 6, 16, 16) and float(expected.std()) > 0.1
    assert largest_difference(network(x, t, **given(text, image)), expected) <= 1e-4
    # A size it was not trained at.
    wide = rand(COUNT, 3, 24, 8, seed=4)
    assert largest_difference(network(wide, t, **given(text, image)), answer(theirs, wide, t, image, text)) <= 1e-4


def test_what_is_dropped_becomes_their_null(theirs: tuple[Any, Any]) -> None:
    """A learned embedding in both places, and the features of the empty text, mask included."""
    network, _ = ours_of(theirs)
    x, t, image, text = rand(COUNT, 3, 16, 16, seed=3), torch.tensor([0, 500, 999]), 2 * rand(COUNT, DIM), features()
    empty = empty_text(COUNT)
    learned = theirs[1].learned_classifier_free_guidance_embeddings.expand(COUNT, -1)
    dropped: tuple[str, ...]
    for dropped, z, y in (
        (("embedding",), learned, text),
        (("text",), image, empty),
        (("embedding", "text"), learned, empty),
    ):
        found = network(x, t, **given(text, image, dropped))
        assert largest_difference(found, answer(theirs, x, t, z, y)) <= 1e-4
        assert largest_difference(found, network(x, t, **given(text, image))) > 1e-2


def test_stage_of_a_converted_decoder_guides_as_theirs(theirs: tuple[Any, Any]) -> None:
    """One step of DDIM: x̂_0 of the guided ε, from the learned null and the empty text; embeddings stay raw."""
    network, config = ours_of(theirs)
    stage, image, text = DecoderStage(network, config), 2 * rand(COUNT, DIM), features()
    found = stage.sample(image, [1, 2, 3], text=text, steps=[600], sampler="ddim", guidance=4.0)
    x = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)])
    t = torch.full((COUNT,), 600)
    empty = empty_text(COUNT)
    learned = theirs[1].learned_classifier_free_guidance_embeddings.expand(COUNT, -1)
    conditional, null = answer(theirs, x, t, image, text)[:, :3], answer(theirs, x, t, learned, empty)[:, :3]
    bar = float(stage.process.alphas_cumprod[600])
    expected = ((x - (1 - bar) ** 0.5 * (null + 4 * (conditional - null))) / bar**0.5).clamp(-1, 1)
    assert largest_difference(found, expected) <= 1e-4 and float(expected.std()) > 0.1


def test_decoder_there_and_back_changes_no_bit(theirs: tuple[Any, Any]) -> None:
    network, config = ours_of(theirs)
    unet, projection = decoder_to_diffusers(config, network.state_dict())
    for (state, body), original in zip((unet, projection), theirs, strict=True):
        before = original.state_dict()
        assert set(state) == set(before)
        for name, tensor in before.items():
            assert torch.equal(state[name], tensor), name
        again = type(original).from_config(body)  # as diffusers reads it
        again.load_state_dict(state)
        assert body["_class_name"] == type(original).__name__
    assert unet_from_diffusers(*unet)[0] == config.unet


def test_decoder_without_the_empty_text_says_so(theirs: tuple[Any, Any]) -> None:
    config, state = decoder_from_diffusers(model(theirs[0]), model(theirs[1]), text_length=LENGTH)
    network = Decoder(config)
    network.load_state_dict(state)
    with pytest.raises(UnclipError, match="CLIP's features of ''"):
        DecoderStage(network, config).sample(rand(1, DIM), [0], steps=1)
    network.set_null_text(empty_text(1))
    assert torch.equal(network.state_dict()["null_text"], ours_of(theirs)[0].state_dict()["null_text"])
    DecoderStage(network, config).sample(rand(1, DIM), [0], steps=1)


def test_decoders_that_cannot_be_converted(theirs: tuple[Any, Any]) -> None:
    state, body = model(theirs[0])
    projection = model(theirs[1])
    with pytest.raises(UnclipError, match="missing mid_block"):
        less = {name: tensor for name, tensor in state.items() if name != "mid_block.resnets.0.conv1.weight"}
        decoder_from_diffusers((less, body), projection, text_length=LENGTH)
    with pytest.raises(UnclipError, match=r"unknown extra.*|missing .*"):
        decoder_from_diffusers((state, body), ({**projection[0], "extra": rand(1)}, projection[1]))
    with pytest.raises(UnclipError, match=r"4 input and 8 output channels"):
        decoder_from_diffusers((state, {**body, "in_channels": 4, "out_channels": 8}), projection)
    with pytest.raises(UnclipError, match=r"encoder_hid_dim 768; only None"):
        decoder_from_diffusers((state, {**body, "encoder_hid_dim": 768}), projection)
    with pytest.raises(UnclipError, match=r"'CrossAttnDownBlock2D'"):
        decoder_from_diffusers((state, {**body, "down_block_types": ["CrossAttnDownBlock2D"] * 3}), projection)
    with pytest.raises(UnclipError, match=r"do not fit each other: .*embedding_to_time"):
        narrow = UnCLIPTextProjModel(clip_embeddings_dim=DIM, time_embed_dim=64, cross_attention_dim=CONTEXT)
        decoder_from_diffusers((state, body), model(narrow))
    config, ours = decoder_from_diffusers((state, body), projection, text_length=LENGTH)
    with pytest.raises(UnclipError, match=r"no such decoder: null_text is 'learned'; configs/decoder/karlo\.yaml"):
        decoder_to_diffusers(config.model_copy(update={"null_text": "learned"}), ours)
    with pytest.raises(UnclipError, match=r"patch_size is not 1; refine_channels is not 0"):
        shape = config.unet.model_copy(update={"patch_size": 2, "refine_channels": 8})
        decoder_to_diffusers(config.model_copy(update={"unet": shape}), ours)


# ---- super-resolution --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_super_resolution_gives_the_same_answer(shift: str) -> None:
    theirs = shaken(super_resolution(resnet_time_scale_shift=shift), 3)
    config, state = unet_from_diffusers(*model(theirs))
    assert config.scale_shift_norm == (shift == "scale_shift") and config.middle_attention is None
    ours = UNet(config, 6, 3).eval()
    ours.load_state_dict(state)
    x, t = rand(COUNT, 6, 32, 16), torch.tensor([0, 166, 999])
    expected = theirs(x, t).sample
    assert float(expected.std()) > 0.1
    assert largest_difference(ours(x, t), expected) <= 1e-4
    body, back = unet_to_diffusers(config, ours.state_dict(), in_channels=6, out_channels=3, context_dim=None)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())
    UNet2DModel.from_config(body).load_state_dict(back)


@torch.no_grad()
def test_pair_of_networks_becomes_one_upsampler() -> None:
    first, last = shaken(super_resolution(0), 4), shaken(super_resolution(1), 5)
    config, state = upsampler_from_diffusers(model(first), model(last))
    assert (config.low_size, config.high_size, config.steps, config.last_step_network) == (4, 16, 7, True)
    network = Upsampler(config).eval()
    network.load_state_dict(state)
    x, low, t = rand(3, 3, 16, 16), rand(3, 3, 4, 4, seed=1).clamp(-1, 1), torch.tensor([999, 166, 0])
    enlarged = F.interpolate(low, size=[16, 16], mode="bicubic", align_corners=False, antialias=True)
    both = torch.cat([x, enlarged], dim=1)  # overshoot and all
    expected = torch.cat([first(both[:2], t[:2]).sample, last(both[2:], t[2:]).sample])
    assert largest_difference(network(x, t, low), expected) <= 1e-4
    parts = upsampler_to_diffusers(config, network.state_dict())
    assert parts[1] is not None
    for (found, _), original in zip(parts, (first, last), strict=True):  # type: ignore[misc]
        assert all(torch.equal(found[name], tensor) for name, tensor in original.state_dict().items())
    alone = upsampler_from_diffusers(model(first))
    assert upsampler_to_diffusers(*alone)[1] is None


def test_super_resolution_that_cannot_be_converted() -> None:
    with pytest.raises(UnclipError, match=r"middle block UNetMidBlock2D with attention of another kind"):
        unet_from_diffusers(*model(super_resolution(add_attention=True)))
    with pytest.raises(UnclipError, match=r"have different shapes"):
        upsampler_from_diffusers(model(super_resolution()), model(super_resolution(layers_per_block=1)))
    with pytest.raises(UnclipError, match=r"3 input and 3 output channels"):
        upsampler_from_diffusers(model(super_resolution(in_channels=3)))
    config, state = upsampler_from_diffusers(model(super_resolution()))
    with pytest.raises(UnclipError, match=r"no such super-resolution: residual"):
        upsampler_to_diffusers(config.model_copy(update={"residual": True}), state)


# ---- sizes -------------------------------------------------------------------------------------------------


def test_karlos_networks_have_their_size() -> None:
    """The two that make up "the decoder" of 893,318,086 parameters, and a super-resolution network of 691,579,523."""
    karlo = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 960, 1280),
        "layers_per_block": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        "cross_attention_dim": 1536,
        "attention_head_dim": 64,
    }
    with torch.device("meta"):
        unet, projection = conditional(**karlo), UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)
        four = {"down_block_types": ("ResnetDownsampleBlock2D",) * 4, "up_block_types": ("ResnetUpsampleBlock2D",) * 4}
        high = super_resolution(**{k: karlo[k] for k in ("block_out_channels", "layers_per_block")}, **four)
        config, _ = decoder_from_diffusers(model(unet), model(projection))
        ours = Decoder(config)
        upsampler, _ = upsampler_from_diffusers(model(high))
        count = [sum(p.numel() for p in m.parameters()) for m in (unet, projection, high, ours, Upsampler(upsampler))]
    assert count == [885_439_686, 7_878_400, 691_579_523, 893_318_086, 691_579_523]
