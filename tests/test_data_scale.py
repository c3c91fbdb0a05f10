"""Streams divided among ranks and workers, resumed by the same or by others, mixed, filtered and held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import build, captions, plain, write_parquet, write_shards, write_tar

from unclip.config import DataConfig, parse_config
from unclip.data.making import Maker, Making
from unclip.data.select import held_out
from unclip.data.stream import divide
from unclip.errors import UnclipError, UsageError

LENGTHS = [7, 1, 12, 3, 9]  # five shards for six parts, none alike
TOTAL = sum(LENGTHS)
EVERY = sorted(f"c{i}" for i in range(TOTAL))


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {
        "tars": write_shards(root / "tars", LENGTHS),
        "many": write_shards(root / "many", [5, 2, 8, 1, 6, 3, 7]),  # more shards than parts
        "parquet": write_parquet(root / "parquet", LENGTHS),
    }


def _config(source: Path, **options: Any) -> DataConfig:
    body = {"source": str(source), "streaming": True, "image_size": 8, "shuffle_buffer": 5, **options}
    return parse_config(DataConfig, body)


def _epochs(maker: Maker, count: int) -> list[list[str]]:
    """The captions of a part's first epochs; batches of one tell where an epoch ends."""
    result: list[list[str]] = [[] for _ in range(count)]
    while True:
        batch, state = maker.make()
        if state["epoch"] >= count:
            return result
        result[state["epoch"]] += batch["caption"]


@pytest.mark.parametrize("kind", ["tars", "many", "parquet"])
def test_three_ranks_of_two_workers_read_each_sample_once_an_epoch(sets: dict[str, Path], kind: str) -> None:
    parts = [_epochs(Maker(Making(_config(sets[kind]), 1, 6, seed=1), part), 3) for part in range(6)]
    total = 32
    for epoch in range(3):
        read = [caption for part in parts for caption in part[epoch]]
        assert sorted(read) == sorted(f"c{i}" for i in range(total))
    assert any(part[0] and part[1] and sorted(part[0]) != sorted(part[1]) for part in parts)  # dealt anew


