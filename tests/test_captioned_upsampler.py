"""Upsamplers that read captions: every way to a picture hands them the caption that it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bundle import make_bundle
from helpers_captioned import HIGH, captioned_config, make_captioned, save_captioned
from PIL import Image, ImageDraw
from torch import Tensor

from unclip import UnCLIP, UnclipError, Upscaler, UsageError
from unclip.clip import TextFeatures
from unclip.editing import Resampling
from unclip.interop.export import export_diffusers
from unclip.parts import bundle_sizes, needed_parts
from upsamplers import sampling

Run = Callable[..., tuple[int, str, str]]
FAST: dict[str, Any] = {"resampling": Resampling(1, 1, 1), "decoder_steps": 1, "prior_steps": 1, "upsampler_steps": 1}


@pytest.fixture(scope="module")
def bundle(tiny_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioned(tmp_path_factory.mktemp("captioned"), tiny_parts)


@pytest.fixture(scope="module")
def model(bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(bundle, device="cpu")


class Read:
    """What the upsampler was given by each call, and what it made."""

    def __init__(self, model: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
        self.low: list[Tensor] = []
        self.captions: list[TextFeatures | None] = []
        self.made: list[Tensor] = []
        own = model.upsamplers[0].sample

        def spy(low: Tensor, *arguments: Any, text: TextFeatures | None = None, **options: Any) -> Tensor:
            made = own(low, *arguments, text=text, **options)
            self.low.append(low)
            self.captions.append(text)
            self.made.append(made)
            return made

        monkeypatch.setattr(model.upsamplers[0], "sample", spy)

    def is_of(self, model: UnCLIP, prompt: str, pictures: int) -> bool:
        """Whether every call was given this caption, once a picture."""
        wanted = model.embed_text([prompt] * pictures)
        return bool(self.captions) and all(
            one is not None and torch.equal(one.tokens, wanted.tokens) and torch.equal(one.mask, wanted.mask)
            for one in self.captions
        )


@pytest.fixture
def read(model: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> Read:
    return Read(model, monkeypatch)


def picture(edge: int = 96) -> Image.Image:
    image = Image.new("RGB", (edge, edge), "navy")
    ImageDraw.Draw(image).ellipse((10, 20, 70, 80), fill="gold")
    return image


def mask(edge: int = 96) -> Image.Image:
    image = Image.new("L", (edge, edge), 0)
    ImageDraw.Draw(image).ellipse((30, 30, 60, 60), fill=255)
    return image


# ---- drawing -----------------------------------------------------------------------------------------------


def test_a_prompt_reaches_the_upsampler(model: UnCLIP, read: Read) -> None:
    drawn = model.sample(["pizza", "rainbow"], seed=3, output="tensor")
    assert drawn.shape == (2, 3, HIGH, HIGH) and model.sizes == (64, HIGH)
    given = read.captions[0]
    assert given is not None and torch.equal(given.tokens, model.embed_text(["pizza", "rainbow"]).tokens)
    stage, low = model.upsamplers[0], read.low[0]
    swapped = stage.sample(low, [3, 3], text=model.embed_text(["rainbow", "pizza"]))
    untold = stage.sample(low, [3, 3])
    assert min(float((other - drawn).abs().amax()) for other in (swapped, untold)) > 0.02


def test_captions_are_dealt_out_with_their_pictures(model: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures are enlarged one after another, and each still has the caption that it came with."""
    stage, text = model.upsamplers[0], model.embed_text(["pizza", "rainbow", "red apple"])
    low = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    together = stage.sample(low, [1, 2, 3], text=text)
    monkeypatch.setattr(sampling, "_PIXELS_AT_ONCE", HIGH * HIGH)
    heard: list[tuple[int, int]] = []
    apart = stage.sample(low, [1, 2, 3], callback=lambda done, total, _: heard.append((done, total)), text=text)
    assert heard == [(number, 6) for number in range(1, 7)]
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
    assert not torch.allclose(apart[1], stage.sample(low[1:2], [2], text=text[:1])[0], atol=1e-2)


def test_a_size_below_reads_nothing(model: UnCLIP, read: Read) -> None:
    model.sample("pizza", size=64)
    assert read.captions == []


def test_what_has_no_caption_gives_none(model: UnCLIP, read: Read) -> None:
    drawn = model.variations(picture(), output="tensor")
    assert read.captions == [None]
    torch.testing.assert_close(drawn, model.upsamplers[0].sample(read.low[0], [0]), atol=1e-5, rtol=0)


# ---- editing, reranking ------------------------------------------------------------------------------------


def test_inpainting_and_outpainting_hand_the_caption_on(model: UnCLIP, read: Read) -> None:
    model.inpaint(picture(), mask(), "pizza", num_images=2, keep_embedding=1, **FAST)
    assert len(read.captions) == 1 and read.is_of(model, "pizza", 2)
    read.captions.clear()
    model.outpaint(picture(), "rainbow", right=60, frame=96, **FAST)
    assert len(read.captions) > 1 and read.is_of(model, "rainbow", 1), "a frame each"
    read.captions.clear()
    model.inpaint(picture(), mask(), **FAST)
    assert read.captions == [None]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_editing_hands_the_caption_on(model: UnCLIP, read: Read, strength: float) -> None:
    drawn = model.edit(picture(), "pizza", strength=strength, num_images=2, seed=4, decoder_steps=2, output="tensor")
    assert len(read.captions) == 1 and read.is_of(model, "pizza", 2)
    assert torch.equal(drawn, read.made[0])
    if strength == 1:
        plain = model.sample("pizza", num_images=2, seed=4, decoder_steps=2, output="tensor")
        assert torch.equal(drawn, plain)


