"""examples/emoji/teach_words.py: a map of the caption learns what that of the embedding says, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import randomised
from helpers_emoji import make_source, scripts

import unclip
from decoder.config import DecoderConfig
from decoder.network import Decoder
from decoder.sampling import KIND
from decoder.text import with_text_widths
from unclip.bundle import load_part, save_part
from unclip.clip import FrozenCLIP
from unclip.config import parse_config
from unclip.training import EmbeddingMemo

with scripts():
    import scenes
    import teach_words

UNET = {"image_size": 32, "patch_size": 2, "model_channels": 16, "channel_mult": [1, 2, 2], "num_res_blocks": 1}
CLIP = str(Path(unclip.__file__).parent / "models" / "emoji" / "clip")
PLAIN: dict[str, Any] = {"context_dim": 32, "unet": {**UNET, "attention_resolutions": [4], "head_channels": 16}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    source = make_source(folder / "emoji")
    (folder / "names").write_text("red apple\nbanana\nowl\n", encoding="utf-8")
    options = ["--source", str(source), "--names", str(folder / "names"), "--out", str(folder / "tars"), "--tidy"]
    assert scenes.main([*options, "--count", "300", "--size", "32", "--workers", "1"]) == 0
    return folder / "tars"


def saved(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A decoder whose every weight says something, as a part's folder."""
    plain = parse_config(DecoderConfig, {**PLAIN, **changes})
    widths = with_text_widths(plain, EmbeddingMemo(FrozenCLIP.load(CLIP), 0).widths)
    config = parse_config(DecoderConfig, {**plain.model_dump(), **widths})
    torch.manual_seed(0)
    state = randomised(Decoder(config)).state_dict()
    save_part(folder, KIND, config, state)
    return state


def words(folder: Path, data: Path) -> list[str]:
    given = {"decoder": folder / "part", "clip": CLIP, "data": data, "out": folder / "taught"}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*options, "--scenes", "300", "--steps", "150", "--lr", "0.01"]


@pytest.mark.parametrize("hidden", [0, 8])
def test_maps_of_captions_become_those_of_embeddings(
    hidden: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = saved(tmp_path / "part", spatial_seed=True, embedding_hidden=hidden)
    assert teach_words.main(words(tmp_path, data)) == 0
    config, after = load_part(tmp_path / "taught", KIND, DecoderConfig)
    assert config.text_seed and all(torch.equal(after[name], value) for name, value in before.items())
    network = Decoder(config)
    network.load_state_dict(after)
    embeddings, tokens, masks = teach_words.read_scenes(FrozenCLIP.load(CLIP), str(data), 200, 32)
    with torch.no_grad():
        nothing = network.embedding_map(network.null_embedding[None])
        target = network.embedding_map(embeddings * config.scale)
        assert nothing is not None and target is not None and network.text_seed is not None
        error = network.text_seed(*network.caption_context(tokens, masks)) - (target - nothing)
        assert error.square().mean() < 0.85 * target.var(0).mean()  # the same map for all captions is at 1 or above
    assert "of the variance is left" in capsys.readouterr().err


def test_a_decoder_without_a_map_of_embeddings_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "part")
    assert teach_words.main(words(tmp_path, data)) == 1
    assert "makes no map of embeddings (model.spatial_seed) to learn from" in capsys.readouterr().err
    assert not (tmp_path / "taught").exists()


def test_what_is_there_is_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taught").mkdir()
    assert teach_words.main(words(tmp_path, data)) == 1
    assert "exists already; name a new folder" in capsys.readouterr().err