def test_division_covers_every_row_once_and_reads_no_more_than_needed() -> None:
    for shards, parts in ((1, 1), (1, 7), (5, 6), (6, 6), (100, 6), (7, 16)):
        units = [unit for part in range(parts) for unit in divide(shards, part, parts, seed=3, epoch=2)]
        for shard in range(shards):
            for row in range(24):
                assert sum(unit.shard == shard and unit.holds(row) for unit in units) == 1
        assert all(divide(shards, part, parts, 3, 2) for part in range(parts))
        assert max(unit.step for unit in units) == max(1, -(-parts // shards))


@pytest.mark.parametrize("kind", ["tars", "many", "parquet"])
@pytest.mark.parametrize("streaming", [True, False])
def test_other_processes_finish_the_epoch_exactly(sets: dict[str, Path], kind: str, streaming: bool) -> None:
    """3 parts, then 2, then 5 in the middle of one epoch: no sample twice, none missed."""
    config = _config(sets[kind], streaming=streaming)
    read: Counter[str] = Counter()
    states: list[dict[str, Any]] | None = None
    for parts, batches, seed in ((3, 3, 1), (2, 2, 1), (5, 1, 1)):
        after = []
        for part in range(parts):
            maker = Maker(Making(config, 1, parts, seed), part)
            if states is not None:
                maker.load_states(states, None)
            state = maker.state_dict()
            for _ in range(batches + part % 2):  # unequally far
                batch, state = maker.make()
                if state["epoch"] == 0:
                    read.update(batch["caption"])
            after.append(json.loads(json.dumps(state)))
        states = after
    assert states is not None and sum(read.values()) > 12
    rest: Counter[str] = Counter()
    for part in range(4):
        maker = Maker(Making(config, 1, 4, seed=1), part)
        maker.load_states(states, None)
        if streaming:
            rest.update(_epochs(maker, 1)[0])
        else:
            while True:
                position = maker.state_dict()
                batch, state = maker.make()
                taken = state["base"] + (state["drawn"] - 1) * 4 + part
                if taken >= 32:
                    break
                rest.update(batch["caption"])
                assert position["length"] == 32
    assert sorted((read + rest).elements()) == sorted(f"c{i}" for i in range(32))


def test_workers_give_what_the_parts_give_and_resume_exactly(sets: dict[str, Path]) -> None:
    options = {"streaming": True, "shuffle_buffer": 4, "workers": 2, "horizontal_flip": True, "seed": 5}
    batches = build(sets["tars"], batch_size=3, rank=1, world_size=3, **options)
    making = Making(_config(sets["tars"], shuffle_buffer=4, horizontal_flip=True), 3, 6, 5)
    parts = [Maker(making, 2 + w) for w in range(2)]
    expected = [parts[number % 2].make()[0] for number in range(9)]
    states = []
    for wanted in expected[:5]:
        batch = next(batches)
        assert batch["caption"] == wanted["caption"] and torch.equal(batch["image"], wanted["image"])
        states.append(json.loads(json.dumps(batches.state_dict())))
    batches.load_state_dict(states[2])  # the other worker's turn
    for wanted in expected[3:]:
        batch = next(batches)
        assert batch["caption"] == wanted["caption"] and torch.equal(batch["image"], wanted["image"])


def test_a_worker_hands_its_error_on(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", {"1": {"png": b"no picture", "txt": b"x"}})
    with pytest.raises(UnclipError, match=r"no sample of the data set .* can be used: 1 broken sample"):
        next(build(source, streaming=True, workers=1))
    with pytest.raises(UnclipError, match="there is no data set at"):
        build(tmp_path / "nothing", workers=2)


def test_mixture_follows_its_weights_and_resumes(sets: dict[str, Path], tmp_path: Path) -> None:
    other = write_tar(tmp_path / "b.tar", {k: {**v, "txt": b"other"} for k, v in plain(range(11)).items()})
    sources = [{"source": str(sets["tars"]), "weight": 3}, {"source": str(other), "streaming": False}]
    options = {"sources": sources, "streaming": True, "shuffle_buffer": 6}
    batches = build(batch_size=8, **options)
    drawn, states = [], []
    for _ in range(100):
        drawn.append(captions(batches, 1))
        states.append(json.loads(json.dumps(batches.state_dict())))
    flat = [caption for batch in drawn for caption in batch]
    assert 0.18 < flat.count("other") / len(flat) < 0.32  # one in four
    own = [caption for caption in flat if caption != "other"]
    assert sorted(own[:32]) == EVERY  # each source has its own epochs
    assert drawn != [captions(build(batch_size=8, seed=1, **options), 1) for _ in range(1)]
    fresh = build(batch_size=8, **options)
    fresh.load_state_dict(states[40])
    assert [captions(fresh, 1) for _ in range(20)] == drawn[41:61]
    with pytest.raises(UnclipError, match=r"mixture of 2 sources, and data\.sources now names 3"):
        build(batch_size=8, **{**options, "sources": [*sources, {"source": "synthetic"}]}).load_state_dict(states[0])
    with pytest.raises(UnclipError, match=r"a mixture of sources and this one is read as a stream"):
        build(sets["tars"], streaming=True).load_state_dict(states[0])


def test_mixture_goes_on_with_other_processes(sets: dict[str, Path]) -> None:
    options = {"sources": [{"source": str(sets["tars"])}], "streaming": True, "shuffle_buffer": 5}
    options["sources"].append({"source": "synthetic", "streaming": False})
    shares = [build(batch_size=2, rank=rank, world_size=2, **options) for rank in range(2)]
    read = [caption for share in shares for caption in captions(share, 4)]
    states = [share.state_dict() for share in shares]
    alone = build(batch_size=1, **options)
    alone.load_state_dict(states)
    read += captions(alone, 40)
    first = [caption for caption in read if caption.startswith("c") and caption[1:].isdigit()]
    assert len(first) == len(set(first)) or sorted(set(first)) == EVERY


@pytest.mark.parametrize("streaming", [True, False])
def test_filters_leave_out_and_count(tmp_path: Path, streaming: bool) -> None:
    from helpers_data import encoded

    samples = plain(range(12), similarity=lambda i: None if i == 0 else i / 12)
    samples["00003"]["png"] = encoded(3, size=(4, 9))
    samples["00004"]["png"] = encoded(4, size=(8, 30))
    samples["00005"]["txt"] = b"a caption that is too long"
    source = write_tar(tmp_path / "a.tar", samples)
    limits = {"min_edge": 6, "max_aspect": 3, "max_caption": 10, "min_caption": 2}
    limits |= {"score_column": "json.similarity", "min_score": 0.15, "max_score": 0.9}
    batches = build(source, batch_size=5, streaming=streaming, filter=limits)
    assert set(captions(batches, 6)) == {f"c{i}" for i in (2, 6, 7, 8, 9, 10)}
    assert batches.tally.left_out == {"score": 3, "size": 1, "aspect": 1, "caption length": 1}
    report = "6 left out in the first epoch (aspect: 1; caption length: 1; score: 3; size: 1)"
    assert batches.tally.report() == report
    assert batches.tally.metrics() == {"data_left_out": 6.0}
    again = build(source, batch_size=5, streaming=streaming, filter=limits)
    again.load_state_dict(batches.state_dict())
    assert again.tally.report() == report
    with pytest.raises(UnclipError, match=r"no sample .* can be used: .*score: 12"):
        next(build(source, streaming=streaming, filter={"score_column": "json.similarity", "min_score": 2}))
    with pytest.raises(UnclipError, match="no column 'clip_score' for the score"):
        build(source, streaming=streaming, filter={"score_column": "clip_score", "min_score": 2})


def test_bad_filters_and_parts_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"filter": {"min_score": 0.3}}, "score_column does not say where"),
        ({"filter": {"score_column": "x"}}, "without min_score or max_score"),
        ({"filter": {"score_column": "x", "min_score": 1, "max_score": 0}}, "max_score 0.0 is less"),
        ({"filter": {"min_caption": 5, "max_caption": 4}}, "max_caption 4 is less"),
        ({"part": "validation"}, "holdout is 0"),
        ({"source": "x", "sources": [{"source": "y"}]}, "both source .* and sources are named"),
        ({"sources": [{"source": "y", "weight": 0}]}, "greater than 0"),
    ]
    for body, words in cases:
        with pytest.raises(UsageError, match=words):
            parse_config(DataConfig, body)


