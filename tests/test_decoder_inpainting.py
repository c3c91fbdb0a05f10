"""Inpainting: random masks, the network's four additional channels, and that what is kept stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import SIZE, config, inputs, network, overfit, pictures, rand, stage, text, unit
from torch import Tensor

from decoder import Decoder, DecoderStage
from decoder.inpainting import random_known
from decoder.sampling import KIND
from decoder.train import start_from
from unclip.bundle import save_part
from unclip.errors import UnclipError, UsageError

NO = torch.zeros(2, dtype=torch.bool)


def half_mask() -> Tensor:
    """(S, S): 1 = repaint the right half."""
    mask = torch.zeros(SIZE, SIZE)
    mask[:, SIZE // 2 :] = 1
    return mask


# ---- masks -------------------------------------------------------------------------------------------------


def test_random_masks_erase_parts_and_sometimes_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    known = random_known(4000, 16, generator, everything=0.25)
    assert known.shape == (4000, 1, 16, 16) and set(known.unique().tolist()) == {0.0, 1.0}
    erased = 1 - known.mean(dim=(1, 2, 3))
    nothing_left = int((erased == 1).sum())
    assert 890 < nothing_left < 1110  # 1000, four standard deviations
    partly = erased[erased < 1]
    assert 0.1 < float(partly.mean()) < 0.6 and float((partly == 0).float().mean()) < 0.05
    assert float(partly.quantile(0.05)) < 0.08 and float(partly.quantile(0.95)) > 0.35
    # No place is spared and none is always hit, when some picture is left.
    places = 1 - known[erased < 1].mean(0)
    assert float(places.min()) > 0.08 and float(places.max()) < 0.7
    assert not random_known(50, 16, generator, everything=1.0).any()
    assert torch.equal(
        random_known(9, 16, torch.Generator().manual_seed(5)), random_known(9, 16, torch.Generator().manual_seed(5))
    )


def test_masks_are_boxes_and_strokes() -> None:
    """A box's erased rows all have the same columns; most brush tracks do not."""
    known = random_known(600, 16, torch.Generator().manual_seed(0), everything=0.0)[:, 0]
    boxes = 0
    for picture in 1 - known:
        rows, columns = picture.any(dim=1), picture.any(dim=0)
        boxes += torch.equal(picture.bool(), rows[:, None] & columns[None])
    assert 0.1 * 600 < boxes < 0.45 * 600  # half of the samples are boxes, a quarter of them a single one


# ---- network -----------------------------------------------------------------------------------------------


def test_network_sees_the_known_part_and_where_it_is() -> None:
    decoder = network(inpainting=True)
    assert decoder.unet.conv_in.weight.shape[1] == 7
    calls: list[tuple[Any, ...]] = []
    decoder.unet.register_forward_pre_hook(lambda _module, args: calls.append(args))
    condition, image, known = inputs(), rand(2, 3, SIZE, SIZE, seed=8), (1 - half_mask()).expand(2, 1, -1, -1)
    decoder(**condition, known_image=image, known=known)
    assert torch.equal(calls[0][0], torch.cat([condition["x_t"], image * known, known], dim=1))
    # What is under the mask cannot be seen.
    other = torch.where(known.bool(), image, 100.0)
    decoder(**condition, known_image=other, known=known)
    assert torch.equal(calls[0][0], calls[1][0])


@pytest.mark.parametrize("patch_size", [1, 2])
def test_inpainting_starts_from_a_plain_decoder(tmp_path: Path, patch_size: int) -> None:
    """The new channels' weights are zero: the network gives the old answer, whatever is known (GLIDE, §3.3)."""
    edge = SIZE // patch_size
    unet = {**config().unet.model_dump(), "patch_size": patch_size, "attention_resolutions": [edge]}
    source = network(unet=unet)
    save_part(tmp_path / "part", KIND, source.config, source.state_dict())
    fresh = Decoder(config(unet=unet, inpainting=True)).eval()
    start_from(fresh, tmp_path / "part")
    condition, image = inputs(), rand(2, 3, SIZE, SIZE, seed=8)
    answer = fresh(**condition, known_image=image, known=torch.ones(2, 1, SIZE, SIZE))
    assert torch.allclose(answer, source(**condition), atol=1e-6)
    loss = answer.square().sum()
    loss.backward()
    gradient = fresh.unet.conv_in.weight.grad
    assert gradient is not None and bool((gradient[:, 3 * patch_size**2 :] != 0).any())  # and they learn
    with pytest.raises(UnclipError, match="holds an inpainting decoder; a decoder that does not inpaint"):
        save_part(tmp_path / "inpainting", KIND, fresh.config, fresh.state_dict())
        start_from(Decoder(config(unet=unet)), tmp_path / "inpainting")


