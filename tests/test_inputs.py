"""What a caller hands to a model: one picture in any form is one picture, and what cannot be meant is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import UnCLIP, UnclipError, UsageError
from unclip.upscaling import Upscaler, pictures_from


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=64)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 wide and 16 high once it is turned as its EXIF data say; the CLIP sees 16 × 16."""
    values = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("pictures") / "turned.png"
    Image.fromarray(values).save(path, exif=exif)
    return path


def forms(file: Path) -> dict[str, Any]:
    opened = Image.open(file)
    opened.load()
    values = np.rot90(np.asarray(opened), -1).copy()
    eight = torch.from_numpy(values).permute(2, 0, 1)
    opaque = np.concatenate([values, np.full_like(values[..., :1], 255)], axis=2)
    return {
        "pil": opened,
        "array": values,
        "array with alpha": opaque,
        "8 bits": eight,
        "floats": eight.float() / 127.5 - 1,
        "a batch": (eight.float() / 127.5 - 1)[None],
    }


def test_a_picture_is_the_same_in_every_form(model: UnCLIP, file: Path) -> None:
    wanted = model.embed_image(file)
    for name, given in forms(file).items():
        torch.testing.assert_close(model.embed_image(given), wanted, atol=1e-5, rtol=0, msg=name)
    (known,) = pictures_from(file)
    for name, given in forms(file).items():
        (one,) = pictures_from(given)
        if isinstance(one, torch.Tensor):
            one = Image.fromarray(((one + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
        assert (one.size, one.tobytes()) == ((24, 16), known.tobytes()), name


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.full((3, 8, 8), 200.0), r"values up to 200; expected floats in \[-1, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"values up to nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"an image tensor of torch.int64"),
        (torch.zeros(1, 8, 8), r"shape \(1, 8, 8\)"),
        (np.zeros((8, 8, 3)), r"an image array of float64 and shape \(8, 8, 3\); expected 8 bits"),
        (np.zeros((8, 8, 2), np.uint8), r"expected 8 bits and \(H, W, 3\)"),
        (b"bytes", "an image of type bytes"),
        (None, "an image of type NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(model: UnCLIP, given: Any, message: str) -> None:
    for use in (model.embed_image, model.variations):
        with pytest.raises(UsageError, match=message):
            use(given)


def test_a_form_of_output_that_there_is_not(model: UnCLIP, file: Path) -> None:
    embedding = model.embed_image(file)
    calls: list[Any] = [
        lambda **o: model.sample("pizza", **o),
        lambda **o: model.variations(file, **o),
        lambda **o: model.decode(embedding, **o),
        lambda **o: model.mix(prompts=[("pizza", 1.0)], **o),
        lambda **o: model.edit(file, "pizza", **o),
        lambda **o: model.inpaint(file, np.eye(16, 24), "pizza", **o),
        lambda **o: model.outpaint(file, right=8, **o),
        lambda **o: model.interpolate(["pizza", "rainbow"], **o),
        lambda **o: model.text_diff(file, "pizza", **o),
        lambda **o: model.upscale(file, **o),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"output is 'np'; expected 'pil' or 'tensor'"):
            call(output="np")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_interval": 3}, r"guidance_interval is 3, expected two fractions"),
        ({"guidance_interval": ("a", "b")}, r"guidance_interval is \('a', 'b'\), expected two fractions"),
        ({"guidance_rescale": "x"}, r"guidance_rescale is 'x', expected 0"),
        ({"memory_limit": "x"}, r"memory_limit is 'x', expected a number of MiB"),
        ({"negative_prompt": 3}, r"the negative prompt is 3, not a text"),
    ],
)
def test_options_of_another_type_are_refused(model: UnCLIP, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.sample("pizza", size=64, **options)


def test_prompts_and_precisions_of_another_type_are_refused(model: UnCLIP, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="the prompt is None, not a text"):
        model.sample(None)  # type: ignore[call-overload]
    for dtype in ("float16", torch.int8):
        for load in (UnCLIP.from_pretrained, Upscaler.from_pretrained):
            with pytest.raises(UsageError, match=r"expected torch.float32, torch.bfloat16 or torch.float16"):
                load(tiny_bundle, device="cpu", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler_256"])
def test_what_damaged_weights_make_is_not_drawn(stage: str, tiny_bundle: Path, file: Path) -> None:
    model = UnCLIP.from_pretrained(tiny_bundle, device="cpu")
    own = {"clip": model.clip.model, "prior": model.prior and model.prior.network, "decoder": model.decoder.network}
    network = own.get(stage) or model.upsamplers[0].network
    stage = stage if stage in own else f"upsampler_{model.upsamplers[0].config.high_size}"
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(UnclipError, match=f"the {stage} made NaN or infinite values; its weights are damaged"):
        model.variations(file) if stage == "clip" else model.sample("pizza")
    if stage == "clip":
        with pytest.raises(UnclipError, match="the clip made NaN"):
            model.embed_image(file)
