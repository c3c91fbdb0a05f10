"""What `unclip embed --dataset` refuses: data that were changed since, and changes that cannot be stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_evaluation import write_folder
from PIL import Image

from unclip.clip import FrozenCLIP
from unclip.config import DataConfig, parse_config
from unclip.errors import UnclipError, UsageError
from unclip.precompute import Progress, embed_dataset

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: Path) -> FrozenCLIP:
    return FrozenCLIP.load(str(tiny_clip_folder))


def _data(source: Path | str, **options: Any) -> DataConfig:
    return parse_config(DataConfig, {"source": str(source), "image_size": 16, **options})


def _embed(config: DataConfig, folder: Path, clip: FrozenCLIP, out: Path, **options: Any) -> Progress:
    return embed_dataset(config, str(folder), clip, out, batch_size=4, **options)


def test_data_that_were_changed_are_refused(tiny_clip_folder: Path, clip: FrozenCLIP, tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "set", 5), tmp_path / "set" / "embedded"  # what is written changes no data
    config = _data(source)
    assert _embed(config, tiny_clip_folder, clip, out, rows=3).written == 2
    shutil.rmtree(out / "00001-00000")
    before = json.loads((out / "embeddings.json").read_text())
    (out / "embeddings.json").write_text(json.dumps({**before, "complete": False, "shards": []}))
    again = _embed(config, tiny_clip_folder, clip, out, rows=3)
    assert (again.written, again.found, again.rows) == (1, 1, 5)
    # Of a folder that an earlier version wrote nothing is known but when it was begun.
    old = {name: value for name, value in before.items() if name != "fingerprint"}
    (out / "embeddings.json").write_text(json.dumps(old))
    assert _embed(config, tiny_clip_folder, clip, out, rows=3).found == 2
    assert json.loads((out / "embeddings.json").read_text()) == before
    Image.new("RGB", (8, 8), "red").save(source / "images" / "3.png")
    refused = r"is not what it was when .* was begun \(files were added, changed or removed\); remove that folder"
    for manifest in (before, old):
        (out / "embeddings.json").write_text(json.dumps(manifest))
        with pytest.raises(UnclipError, match=refused):
            _embed(config, tiny_clip_folder, clip, out, rows=3)
        assert json.loads((out / "embeddings.json").read_text()) == manifest
    # One that holds no sample at all, which earlier versions left behind, is begun again.
    for piece in out.glob("0*"):
        (piece / "shard.json").write_text(json.dumps({"rows": 0, "captions": 0, "read": 3, "last": True}))
    (out / "embeddings.json").write_text(json.dumps({**old, "rows": 0, "captions": 0, "shards": []}))
    assert _embed(config, tiny_clip_folder, clip, out, rows=3).written == 2
    scenes = [parse_config(DataConfig, {"synthetic": {"size": 4, "max_objects": count}}) for count in (1, 2)]
    _embed(scenes[0], tiny_clip_folder, clip, tmp_path / "scenes")
    with pytest.raises(UnclipError, match=r"\(data\.synthetic is another\)"):
        _embed(scenes[1], tiny_clip_folder, clip, tmp_path / "scenes")


def test_what_cannot_be_stored_is_refused(tiny_clip_folder: Path, clip: FrozenCLIP, tmp_path: Path) -> None:
    for options, words in (
        ({"augment": True}, "data.augment changes the picture in training"),
        ({"restyle": 1.0}, "data.restyle changes"),
        ({"horizontal_flip": True}, "data.horizontal_flip changes"),
        ({"crop_size": 16}, "data.crop_size changes"),
        ({"low_column": "small"}, "no such pictures are kept"),
        ({"source": "synthetic", "sources": [{"source": "synthetic"}]}, "a mixture of several sources cannot be"),
    ):
        with pytest.raises(UsageError, match=words):
            _embed(_data(**{"source": tmp_path, **options}), tiny_clip_folder, clip, tmp_path / "out")
        assert not (tmp_path / "out").exists()
