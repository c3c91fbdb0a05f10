"""Stored CLIP features: written in pieces, read without the CLIP, and a run's losses the same from either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_data import build, captions, plain, write_tar

from unclip.bundle import BUNDLED
from unclip.clip import FrozenCLIP
from unclip.clip_identity import identify, same_clip
from unclip.config import DataConfig, parse_config
from unclip.data.embeddings import describe_embeddings
from unclip.errors import UnclipError, UsageError
from unclip.precompute import Progress, embed_dataset
from unclip.training import EmbeddingMemo, open_memo

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: Path) -> FrozenCLIP:
    return FrozenCLIP.load(str(tiny_clip_folder))


def _data(source: Path, **options: Any) -> DataConfig:
    return parse_config(DataConfig, {"source": str(source), "image_size": 16, **options})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: Path, clip: FrozenCLIP) -> tuple[Path, Path]:
    """Tars of 26 samples, one broken, two captions where the number is even, and their embeddings with pictures."""
    root = tmp_path_factory.mktemp("stored")
    samples = plain(range(26), captions=lambda i: [f"a c{i}", f"b c{i}"] if i % 2 == 0 else [f"a c{i}"])
    samples["00007"]["png"] = b"broken"
    items = list(samples.items())
    write_tar(root / "tars" / "0.tar", dict(items[:15]))
    write_tar(root / "tars" / "1.tar", dict(items[15:]))
    config = _data(root / "tars", streaming=True)
    progress = _embed(config, tiny_clip_folder, clip, root / "out", rows=6, pixels=16)
    assert (progress.written, progress.rows, progress.tally.count) == (5, 25, 1)
    return root / "tars", root / "out"


def _embed(config: DataConfig, folder: Path, clip: FrozenCLIP, out: Path, **options: Any) -> Progress:
    return embed_dataset(config, str(folder), clip, out, batch_size=4, **options)


def _batch(source: Path, count: int, **options: Any) -> dict[str, Any]:
    return dict(next(build(source, batch_size=count, image_size=16, **options)))


def test_stored_features_are_the_clips(stored: tuple[Path, Path], tiny_clip_folder: Path, clip: FrozenCLIP) -> None:
    tars, out = stored
    assert describe_embeddings(_data(out)).pixels == 16  # type: ignore[union-attr]
    batch = _batch(out, 25)
    assert {text[2:] for text in batch["caption"]} == {f"c{i}" for i in range(26) if i != 7}
    direct = EmbeddingMemo(clip, 0)
    read = open_memo(_data(out), str(tiny_clip_folder), torch.device("cpu"))
    assert read.widths == direct.widths and read._clip is None
    assert torch.allclose(read.image_of(batch), direct.encode_image(batch["image"]), atol=1e-5)
    expected, found = direct.encode_text(batch["caption"]), read.text_of(batch)
    assert torch.allclose(found.embedding, expected.embedding, atol=1e-5)
    assert torch.equal(found.mask, expected.mask)
    assert torch.allclose(found.tokens, expected.tokens, atol=5e-3)  # half precision
    assert torch.allclose(found.norm, expected.norm, rtol=1e-4)  # type: ignore[arg-type]
    raw = open_memo(_data(out), str(tiny_clip_folder), torch.device("cpu"), unit_length=False)
    assert torch.allclose(raw.image_of(batch), clip.encode_image(batch["image"], unit_length=False), atol=1e-4)
    null = read.null_text()
    assert torch.allclose(null.tokens, clip.encode_text([""]).tokens, atol=1e-5)
    images = {text[2:]: image for text, image in zip(batch["caption"], batch["image"], strict=True)}
    original = _batch(tars, 25)
    for text, image in zip(original["caption"], original["image"], strict=True):
        assert torch.equal(images[text[2:]], image)
    assert {text[0] for text in captions(build(out, batch_size=25, image_size=16), 6)} == {"a", "b"}


@pytest.mark.parametrize("streaming", [True, False])
def test_stored_features_resume_and_are_held_out_like_the_images(stored: tuple[Path, Path], streaming: bool) -> None:
    tars, out = stored
    options: dict[str, Any] = {"image_size": 16, "streaming": streaming, "shuffle_buffer": 7}
    batches = build(out, batch_size=4, **options)
    states, drawn = [], []
    for _ in range(14):
        drawn.append(next(batches))
        states.append(json.loads(json.dumps(batches.state_dict())))
    assert len({text[2:] for batch in drawn[:6] for text in batch["caption"]}) == 24  # each once an epoch
    again = build(out, batch_size=4, **options)
    again.load_state_dict(states[4])
    for wanted in drawn[5:12]:
        batch = next(again)
        assert batch["caption"] == wanted["caption"] and torch.equal(batch["tokens"], wanted["tokens"])
    kept = [
        {text[2:] for text in captions(build(source, image_size=16, holdout=0.4, part="validation"), 12)}
        for source in (tars, out)
    ]
    assert kept[0] == kept[1] and 2 < len(kept[0]) < 20


def test_a_killed_embedding_goes_on(
    stored: tuple[Path, Path], tiny_clip_folder: Path, clip: FrozenCLIP, tmp_path: Path
) -> None:
    tars, whole = stored
    out, config = tmp_path / "out", _data(tars, streaming=True)
    shutil.copytree(whole, out)
    manifest = json.loads((out / "embeddings.json").read_text())
    assert manifest["complete"] and manifest["rows"] == 25 and manifest["captions"] == 38
    assert [shard["name"] for shard in manifest["shards"]] == [
        "00000-00000", "00000-00001", "00000-00002", "00001-00000", "00001-00001",
    ]  # fmt: skip
    (out / "embeddings.json").write_text(json.dumps({**manifest, "complete": False, "shards": []}))
    shutil.rmtree(out / "00000-00001")
    (out / ".tmp-half").mkdir()
    with pytest.raises(UnclipError, match="is not finished; run the `unclip embed` that began it again"):
        build(out)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("0*")}
    first = _embed(config, tiny_clip_folder, clip, out, rows=6, pixels=16, rank=1, world_size=2)
    assert (first.written, first.found) == (0, 2)
    assert not json.loads((out / "embeddings.json").read_text())["complete"]
    second = _embed(config, tiny_clip_folder, clip, out, rows=6, pixels=16, rank=0, world_size=2)
    assert (second.written, second.found) == (1, 2)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("0*") if path.name in stamps} == stamps
    assert json.loads((out / "embeddings.json").read_text()) == manifest
    for file in (whole / "00000-00001").iterdir():
        assert file.read_bytes() == (out / "00000-00001" / file.name).read_bytes()
    with pytest.raises(UnclipError, match="was begun with rows_a_piece 6, now it is 7"):
        _embed(config, tiny_clip_folder, clip, out, rows=7, pixels=16)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(UnclipError, match="holds something else than embeddings"):
        _embed(config, tiny_clip_folder, clip, tmp_path / "other")


def test_indexed_sources_and_nothing_usable(tiny_clip_folder: Path, clip: FrozenCLIP, tmp_path: Path) -> None:
    config = parse_config(DataConfig, {"source": "synthetic", "synthetic": {"size": 20}})
    progress = _embed(config, tiny_clip_folder, clip, tmp_path / "a", rows=10)
    assert (progress.written, progress.rows) == (2, 20)  # no empty piece at the end
    assert len(list((tmp_path / "a").glob("0*"))) == 2
    batch = _batch(tmp_path / "a", 20)
    assert "image" not in batch and batch["image_embedding"].shape == (20, 16)
    broken = write_tar(tmp_path / "b.tar", {"1": {"png": b"x", "txt": b"c"}})
    (tmp_path / "there").mkdir()
    for out in ("b/embedded", "there"):
        with pytest.raises(UnclipError, match=r"no sample of the data set .* can be used: 1 broken sample"):
            _embed(_data(broken), tiny_clip_folder, clip, tmp_path / out)
    assert not (tmp_path / "b").exists() and not list((tmp_path / "there").iterdir())
    # The last process was not the one that met the broken sample: it tells what the other has noted.
    pair = write_tar(tmp_path / "pair" / "0.tar", {"1": {"png": b"x", "txt": b"c"}}).parent
    write_tar(pair / "1.tar", {"2": {"png": b"x", "txt": b"c"}})
    config = _data(pair, streaming=True)
    first = _embed(config, tiny_clip_folder, clip, tmp_path / "c", rank=0, world_size=2)
    assert (first.written, first.rows) == (1, 0)
    _embed(config, tiny_clip_folder, clip, tmp_path / "d", rank=1, world_size=2)
    shutil.copytree(tmp_path / "d" / "00001-00000", tmp_path / "c" / "00001-00000")
    with pytest.raises(UnclipError, match="can be used: 1 broken sample was skipped"):
        _embed(config, tiny_clip_folder, clip, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_another_clip_is_refused(
    stored: tuple[Path, Path], tiny_clip_folder: Path, tmp_path: Path
) -> None:
    _, out = stored
    cpu = torch.device("cpu")
    with pytest.raises(UnclipError, match=r"are not of the CLIP .*: its architecture is another"):
        open_memo(_data(out), str(ROOT / "unclip" / "models" / BUNDLED / "clip"), cpu)
    from safetensors.torch import load_file, save_file

    for name, change in (("half", lambda x: x.half().float()), ("other", lambda x: x + 0.1)):
        shutil.copytree(tiny_clip_folder, tmp_path / name)
        file = tmp_path / name / "open_clip_model.safetensors"
        save_file({key: change(value).contiguous() for key, value in load_file(file).items()}, file)
    assert open_memo(_data(out), str(tmp_path / "half"), cpu).stored is not None  # as a bundle keeps it
    with pytest.raises(UnclipError, match="its architecture is the same, its weights are others"):
        open_memo(_data(out), str(tmp_path / "other"), cpu)
    assert same_clip({"name": "ViT-B-32/openai"}, {"name": "ViT-L-14/openai"}) == "they are of 'ViT-B-32/openai'"
    assert same_clip(identify(str(tiny_clip_folder)), {"name": "ViT-L-14/openai"}) is None  # not known
    with pytest.raises(UsageError, match=r"data\.sources mixes embeddings"):
        build(sources=[{"source": str(out)}, {"source": "synthetic"}], image_size=16)
    for options, words in (
        ({"image_size": 32}, "keeps pictures of 16 px and data.image_size asks for 32"),
        ({"crop_size": 8}, "data.crop_size changes the picture"),
        ({"filter": {"min_edge": 4}}, "filter when embedding"),
    ):
        with pytest.raises(UsageError, match=words):
            build(out, **{"image_size": 16, **options})


def test_damaged_folders_say_what_is_wrong(stored: tuple[Path, Path], tmp_path: Path) -> None:
    _, whole = stored

    def damaged(change: Callable[[Path], None]) -> str:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        change(out)
        with pytest.raises(UnclipError) as caught:
            next(build(out, batch_size=25, image_size=16))
        return str(caught.value)

    def overwrite(name: str, array: np.ndarray) -> Callable[[Path], None]:
        return lambda out: np.save(out / "00000-00000" / name, array)

    assert "shard 00001-00000 is missing" in damaged(lambda out: shutil.rmtree(out / "00001-00000"))
    assert "has the shape (6, 3), expected (6, 16)" in damaged(overwrite("image_embedding.npy", np.zeros((6, 3))))
    assert "has the shape (5, 16), expected (6, 16)" in damaged(overwrite("image_embedding.npy", np.zeros((5, 16))))
    assert "has format 9" in damaged(lambda out: (out / "embeddings.json").write_text('{"format": 9}'))
    assert "cannot be read" in damaged(lambda out: (out / "00000-00000" / "mask.npy").unlink())
    rows = damaged(lambda out: shutil.copy(out / "00000-00000/rows.parquet", out / "00000-00002/rows.parquet"))
    assert "names 25 samples, its rows.parquet hold" in rows
    out = tmp_path / "nan"
    shutil.copytree(whole, out)
    array = np.load(out / "00000-00000" / "image_embedding.npy")
    array[2, 3] = np.nan
    np.save(out / "00000-00000" / "image_embedding.npy", array)
    batches = build(out, batch_size=24, image_size=16)
    captions(batches, 2)
    assert batches.tally.count == 1 and "its embedding is not finite" in batches.tally.report()


def _clip_retrieval(folder: Path, counts: list[int], texts: bool = True) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rng = np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    first = 0
    for number, count in enumerate(counts):
        for name in ("img_emb", "text_emb"):
            array = rng.standard_normal((count, 16))
            array /= np.linalg.norm(array, axis=1, keepdims=True)
            if texts or name == "img_emb":
                np.save(folder / name / f"{name}_{number}.npy", array.astype(np.float16))
        rows = range(first, first + count)
        columns = {"caption": [f"a red circle {i}" for i in rows], "similarity": [i / 100 for i in rows]}
        parquet.write_table(
            arrow.table({**columns, "image_path": [f"{i}.jpg" for i in rows]}),
            folder / "metadata" / f"metadata_{number}.parquet",
        )
        first += count
    if not texts:
        (folder / "text_emb").rmdir()
    return folder


def test_clip_retrieval_layout(tmp_path: Path, tiny_clip_folder: Path, clip: FrozenCLIP) -> None:
    folder = _clip_retrieval(tmp_path / "laion", [11, *[3] * 10])  # 10 comes after 9, not after 1
    for streaming in (True, False):
        batches = build(folder, batch_size=41, streaming=streaming)
        batch = next(batches)
        assert sorted(batch["caption"]) == sorted(f"a red circle {i}" for i in range(41))
        where = {text: row for row, text in enumerate(batch["caption"])}
        last = np.load(folder / "img_emb" / "img_emb_10.npy")[2].astype(np.float32)
        assert np.array_equal(batch["image_embedding"][where["a red circle 40"]].numpy(), last)
    filtered = build(folder, batch_size=30, filter={"score_column": "similarity", "min_score": 0.11})
    assert set(captions(filtered, 1)) == {f"a red circle {i}" for i in range(11, 41)}
    cpu = torch.device("cpu")
    with_tower = open_memo(_data(folder), str(tiny_clip_folder), cpu)
    assert torch.allclose(with_tower.text_of(batch).tokens, clip.encode_text(batch["caption"]).tokens)
    without = open_memo(_data(folder), str(tiny_clip_folder), cpu, reads_tokens=False)
    assert without._clip is None
    assert torch.allclose(without.text_of(batch).embedding.norm(dim=1), torch.ones(41))
    with pytest.raises(UsageError, match=r"have unit length, and model\.embedding_length is raw"):
        open_memo(_data(folder), str(tiny_clip_folder), cpu, unit_length=False)
    with pytest.raises(UsageError, match="holds no pictures"):
        open_memo(_data(folder), str(tiny_clip_folder), cpu, reads_images=True)
    # Token features made once, image embeddings taken over.
    _embed(_data(folder), tiny_clip_folder, clip, tmp_path / "whole", rows=20)
    taken = _batch(tmp_path / "whole", 41)
    row = taken["caption"].index("a red circle 40")
    assert np.array_equal(taken["image_embedding"][row].numpy(), last)
    assert open_memo(_data(tmp_path / "whole"), str(tiny_clip_folder), cpu)._clip is None


def test_damaged_clip_retrieval_says_what_is_wrong(tmp_path: Path) -> None:
    def damaged(change: Callable[[Path], Any]) -> str:
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        _clip_retrieval(folder, [4, 3])
        change(folder)
        with pytest.raises(UnclipError) as caught:
            build(folder)
        return str(caught.value)

    wide = np.zeros((3, 9), np.float16)
    assert "is 9 wide, img_emb_0.npy is 16 wide" in damaged(lambda f: np.save(f / "img_emb/img_emb_1.npy", wide))
    short = np.zeros((2, 16), np.float16)
    assert "metadata_1.parquet has 3 rows, img_emb_1.npy has 2" in damaged(
        lambda f: [np.save(f / name / f"{name}_1.npy", short) for name in ("img_emb", "text_emb")]
    )
    assert "has the shape (2, 16), img_emb_1.npy has (3, 16)" in damaged(
        lambda f: np.save(f / "text_emb/text_emb_1.npy", short)
    )
    assert "lacks the .npy file number 1" in damaged(lambda f: (f / "text_emb/text_emb_1.npy").unlink())
    assert "holds no .npy file" in damaged(lambda f: [file.unlink() for file in (f / "img_emb").iterdir()])
    assert "is damaged" in damaged(lambda f: (f / "img_emb/img_emb_0.npy").write_bytes(b"nothing"))
    folder = _clip_retrieval(tmp_path / "nan", [6, 5])
    array = np.load(folder / "img_emb" / "img_emb_1.npy")
    array[0, 0] = np.inf
    np.save(folder / "img_emb" / "img_emb_1.npy", array)
    batches = build(folder, batch_size=10)
    assert "a red circle 6" not in captions(batches, 3)
    assert batches.tally.report() == "1 broken sample was skipped (6.jpg: its embedding is not finite)"


def test_the_command(run_cli: Run, stored: tuple[Path, Path], tiny_clip_folder: Path, tmp_path: Path) -> None:
    tars, _ = stored
    command = ("embed", "--dataset", tars, "--clip", tiny_clip_folder, "--device", "cpu")
    code, out, err = run_cli(*command, "--out", tmp_path / "e", "--set", "holdout=0.3", "--set", "image_column=png")
    assert code == 0 and out.strip() == str(tmp_path / "e"), err
    assert "left out in the first epoch (held out: 11)" in err and "1 shards written, 0 found, 15 samples" in err
    for wrong, words in (
        ((*command, "--out", tmp_path / "x.npy"), "is a file; the embeddings of a data set are a folder"),
        ((*command, "--out", tmp_path / "y", "--set", "sauce=3"), "unknown key 'sauce'; did you mean 'source'"),
        ((*command, "--out", tmp_path / "y", "--set", "image_size=32"), "--image-size says at which edge the CLIP"),
        ((*command, "--out", tmp_path / "y", "--set", "restyle=1"), "data.restyle changes the picture in training"),
        ((*command,), "name what to write"),
        (("embed", "--out", tmp_path / "z.npy"), "name either pictures or a data set"),
        ((*command, "a.png", "--out", tmp_path / "z"), "name either pictures or a data set"),
    ):
        code, _, err = run_cli(*wrong)
        assert code == 2 and words in err, err
    assert not (tmp_path / "y").exists()


def test_a_prior_trains_without_the_clip(stored: tuple[Path, Path], tiny_clip_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which tells whether open_clip was imported, from embeddings and from the images."""
    tars, out = stored
    code = """
import sys, json, yaml
from pathlib import Path
from prior.config import PriorRunConfig
from prior.train import run
from unclip.config import load_config
from unclip.training import current
for recipe in sys.argv[1:]:
    run(load_config(PriorRunConfig, recipe), current())
    print(json.dumps({"open_clip": "open_clip" in sys.modules}))
"""
    import yaml

    recipes = []
    for name, source in (("stored", out), ("images", tars)):
        train = {"run_dir": str(tmp_path / name), "steps": 4, "batch_size": 8, "log_every": 1, "checkpoint_every": 4}
        body = {
            "clip": str(tiny_clip_folder),
            "statistics_batches": 1,
            "model": {"width": 16, "depth": 1, "heads": 2, "null_text": "clip"},
            "data": {"source": str(source), "image_size": 16, "caption_column": None},
            "train": {**train, "ema_decay": 0.5, "wandb": {"mode": "disabled"}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(body))
        recipes.append(str(tmp_path / f"{name}.yaml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code, *recipes], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"open_clip"')]
    assert told == [{"open_clip": False}, {"open_clip": True}]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("stored", "images")
    ]
    assert len(losses[0]) == 4 and np.isfinite(losses[0]).all()
    from prior import PriorStage

    network = PriorStage.load(tmp_path / "stored" / "model").network
    assert float(network.clip_null_mask.sum()) > 0


def test_a_decoder_trains_from_stored_pictures(
    stored: tuple[Path, Path], tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from decoder.config import DecoderConfig, DecoderRunConfig
    from decoder.text import with_text_widths

    _, out = stored
    loaded = []
    monkeypatch.setattr(FrozenCLIP, "load", lambda *a, **o: loaded.append(a))
    memo = open_memo(_data(out), str(tiny_clip_folder), torch.device("cpu"), reads_images=True)
    model = parse_config(DecoderConfig, {"unet": {"image_size": 16, "model_channels": 8}})
    widths = with_text_widths(model, memo.widths)
    assert widths == {"embedding_dim": 16, "token_dim": 24, "text_length": 12} and not loaded
    assert DecoderRunConfig.model_fields["clip"].is_required()




@pytest.mark.parametrize("null_text", ["learned", "clip"])
def test_a_prior_without_token_features_heeds_none(null_text: str, clip: FrozenCLIP) -> None:
    from prior.config import PriorConfig
    from prior.network import Prior

    sizes = {"embedding_dim": 16, "token_dim": 24, "text_length": 12, "width": 16, "depth": 1, "heads": 2}
    torch.manual_seed(0)
    network = Prior(parse_config(PriorConfig, {**sizes, "text_tokens": False, "null_text": null_text})).eval()
    if null_text == "clip":
        network.store_null(clip.encode_text([""]), "unit")
    text = clip.encode_text(["a red circle", "two blue stars"])
    drop = torch.tensor([False, True])
    rest = {"text_embedding": text.embedding, "drop_text": drop}
    x, t = torch.randn(2, 16), torch.tensor([5, 900])
    heard = network(x, t, text_tokens=text.tokens, text_mask=text.mask, **rest)
    none = torch.zeros(2, 1, 1), torch.zeros(2, 1, dtype=torch.bool)  # what embeddings without tokens give
    assert torch.equal(heard, network(x, t, text_tokens=none[0], text_mask=none[1], **rest))
    other = network(x, t, text_tokens=none[0], text_mask=none[1], text_embedding=-text.embedding, drop_text=drop)
    assert not torch.allclose(other[0], heard[0]) and torch.equal(other[1], heard[1])
    with pytest.raises(UsageError, match="text_encoder reads the caption's tokens"):
        parse_config(PriorConfig, {"text_tokens": False, "text_encoder": {"width": 16, "depth": 1, "heads": 2}})