def test_editing_without_a_prompt_has_no_caption(model: UnCLIP, read: Read) -> None:
    for strength in (0.0, 0.5):
        model.edit(picture(), strength=strength, decoder_steps=2)
    assert read.captions == [None, None]


def test_the_best_are_enlarged_by_their_own_captions(model: UnCLIP, read: Read) -> None:
    assert model.scoring_size(None) == 64
    few = {"prior_steps": 1, "decoder_steps": 1, "upsampler_steps": 1}
    best = model.sample_best(["pizza", "rainbow"], num_images=3, keep=2, batch_size=2, **few)
    assert [None if one is None else one.tokens.shape[0] for one in read.captions] == [2, 2]
    for one, made in zip(best, torch.cat(read.made), strict=True):
        plain = model.sample(one.prompt, seed=one.seed, output="tensor", **few)[0]
        assert float((plain - made).abs().max()) < 1e-2  # another batch rounds otherwise
    other = model.upsamplers[0].sample(read.low[0], [one.seed for one in best[:2]], 1)
    assert float((other - read.made[0]).abs().max()) > 0.02, "without its caption it is another picture"


def test_no_caption_is_read_for_upsamplers_that_take_none(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=256)
    assert plain._read_by_upsamplers("pizza", 2) is None
    read = Read(plain, monkeypatch)
    plain.edit(picture(), "pizza", strength=0)
    assert read.captions == [None]


# ---- what holds between the parts --------------------------------------------------------------------------


def test_a_bundle_tells_its_sizes_and_parts(bundle: Path) -> None:
    names = {name: name for name in ("clip", "prior", "decoder", "upsampler_256")}
    assert bundle_sizes(bundle, names) == (64, HIGH)
    assert needed_parts(bundle, 64) == ["clip", "prior", "decoder"]
    assert needed_parts(bundle, HIGH) == needed_parts(bundle, None) == list(names)
    with pytest.raises(UsageError, match="256"):
        needed_parts(bundle, 256)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"text_dim": 40}, {}, "token features have 24 dimensions, the upsampler to 128 px takes 40"),
        ({"low": 32}, {}, "an upsampler takes 32 px, the stage before it makes 64 px"),
        (
            {},
            {"kind": "glide", "vocab_size": 514 + 200, "length": 8, "width": 16, "depth": 1, "heads": 2},
            "the upsampler to 128 px reads the CLIP's token features, the decoder glide's",
        ),
    ],
)
def test_an_upsampler_that_does_not_fit(
    tiny_parts: dict[str, Path], tmp_path: Path, changes: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    from decoder import Decoder, DecoderConfig
    from unclip.bundle import read_config, save_part
    from unclip.config import parse_config

    parts = {name: tiny_parts[name] for name in ("clip", "prior", "decoder")}
    if text:
        body = read_config(parts["decoder"], "decoder", DecoderConfig).model_dump()
        config = parse_config(DecoderConfig, {**body, "text": text})
        parts["decoder"] = tmp_path / "decoder"
        save_part(parts["decoder"], "decoder", config, Decoder(config).state_dict())
    parts["upsampler_256"] = save_captioned(tmp_path / "upsampler", captioned_config(**changes))
    folder = make_bundle(tmp_path / "bundle", parts)
    with pytest.raises(UnclipError, match=r"the parts of this model do not fit together: .*" + message):
        UnCLIP.from_pretrained(folder)


def test_upscaling_alone_takes_it_without_captions(bundle: Path, model: UnCLIP) -> None:
    system = Upscaler.from_pretrained(bundle, device="cpu")
    low = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    alone = system.upscale(low, seed=5, output="tensor")[0]
    torch.testing.assert_close(alone, model.upsamplers[0].sample(low[None], [5])[0], atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="attention; leave it out"):
        system.upscale(low, memory_limit=200)


# ---- what it becomes elsewhere -----------------------------------------------------------------------------


def test_diffusers_has_no_such_network(bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    said = "upsampler_256: it is one of DALLE2-pytorch's, which diffusers has no network for"
    with pytest.raises(UnclipError, match=said):
        export_diffusers(bundle, tmp_path / "out", parts=["upsampler_256"])
    code, _, err = run_cli("export", bundle, "--to", "diffusers", "--part", "upsampler_256", "--out", tmp_path / "out")
    assert code == 1 and said in err
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_of_the_kind_has_no_export_either(bundle: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(bundle, tmp_path / "changed")
    file = changed / "upsampler_256" / "config.json"
    unet = json.loads(file.read_text())["config"]["unet"]
    body = json.loads((changed / "decoder" / "config.json").read_text())
    own = {name: body["config"][name] for name in ("embedding_dim", "token_dim", "text_length", "diffusion")}
    body["config"] = {
        **own, "architecture": "dalle2", "version": "1.15.6", "context_dim": 8, "image_tokens": 4,
        "unet": {**unet, "low_res": False, "image_size": 64},
    }  # fmt: skip
    (changed / "decoder" / "config.json").write_text(json.dumps(body))
    with pytest.raises(UnclipError, match="decoder: it is one of DALLE2-pytorch's"):
        export_diffusers(changed, tmp_path / "out", parts=["decoder"])
    assert not (tmp_path / "out").exists()


def test_it_is_told_of(bundle: Path, run_cli: Run) -> None:
    code, out, err = run_cli("info", "--model", bundle, "--json")
    assert code == 0, err
    assert json.loads(out)["model"]["sizes"] == [64, HIGH]
