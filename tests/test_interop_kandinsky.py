"""Kandinsky's prior pipelines as diffusers writes them: with their scheduler's clamp, on their CLIP's width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from safetensors.torch import load_file

from prior import DiffusionPriorStage, Prior, PriorStage
from unclip.clip import TextFeatures
from unclip.errors import UnclipError
from unclip.interop.folders import read_prior
from unclip.interop.kandinsky import CLIPS, is_kandinsky_prior, read_kandinsky_prior

DIM, LENGTH, COUNT = 40, 7, 2


@pytest.fixture(scope="module")
def theirs() -> PriorTransformer:
    torch.manual_seed(0)
    network = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        network.clip_std.abs_().add_(0.2)
    return network


@pytest.fixture
def folder(theirs: PriorTransformer, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "prior")
    UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0).save_pretrained(tmp_path / "scheduler")
    write(tmp_path / "model_index.json", {"_class_name": "KandinskyV22PriorPipeline", "prior": ["diffusers", "Prior…"]})
    write(tmp_path / "text_encoder" / "config.json", {"projection_dim": DIM})
    return tmp_path


def write(file: Path, body: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(body), encoding="utf-8")


def features(count: int, seed: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(LENGTH) < torch.arange(3, 3 + count)[:, None]
    raw = torch.randn(count, DIM, generator=generator) * 4
    tokens = torch.randn(count, LENGTH, DIM, generator=generator)
    return TextFeatures(tokens, mask, torch.nn.functional.normalize(raw, dim=1), raw.norm(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_the_prior_answers_as_theirs(theirs: PriorTransformer, folder: Path, weights: str) -> None:
    if weights == "bin":  # as Kandinsky 2.1 was published
        file = folder / "prior" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), folder / "prior" / "diffusion_pytorch_model.bin")
        file.unlink()
    config, state = read_kandinsky_prior(folder, features(1, 9))
    assert (config.embedding_dim, config.clip_range, config.steps, config.guidance) == (DIM, 10.0, 25, 4.0)
    network = Prior(config)
    network.load_state_dict(state)
    text, x, t = features(COUNT, 1), torch.randn(COUNT, DIM), torch.tensor([3, 900])
    assert text.norm is not None
    raw = text.embedding * text.norm[:, None]
    keep = torch.zeros(COUNT, dtype=torch.bool)
    found = network(x, t, text_embedding=raw, text_tokens=text.tokens, text_mask=text.mask, drop_text=keep)
    expected = theirs(x, t, raw, text.tokens, text.mask).predicted_image_embedding
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    drawn = DiffusionPriorStage(network, config).sample(text, [1, 2])
    assert drawn.shape == (COUNT, DIM) and torch.isfinite(drawn).all()


def test_init_from_takes_the_folder_too(folder: Path) -> None:
    assert is_kandinsky_prior(folder) and not is_kandinsky_prior(folder / "prior")
    assert read_prior(folder)[0].embedding_dim == DIM
    assert set(CLIPS) == {768, 1280}


def test_what_does_not_fit_has_a_sentence(folder: Path) -> None:
    write(folder / "text_encoder" / "config.json", {"projection_dim": 768})
    with pytest.raises(UnclipError, match="its CLIP makes 768 dimensions, its prior 40"):
        read_kandinsky_prior(folder)
    UnCLIPScheduler(prediction_type="epsilon").save_pretrained(folder / "scheduler")
    with pytest.raises(UnclipError, match="prediction_type 'epsilon'; expected 'sample'"):
        read_kandinsky_prior(folder)
    write(folder / "model_index.json", {"_class_name": "KandinskyV22Pipeline"})
    with pytest.raises(UnclipError, match="no prior pipeline of Kandinsky"):
        read_kandinsky_prior(folder)
    (folder / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "prior" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnclipError, match="no weights file"):
        read_prior(folder)


def test_the_command_makes_a_part(folder: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run_cli("convert", folder, "--out", tmp_path / "part")
    assert (code, out.strip()) == (0, str(tmp_path / "part")), err
    assert PriorStage.load(tmp_path / "part").config.embedding_dim == DIM
