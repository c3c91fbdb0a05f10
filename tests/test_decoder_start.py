"""A decoder run that starts from another decoder's weights (`init_from`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decoder import Decoder, DecoderConfig
from decoder.config import GlideText
from decoder.sampling import KIND
from decoder.train import start_from
from unclip.bundle import save_part
from unclip.config import DiffusionConfig
from unclip.errors import UnclipError
from unclip.nn import UNetConfig


def tiny(prediction: str, width: int = 8) -> DecoderConfig:
    unet = UNetConfig(image_size=8, model_channels=width, channel_mult=(1,), num_res_blocks=1, head_channels=8)
    diffusion = DiffusionConfig.model_validate({"prediction": prediction, "variance": "learned_range"})
    return DecoderConfig(embedding_dim=4, token_dim=4, text_length=3, context_dim=8, unet=unet, diffusion=diffusion)


def saved(config: DecoderConfig, folder: Path) -> dict[str, torch.Tensor]:
    state = {name: torch.randn_like(value) for name, value in Decoder(config).state_dict().items()}
    save_part(folder, KIND, config, state)
    return state


def test_the_same_prediction_takes_every_weight(tmp_path: Path) -> None:
    state = saved(tiny("v"), tmp_path / "part")
    network = Decoder(tiny("v"))
    start_from(network, tmp_path / "part")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_another_prediction_starts_with_a_fresh_output_layer(tmp_path: Path) -> None:
    state = saved(tiny("v"), tmp_path / "part")
    network = Decoder(tiny("x_start"))
    start_from(network, tmp_path / "part")
    for name, value in network.state_dict().items():
        if name.startswith("unet.conv_out."):
            assert not value.any()
        else:
            assert torch.equal(value, state[name])


def test_another_shape_is_refused(tmp_path: Path) -> None:
    saved(tiny("v", width=16), tmp_path / "part")
    with pytest.raises(UnclipError, match="do not fit"):
        start_from(Decoder(tiny("v")), tmp_path / "part")


READS_CAPTIONS = ("text_", "null_text", "last_token_to_time.")
GLIDE = GlideText(vocab_size=9, length=5, width=8, depth=1, heads=2)


@pytest.mark.parametrize("more", ["", "text_embedding_to_time", "text_seed"])
@pytest.mark.parametrize("to_glide", [True, False])
def test_captions_in_another_form_start_what_reads_them_anew(tmp_path: Path, to_glide: bool, more: str) -> None:
    clip = tiny("v").model_copy(update={more: True} if more else {})
    glide = clip.model_copy(update={"text": GLIDE})
    before, after = (clip, glide) if to_glide else (glide, clip)
    state = saved(before, tmp_path / "part")
    network = Decoder(after)
    fresh = {name: value.clone() for name, value in network.state_dict().items()}
    note = start_from(network, tmp_path / "part")
    assert note is not None and "what reads captions starts anew" in note and f"{before.text.kind!r}" in note
    kept = ("text_embedding_to_time.", "null_text_embedding")
    for name, value in network.state_dict().items():
        if name.startswith(kept) or not name.startswith(READS_CAPTIONS):
            assert torch.equal(value, state[name]), name
        elif name.startswith("last_token_to_time."):
            assert not value.any()
        else:
            assert torch.equal(value, fresh[name]), name


def test_a_text_transformer_of_another_size_is_refused(tmp_path: Path) -> None:
    saved(tiny("v").model_copy(update={"text": GLIDE}), tmp_path / "part")
    other = tiny("v").model_copy(update={"text": GLIDE.model_copy(update={"length": 4})})
    with pytest.raises(UnclipError, match=r"text_transformer\.positions is \(5, 8\) there and \(4, 8\) here"):
        start_from(Decoder(other), tmp_path / "part")


def test_a_hidden_layer_that_reads_the_embedding_may_be_new(tmp_path: Path) -> None:
    state = saved(tiny("v"), tmp_path / "part")
    network = Decoder(tiny("v").model_copy(update={"embedding_hidden": 6}))
    assert start_from(network, tmp_path / "part") is None
    fresh = {name for name in network.state_dict() if name not in state}
    assert fresh == {
        f"{part}.{kind}"
        for part in ("embedding_features.0", "features_to_time", "features_to_tokens")
        for kind in ("weight", "bias")
    }
    assert not network.features_to_time.weight.any() and not network.features_to_tokens.weight.any()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())


def test_what_makes_a_map_of_the_caption_may_be_new(tmp_path: Path) -> None:
    state = saved(tiny("v"), tmp_path / "part")
    network = Decoder(tiny("v").model_copy(update={"text_seed": True}))
    assert start_from(network, tmp_path / "part") is None
    assert {name.split(".")[0] for name in network.state_dict() if name not in state} == {"text_seed"}
    assert network.text_seed is not None and not network.text_seed.to_map.weight.any()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
