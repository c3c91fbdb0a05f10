"""One autoencoder for all parts that are on it, and large pictures in tiles."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from helpers_latent import latent_of, make_autoencoders

from unclip.autoencoder import FrozenAutoencoder, open_autoencoder, with_facts
from unclip.config import parse_config
from unclip.config_latent import LatentConfig
from unclip.errors import UnclipError, UsageError

EDGE = 32  # of a tile in pixels; the autoencoder has 2 pixels a latent's side


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_autoencoders(tmp_path_factory.mktemp("autoencoders"))


def named(name: str | Path, tile: int | None = None) -> LatentConfig:
    return parse_config(LatentConfig, {**latent_of(str(name)), "tile": tile})


def test_copies_of_one_autoencoder_are_in_memory_once(folders: dict[str, str], tmp_path: Path) -> None:
    first = open_autoencoder(named(folders["kl"]))
    copy = tmp_path / "copy"
    shutil.copytree(folders["kl"], copy)
    assert open_autoencoder(named(folders["kl"])) is first
    assert open_autoencoder(named(copy)) is first
    assert open_autoencoder(named(folders["vq"])) is not first
    assert open_autoencoder(named(folders["kl"], EDGE)) is not first  # it works otherwise
    file = copy / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    other = open_autoencoder(named(copy))
    assert other is not first
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    file.write_bytes(Path(folders["kl"], file.name).read_bytes())
    assert open_autoencoder(named(copy)) is first  # and not `other`, whose file was changed behind it


def test_it_goes_when_nobody_uses_it(folders: dict[str, str]) -> None:
    found = weakref.ref(open_autoencoder(named(folders["deep"])))
    gc.collect()
    assert found() is None


def test_tiles_agree_with_the_whole(folders: dict[str, str]) -> None:
    """To the bit where a picture is no larger than a tile; else to a third of the picture's deviation on average,
    for random weights and latents of noise: each tile has norms' statistics and attention of its own.
    """
    whole, tiled = open_autoencoder(named(folders["kl"])), open_autoencoder(named(folders["kl"], EDGE))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3 * EDGE // 2, 5 * EDGE // 4, generator=generator) * 0.5
    small = latents[..., : EDGE // 2, : EDGE // 2]
    assert torch.equal(whole.decode(small), tiled.decode(small))
    expected, found = whole.decode(latents), tiled.decode(latents)
    assert found.shape == expected.shape == (2, 3, 3 * EDGE, 5 * EDGE // 2)
    assert 0 < (found - expected).abs().mean() < expected.std() / 3
    ours, theirs = tiled.encode(expected), whole.encode(expected)
    assert ours.shape == theirs.shape and 0 < (ours - theirs).abs().mean() < theirs.std() / 3


def test_a_tile_is_kept_and_checked(folders: dict[str, str]) -> None:
    assert with_facts(LatentConfig(name=folders["kl"], tile=EDGE)) == named(folders["kl"], EDGE)
    assert named(folders["kl"]).tile is None
    with pytest.raises(UsageError, match="no multiple of 8 pixels"):
        named(folders["kl"], 20)
    with pytest.raises(UnclipError, match="is a VQModel, which takes pictures whole"):
        FrozenAutoencoder.load(folders["vq"]).in_tiles(EDGE)