def test_held_out_samples_are_never_trained_on_however_shards_are_cut(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path / "a", [40, 20, 60]), write_shards(tmp_path / "b", [7, 63, 50])
    parts: dict[str, set[str]] = {}
    for part in ("train", "validation"):
        seen = []
        for source, streaming in ((first, True), (first, False), (second, True)):
            batches = build(source, batch_size=16, streaming=streaming, holdout=0.25, part=part)
            seen.append(set(captions(batches, 16)))
        assert seen[0] == seen[1] == seen[2]
        parts[part] = seen[0]
    assert not parts["train"] & parts["validation"]
    assert len(parts["train"] | parts["validation"]) == 120
    assert 15 < len(parts["validation"]) < 45
    share = sum(held_out(str(i), 0.01) for i in range(100_000)) / 100_000
    assert share == pytest.approx(0.01, rel=0.1)
    larger = {i for i in range(1000) if held_out(str(i), 0.2)}
    assert {i for i in range(1000) if held_out(str(i), 0.1)} < larger  # a larger share keeps the smaller


def test_without_a_key_the_content_decides(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    from helpers_data import encoded

    rows = [{"image": {"bytes": encoded(i), "path": None}, "text": f"c{i}"} for i in range(32)]
    for name, order in (("a", range(32)), ("b", range(31, -1, -1))):
        table = arrow.Table.from_pylist([rows[i] for i in order])
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    validation = [
        set(captions(build(tmp_path / f"{name}.parquet", batch_size=8, holdout=0.4, part="validation"), 9))
        for name in ("a", "b")
    ]
    assert validation[0] == validation[1] and 3 < len(validation[0]) < 25
