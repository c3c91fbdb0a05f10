"""Decoders of DALLE2-pytorch: what its releases put out for the same weights (golden files), ours puts out too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_dalle2 as h
import numpy as np
import pytest
import torch
from torch import Tensor

from decoder import Dalle2Decoder, DecoderStage
from decoder.sampling import KIND
from unclip.bundle import load_weights, save_part
from unclip.clip import TextFeatures
from unclip.errors import UnclipError
from unclip.interop.dalle2_decoder import read_dalle2_decoder
from unclip.interop.dalle2_prior import read_dalle2_prior

DATA = Path(__file__).parent / "data" / "dalle2"
CASES = [
    (file.stem.removeprefix("decoder_"), name)
    for file in sorted(DATA.glob("decoder_*.npz"))
    for name in sorted({key.split("/")[0] for key in np.load(file).files})
]
CONFIGS = {
    **h.DECODERS,
    "cosine": {**h.DECODERS["plain"], "unets": [{**h.DECODERS["plain"]["unets"][0], **h.COSINE}]},
}


def golden(version: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = np.load(DATA / f"decoder_{version}.npz")
    own = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    tables = {key.removeprefix("table/"): torch.from_numpy(own[key]) for key in own if key.startswith("table/")}
    return h.weights(json.loads(str(own["shapes"])), tables), own


def checkpoint(folder: Path, state: dict[str, Tensor], config: Any, version: str) -> Path:
    """As its trainer writes them: the average of each U-Net in a list beside the whole model, which here is another."""
    plain = {key: value + 1 if key.startswith("unets") else value for key, value in state.items()}
    ema = {
        f"{key.removeprefix('unets.').replace('.', '.ema_model.', 1)}": v
        for key, v in state.items()
        if key[:5] == "unets"
    }
    body = {"model": plain, "ema": {**ema, "0.initted": torch.tensor(True)}, "version": version, "steps": torch.ones(1)}
    torch.save({**body, "config": {"decoder": config, "data": {"batch_size": 3}}}, folder / "latest.pth")
    return folder / "latest.pth"


def conditioning() -> dict[str, Tensor]:
    tokens, mask, _ = h.caption()
    return {"image_embedding": h.image_embedding(), "text_tokens": tokens, "text_mask": mask}


@pytest.mark.parametrize(("version", "name"), CASES)
@torch.no_grad()
def test_outputs_are_those_of_the_release(tmp_path: Path, version: str, name: str) -> None:
    state, expected = golden(version, name)
    config, converted = read_dalle2_decoder(checkpoint(tmp_path, state, CONFIGS[name], version), text_length=h.TOKENS)
    network = Dalle2Decoder(config)
    network.load_state_dict(converted)
    keep = torch.zeros(h.BATCH, dtype=torch.bool)
    x = h.drawn("x_t", (h.BATCH, 3, 8, 8))
    for key, drop in (("conditional", keep), ("null", ~keep)):
        ours = network(x, h.TIMES, **conditioning(), drop_embedding=drop, drop_text=drop)
        wanted = torch.from_numpy(expected[key])
        assert wanted.std() > 0.05
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_there_are_goldens_of_every_numerics() -> None:
    versions = {version for version, _ in CASES}
    assert {"1.2.2", "1.4.2", "1.6.5", "1.15.6"} <= versions
    assert np.abs(golden("1.2.2", "laion")[1]["conditional"] - golden("1.4.2", "laion")[1]["conditional"]).max() > 1e-3
    assert np.abs(golden("1.4.2", "plain")[1]["conditional"] - golden("1.6.5", "plain")[1]["conditional"]).max() > 1e-3


def test_a_converted_decoder_is_a_part_and_samples(tmp_path: Path) -> None:
    state, _ = golden("1.15.6", "laion")
    file = checkpoint(tmp_path, state, CONFIGS["laion"], "1.15.6")
    config, converted = read_dalle2_decoder(file, text_length=h.TOKENS, steps=4)
    for key in ("unet.out.weight", "unet.out.bias"):
        converted[key] = converted[key] * 0.1  # drawn weights would ask for variances beyond every float
    save_part(tmp_path / "part", KIND, config, converted)
    stage = DecoderStage.load(tmp_path / "part")
    tokens, mask, embedding = h.caption()
    text = TextFeatures(tokens, mask, embedding, None)
    z = h.image_embedding()
    images = stage.sample(z, [1, 2, 3], text=text)
    assert images.shape == (3, 3, 8, 8) and images.abs().max() <= 1
    one = TextFeatures(tokens[1:2], mask[1:2], embedding[1:2], None)
    torch.testing.assert_close(stage.sample(z[1:2], [2], text=one)[0], images[1], atol=1e-4, rtol=1e-4)
    for other in (stage.sample(z, [1, 2, 3]), stage.sample(z.flip(0), [1, 2, 3], text=text)):
        assert not torch.allclose(images, other, atol=1e-3)
    half = DecoderStage.load(tmp_path / "part", dtype=torch.bfloat16).sample(z, [1, 2, 3], text=text)
    assert torch.isfinite(half).all()


def test_enlarging_networks_are_left_out_aloud(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """With the first network alone nothing is said; one behind it is named, whether tensors or configuration tell."""
    state, _ = golden("1.15.6", "plain")
    config = CONFIGS["plain"]
    file = checkpoint(tmp_path, state, config, "1.15.6")
    code, _, err = run_cli("convert", file, "--out", tmp_path / "alone")
    assert (code, err) == (0, "")
    behind = {name.replace("unets.0", "unets.1"): value for name, value in state.items() if name[:5] == "unets"}
    both = {**config, "unets": config["unets"] * 2, "image_sizes": [8, 32]}
    file = checkpoint(tmp_path, {**state, **behind}, both, "1.15.6")
    code, _, err = run_cli("convert", file, "--out", tmp_path / "first")
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("unclip: left out: the enlarging U-Net unets.1, to 32 px: unets.1 of ")
    assert "reads the image embedding" in err
    assert load_weights(tmp_path / "first").keys() == load_weights(tmp_path / "alone").keys()


def test_errors_have_a_sentence(tmp_path: Path) -> None:
    state, _ = golden("1.15.6", "plain")
    config = CONFIGS["plain"]
    for changes, said in (
        ({"self_cond": True}, "self-conditioning"),
        ({"combine_upsample_fmaps": True}, "combined feature maps"),
        ({"dim_mults": [1, 2, 4]}, "self_attn names 2 levels"),
        ({"num_resnet_blocks": 2}, r"does not fit its configuration: missing unet\.downs\.0\.blocks\.1"),
    ):
        unet = {**config["unets"][0], **changes}
        file = checkpoint(tmp_path, state, {**config, "unets": [unet]}, "1.15.6")
        with pytest.raises(UnclipError, match=said):
            read_dalle2_decoder(file)
    file = checkpoint(tmp_path, state, {**config, "learned_variance_constrain_frac": True}, "1.15.6")
    with pytest.raises(UnclipError, match="sigmoid"):
        read_dalle2_decoder(file)
    torch.save({"model": state, "version": "1.15.6"}, file)
    with pytest.raises(UnclipError, match="without the configuration of its run"):
        read_dalle2_decoder(file)
    with pytest.raises(UnclipError, match="holds a decoder of DALLE2-pytorch, expected a prior"):
        read_dalle2_prior(file)
    (tmp_path / "decoder_config.json").write_text(json.dumps({"decoder": config}), encoding="utf-8")
    _, found = read_dalle2_decoder(file)
    assert torch.equal(found["unet.out.bias"], state["unets.0.to_out.bias"])
    torch.save({"model": {k.replace("unets.0", "unets.1"): v for k, v in state.items()}, "version": "1.15.6"}, file)
    with pytest.raises(UnclipError, match=r"unets\.0"):
        read_dalle2_decoder(file)
