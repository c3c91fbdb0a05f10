"""UnCLIP over decoders that are not the default: their own text, raw embeddings, scales of their own, noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bundle import WIDTHS
from torch import nn

from decoder import Decoder, DecoderConfig, DecoderStage
from prior import PriorStage
from unclip import UnCLIP, UnclipError, UsageError
from unclip.clip import FrozenCLIP
from unclip.config import parse_config

UNET = {
    "image_size": 16,
    "patch_size": 2,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "model_channels": 8,
    "head_channels": 8,
    "attention_resolutions": [8],
}
GLIDE: dict[str, Any] = {"kind": "glide", "length": 20, "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def build(tiny_parts: dict[str, Path]) -> Callable[..., UnCLIP]:
    """A system of the tiny CLIP and prior and a decoder of this configuration."""
    clip = FrozenCLIP.load(str(tiny_parts["clip"]))
    prior = PriorStage.load(tiny_parts["prior"])

    def made(**changes: Any) -> UnCLIP:
        config = parse_config(DecoderConfig, {**WIDTHS, "context_dim": 16, "unet": UNET, "steps": 2, **changes})
        torch.manual_seed(0)
        network: nn.Module = Decoder(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return UnCLIP(clip, DecoderStage(network.requires_grad_(False), config), prior)

    made.clip = clip  # type: ignore[attr-defined]
    return made


def glide_of(build: Any) -> dict[str, Any]:
    return {**GLIDE, "vocab_size": build.clip.vocab_size}


def test_a_decoder_with_its_own_text_is_given_token_ids(build: Any) -> None:
    model = build(text=glide_of(build))
    given: list[torch.Tensor] = []
    model.decoder.network.text_transformer.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    drawn = model.sample(["red disc", "a blue ring"], seed=3, output="tensor")
    assert drawn.shape == (2, 3, 16, 16) and list(model.timings.seconds) == ["clip", "text", "prior", "decoder"]
    ids, _ = model.clip.token_ids(["red disc", "a blue ring"], 20)
    assert torch.equal(given[0][-2:], ids)  # the conditional half
    assert torch.allclose(model.sample("a blue ring", seed=3, output="tensor")[0], drawn[1], atol=1e-4)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    model.variations(torch.zeros(3, 16, 16))  # without a caption
    model.decode(torch.ones(16))


def test_a_vocabulary_that_is_not_the_clips_does_not_fit(build: Any) -> None:
    with pytest.raises(UnclipError, match=r"the CLIP's vocabulary has \d+ tokens, the decoder takes 33"):
        build(text={**GLIDE, "vocab_size": 33})


def test_prior_and_decoder_agree_on_the_embeddings_length(build: Any) -> None:
    with pytest.raises(UnclipError, match="the prior makes embeddings of unit length, the decoder takes raw ones"):
        build(embedding_length="raw")
    unit = build()
    raw = parse_config(DecoderConfig, {**unit.decoder.config.model_dump(), "embedding_length": "raw"})
    alone = UnCLIP(unit.clip, DecoderStage(unit.decoder.network, raw))
    seen: list[torch.Tensor] = []
    unit.decoder.network.embedding_to_time.register_forward_pre_hook(lambda _m, args: seen.append(args[0][-1]))
    alone.decode(torch.full((16,), 3.0), guidance=1.0)
    assert torch.allclose(seen[-1], torch.full((16,), 3.0) * unit.decoder.config.scale)  # the network's own scale
    alone.variations(torch.zeros(3, 16, 16), guidance=1.0)
    own = unit.clip.encode_image(torch.zeros(1, 3, 16, 16), unit_length=False)[0]
    assert torch.allclose(seen[-1], own * unit.decoder.config.scale, atol=1e-5)
    # What the two give and take is of one length, and vectors of length 1 are none of this CLIP's.
    assert torch.equal(alone.embed_image(torch.zeros(3, 16, 16))[0], own)
    assert torch.equal(unit.embed_image(torch.zeros(3, 16, 16), unit_length=False)[0], own)
    directions = alone.embed_image(torch.zeros(3, 16, 16), unit_length=True)
    assert torch.equal(directions, unit.embed_image(torch.zeros(3, 16, 16)))
    with pytest.raises(UsageError, match=r"embeddings of length 1; this model reads them as long as its CLIP makes"):
        alone.decode(directions)


def test_scales_interval_rescale_and_noise_level_reach_the_decoder(build: Any) -> None:
    model = build(embedding_noise_levels=100)
    options: dict[str, Any] = {"seed": 1, "guidance": 3.0, "output": "tensor", "sampler": "ddim"}
    plain = model.sample("red disc", **options)
    for changed in (
        {"guidance_text": 1.0},
        {"guidance_interval": (0.9, 1.0)},
        {"guidance_rescale": 0.7},
        {"embedding_noise_level": 80},
    ):
        assert not torch.allclose(plain, model.sample("red disc", **options, **changed), atol=1e-4), changed


def test_options_that_make_no_sense_are_refused_before_anything_runs(build: Any) -> None:
    model = build()
    for options, message in (
        ({"guidance_text": -1.0}, r"guidance_text is -1\.0, expected a number of 0 or more"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval is \(0\.5, 0\.2\), expected two fractions"),
        ({"guidance_rescale": 2.0}, r"guidance_rescale is 2\.0, expected 0 \(none\) to 1"),
        ({"embedding_noise_level": 5}, r"embedding_noise_level 5 needs a decoder trained with"),
    ):
        with pytest.raises(UsageError, match=message):
            model.sample("red disc", **options)
        assert not model.timings.seconds
    with pytest.raises(UsageError, match=r"guidance_text 2\.0 needs a caption"):
        model.decode(torch.ones(16), guidance_text=2.0)


def test_the_command_takes_a_scale_for_the_prompt(tiny_bundle: Path, tmp_path: Path, run_cli: Any) -> None:
    common = ("sample", "-p", "pizza", "--model", tiny_bundle, "--size", "64", "--guidance", "3", "-q")
    files = []
    for name, more in (("a", ()), ("b", ("--guidance-text", "3")), ("c", ("--guidance-text", "0.5"))):
        files.append(tmp_path / f"{name}.png")
        code, out, err = run_cli(*common, "--out", files[-1], *more)
        assert code == 0, (out, err)
    from PIL import Image

    a, b, c = (Image.open(file) for file in files)
    assert list(a.getdata()) == list(b.getdata()) != list(c.getdata())
    assert '"guidance_text": 0.5' in c.text["options"]  # type: ignore[attr-defined]
    code, _, err = run_cli(*common, "--out", tmp_path / "d.png", "--guidance-text", "-1")
    assert code == 2 and "guidance-text" in err