# ---- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "plms", "unipc"])
def test_what_is_kept_comes_out_as_given(sampler: str) -> None:
    own, image, mask = stage(inpainting=True), rand(3, 3, SIZE, SIZE, seed=8).clamp(-1, 1), half_mask()
    options: dict[str, Any] = {"inpaint_image": image, "inpaint_mask": mask, "sampler": sampler, "steps": 4}
    drawn = own.sample(unit(3, 7), [1, 2, 3], **options)
    keep = (mask == 0).expand(3, 3, -1, -1)
    assert torch.equal(drawn[keep], image[keep])
    assert not torch.allclose(drawn[~keep], image[~keep], atol=1e-2)
    again = own.sample(unit(3, 7), [1, 2, 9], **options)
    assert torch.allclose(again[:2], drawn[:2], atol=1e-4) and not torch.allclose(again[2], drawn[2], atol=1e-3)


def test_masks_of_nothing_and_of_everything() -> None:
    own, image = stage(inpainting=True), rand(2, 3, SIZE, SIZE, seed=8).clamp(-1, 1)
    z = unit(2, 7)
    kept = own.sample(z, [1, 2], inpaint_image=image, inpaint_mask=torch.zeros(SIZE, SIZE))
    assert torch.equal(kept, image)
    fresh = own.sample(z, [1, 2], inpaint_image=image, inpaint_mask=torch.ones(2, 1, SIZE, SIZE))
    assert torch.allclose(fresh, own.sample(z, [1, 2]), atol=1e-5)  # nothing is known without an image either
    one = own.sample(z, [1, 2], inpaint_image=image[0], inpaint_mask=half_mask().bool())  # one image for all
    assert torch.equal(one[1, :, :, 0], image[0, :, :, 0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inpaint_image": torch.zeros(2, 3, 4, 4)}, r"image to inpaint has shape \(2, 3, 4, 4\); .*\(2, 3, 8, 8\)"),
        ({"inpaint_image": torch.zeros(3, 3, 8, 8)}, r"shape \(3, 3, 8, 8\); .* takes \(2, 3, 8, 8\), or one"),
        ({"inpaint_image": torch.zeros(8, 8)}, r"image to inpaint has shape \(8, 8\)"),
        ({"inpaint_mask": torch.zeros(4, 4)}, r"mask has shape \(1, 1, 4, 4\), the image is 8x8; expected"),
        ({"inpaint_mask": torch.zeros(2, 3, 8, 8)}, r"mask has shape \(2, 3, 8, 8\)"),
        ({"inpaint_mask": torch.full((8, 8), 0.5)}, r"values other than 0 and 1; expected 1 = repaint, 0 = keep"),
        ({"inpaint_mask": None}, r"inpaint_mask is missing; .* 1 = repaint, 0 = keep"),
        ({"inpaint_image": None}, r"inpaint_image is missing"),
    ],
)
def test_images_and_masks_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    whole = {"inpaint_image": torch.zeros(2, 3, SIZE, SIZE), "inpaint_mask": half_mask()}
    with pytest.raises(UsageError, match=message):
        stage(inpainting=True).sample(unit(2), [0, 1], **{**whole, **changes})


def test_a_decoder_that_does_not_inpaint_says_so() -> None:
    with pytest.raises(UsageError, match=r"was not trained to inpaint; use one trained with model\.inpainting=true"):
        stage().sample(unit(1), [0], inpaint_image=torch.zeros(3, SIZE, SIZE), inpaint_mask=half_mask())


# ---- learning ----------------------------------------------------------------------------------------------


def test_the_known_part_tells_the_rest() -> None:
    """Without embedding and caption: from pure noise the erased middle is that of the picture around it."""
    diffusion = {"prediction": "x_start", "timestep_bias": 4}
    own = config(inpainting=True, mask_everything=0.1, drop_embedding=1.0, drop_text=1.0, diffusion=diffusion)
    trained, history = overfit(own, unit(4, 7), text(4), steps=100, lr=8e-3)
    assert sum(history[-10:]) / 10 < 0.35 * history[0]
    truth, mask = pictures(4), torch.zeros(SIZE, SIZE)
    mask[2:5, 2:5] = 1

    def error(stage: DecoderStage, known: Tensor) -> float:
        drawn = stage.sample(
            None, range(4), inpaint_image=known, inpaint_mask=mask, steps=1, sampler="ddim", guidance=1.0
        )
        return float((drawn - truth)[..., mask.bool()].square().mean())

    guess = float((truth - truth.mean(0))[..., mask.bool()].square().mean())  # of one who sees nothing
    assert error(trained, truth) < 0.6 * guess < error(trained, truth.flip(0))
