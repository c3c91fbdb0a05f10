"""A CLIP that goes on (`keep_embeddings`): more pictures find the place of the plain ones, which stays where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from unclip.clip import FrozenCLIP
from unclip.clip_identity import identify, same_clip
from unclip.config import DataConfig, parse_config
from unclip.data import build_batches
from unclip.errors import UsageError
from unclip.training import current
from unclip.training.clip import drift_loss, run
from unclip.training.clip_config import ClipRunConfig

MODEL = {
    "embed_dim": 16, "image_size": 32, "patch_size": 8, "context_length": 12, "vocabulary_merges": 200,
    "vision": {"width": 32, "layers": 2, "heads": 2}, "text": {"width": 32, "layers": 1, "heads": 2},
}  # fmt: skip
DATA: dict[str, Any] = {"source": "synthetic", "image_size": 32, "synthetic": {"size": 64, "max_objects": 1}}


def config(folder: Path, **body: Any) -> ClipRunConfig:
    body.setdefault("data", DATA)
    train = {
        "run_dir": str(folder), "batch_size": 32, "precision": "float32", "ema_decay": 0.5,
        "wandb": {"mode": "disabled"}, **body.pop("train"),
    }  # fmt: skip
    return parse_config(ClipRunConfig, {"model": MODEL, "train": train, **body})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keep") / "first"
    return run(config(folder, spread_weight=1.0, train={"steps": 60, "optimizer": {"lr": 3e-3}}), current())


def pictures(**changes: Any) -> dict[str, Any]:
    data = parse_config(DataConfig, {**DATA, "augment": True, "restyle": 1.0, **changes})
    return dict(next(build_batches(data, batch_size=16, seed=5)))


def test_the_plain_picture_comes_beside_the_changed_one() -> None:
    changed, both = pictures(), pictures(plain=True)
    plain = pictures(augment=False, restyle=0.0)
    assert "plain" not in changed and torch.equal(changed["image"], both["image"])
    assert torch.equal(both["plain"], plain["image"])
    assert (both["plain"] - both["image"]).abs().mean() > 0.02


class Teacher:
    """Embeds a picture by its mean colour."""

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return F.normalize(images.mean((2, 3)), dim=1)


def test_drift_is_one_minus_the_cosine() -> None:
    plain = torch.rand(4, 3, 8, 8) - 0.5
    own = F.normalize(plain.mean((2, 3)), dim=1)
    assert drift_loss(Teacher(), own, plain).abs().max() < 1e-6
    assert torch.allclose(drift_loss(Teacher(), -own, plain), torch.full((4,), 2.0))
    other = F.normalize(torch.randn(4, 3), dim=1)
    assert torch.allclose(drift_loss(Teacher(), other, plain), 1 - F.cosine_similarity(own, other))


def test_changed_pictures_come_nearer_and_plain_ones_stay(start: Path, tmp_path: Path) -> None:
    """Beside a run of the same length without the term, which goes elsewhere."""
    data = {**DATA, "augment": True}
    body = {"init_from": str(start), "data": data}
    train = {"steps": 120, "seed": 1, "optimizer": {"lr": 3e-3}, "trainable": ["visual.*"]}
    kept = run(config(tmp_path / "kept", keep_embeddings=100.0, train=train, **body), current())
    free = run(config(tmp_path / "free", train=train, **body), current())
    before, after, other = (FrozenCLIP.load(str(folder)) for folder in (start, kept, free))
    batch = pictures(plain=True, restyle=0.0)
    true = before.encode_image(batch["plain"])

    middle = true.mean(0)  # what all embeddings share says nothing

    def near(clip: FrozenCLIP, which: str) -> float:
        return float(F.cosine_similarity(clip.encode_image(batch[which]) - middle, true - middle).mean())

    assert near(after, "image") > near(before, "image")
    assert near(after, "image") > near(other, "image") and near(after, "plain") > near(other, "plain")
    # The words' tower did not learn, so that a prior's captions are what they were, and it may be used with this CLIP.
    captions = batch["caption"][:3]
    assert torch.equal(before.encode_text(captions).embedding, after.encode_text(captions).embedding)
    assert same_clip(identify(str(start)), identify(str(kept))) is None


def test_a_source_of_a_mixture_may_go_where_it_will(start: Path, tmp_path: Path) -> None:
    """With plain: false in the only source, the weights become those of a run without the term."""
    source = {"source": "synthetic", "plain": False}
    data = {**DATA, "augment": True, "sources": [source]}
    train = {"steps": 4, "seed": 1, "optimizer": {"lr": 3e-3}}
    kept = run(config(tmp_path / "kept", init_from=str(start), keep_embeddings=9.0, data=data, train=train), current())
    data = {**data, "sources": [{"source": "synthetic"}]}
    free = run(config(tmp_path / "free", init_from=str(start), data=data, train=train), current())
    own, other = (load_file(folder / "open_clip_model.safetensors") for folder in (kept, free))
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_what_does_not_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep_embeddings keeps those of the CLIP that init_from names; name one"):
        config(tmp_path, keep_embeddings=1.0, train={})
    for change in ({"horizontal_flip": True}, {"crop_size": 16}):
        with pytest.raises(UsageError, match="leave out low_column, crop_size and horizontal_flip"):
            config(tmp_path, keep_embeddings=1.0, init_from="somewhere", data={**DATA, **change}, train={})
    assert config(tmp_path, keep_embeddings=1.0, init_from="somewhere", train={}).data.plain
    assert not config(tmp_path, init_from="somewhere", train={}).data.plain
    # Without a data section, and from Python with one that is made already.
    usual = parse_config(ClipRunConfig, {"keep_embeddings": 1.0, "init_from": "somewhere"}).data
    assert usual.plain and usual.augment
    given = ClipRunConfig(keep_embeddings=1.0, init_from="somewhere", data=DataConfig(restyle=0.5)).data
    assert given.plain and given.restyle == 0.5 and not given.augment


@pytest.mark.parametrize("workers", [0, 1])
def test_worker_processes_hand_the_plain_pictures_on(workers: int) -> None:
    batch = pictures(plain=True, workers=workers)
    assert torch.equal(batch["plain"], pictures(augment=False, restyle=0.0)["image"])
