"""Weights & Biases beside a training: its files, its failures, and the id that stays."""

from __future__ import annotations

import json
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from unclip.config import TrainConfig, WandbConfig
from unclip.training.clip_config import ClipRunConfig
from unclip.training.launch import main_for
from unclip.training.wandb_run import WandbRun


def records(file: Path) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format behind a header of seven bytes."""
    body, place, parts = file.read_bytes(), 7, b""
    assert body[:4] == b":W&B"
    while place + 7 <= len(body):
        if 32768 - place % 32768 < 7:  # too little of the block is left for a header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", body[place + 4 : place + 7])
        parts += body[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield parts
            parts = b""


def history(folder: Path) -> tuple[str, dict[int, dict[str, Any]]]:
    """Run id and logged values by step of an offline run on disk."""
    from wandb.proto import wandb_internal_pb2

    identity, rows = "", dict[int, dict[str, Any]]()
    for data in records(next(folder.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.HasField("run"):
            identity = record.run.run_id
        elif record.HasField("history"):
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            rows.setdefault(items["_step"], {}).update(items)
    return identity, rows


@pytest.mark.parametrize("failing", ["missing", "init", "log"])
def test_wandb_that_fails_costs_one_warning(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the service is on holiday\nand more")

    run = SimpleNamespace(log=fail, finish=fail)
    fake = SimpleNamespace(init=fail if failing == "init" else lambda **_: run, Image=lambda *_a, **_o: None)
    monkeypatch.setitem(sys.modules, "wandb", None if failing == "missing" else fake)
    config = TrainConfig(wandb=WandbConfig(mode="offline"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = WandbRun(tmp_path, config, {})
        for step in range(3):
            told.log(step, {"loss": 1.0})
        told.image(3, "samples", tmp_path / "none.png")
        told.close()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("Weights & Biases ") and message.endswith("; the training goes on without it")
    assert failing == "missing" or ("on holiday" in message and "more" not in message)


def test_wandb_out_of_reach_is_recorded_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    logged: list[Any] = []

    def init(**options: Any) -> Any:
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise TimeoutError("no route")
        return SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda **_: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, api=SimpleNamespace(api_key="k")))
    with pytest.warns(UserWarning, match=r"could not be reached \(no route\); this run is recorded offline") as caught:
        told = WandbRun(tmp_path, TrainConfig(wandb=WandbConfig(mode="online")), {})
        told.log(5, {"loss": 2.0})
        told.close()
    assert modes == ["online", "offline"] and logged == [(5, {"loss": 2.0})] and len(caught) == 1


def test_wandb_options_and_an_id_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda *_a, **_o: None, finish=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **o: (seen.append(o), run)[1]))
    options = WandbConfig(mode="offline", project="p", name="n", tags=("a", "b"), group="g")
    for project in ("p", "p", "q"):
        config = TrainConfig(wandb=options.model_copy(update={"project": project}))
        WandbRun(tmp_path, config, {"seed": 1}, "prior").close()
    first, second, elsewhere = seen
    assert (first["project"], first["name"], first["tags"], first["group"]) == ("p", "n", ["a", "b"], "g")
    assert first["id"] == second["id"] != elsewhere["id"] and first["resume"] == "allow"
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"project": "q", "id": elsewhere["id"]}


@pytest.mark.parametrize(("said", "chosen", "mode"), [
    ("offline", "auto", "offline"), ("dryrun", "auto", "offline"), ("online", "auto", "online"),
    ("run", "auto", "online"), ("shared", "auto", "shared"), ("disabled", "auto", None), ("", "auto", "online"),
    ("disabled", "online", "online"), ("online", "offline", "offline"), ("online", "disabled", None),
])  # fmt: skip
def test_the_environment_decides_where_the_configuration_does_not(
    said: str, chosen: Any, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda *_a, **_o: None, finish=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **o: (seen.append(o), run)[1]))
    monkeypatch.setenv("WANDB_MODE", said)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    for project, expected in ((None, "theirs"), ("ours", "ours")):
        WandbRun(tmp_path, TrainConfig(wandb=WandbConfig(mode=chosen, project=project)), {}).close()
        if mode is None:
            assert not seen and not list(tmp_path.iterdir())
        else:
            assert (seen[-1]["mode"], seen[-1]["project"], "entity" in seen[-1]) == (mode, expected, False)
    monkeypatch.delenv("WANDB_PROJECT")
    WandbRun(tmp_path, TrainConfig(wandb=WandbConfig(mode=chosen)), {}).close()
    assert mode is None or seen[-1]["project"] == "unclip"


def test_a_mode_that_does_not_exist_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    monkeypatch.setenv("WANDB_MODE", "of line")
    with pytest.raises(SystemExit) as ended:
        main_for(ClipRunConfig, lambda *_: pytest.fail("started"), "", ["--config", str(file)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert "WANDB_MODE is 'of line'; expected online, offline or disabled" in told
    started: list[Any] = []
    main_for(ClipRunConfig, lambda *a: started.append(a), "", ["--config", str(file), "train.wandb.mode=offline"])
    assert started


def test_offline_files_of_wandb_hold_metrics_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    picture = tmp_path / "grid.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    told = WandbRun(tmp_path, TrainConfig(wandb=WandbConfig(mode="offline")), {"seed": 3}, "decoder")
    told.log(10, {"loss": 0.5, "loss_q0": 0.25})
    told.image(10, "samples", picture, "step 10")
    told.close()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    end = time.monotonic() + 60  # its own process writes the last records a moment after the run has ended
    while "loss" not in history(folders[0])[1].get(10, {}) and time.monotonic() < end:
        time.sleep(0.05)
    identity, rows = history(folders[0])
    assert identity == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert rows[10]["loss"] == 0.5 and rows[10]["loss_q0"] == 0.25
    assert len(list(folders[0].rglob("samples_10_*.png"))) == 1


@pytest.mark.parametrize("lost", [True, False])
def test_a_service_that_is_gone_is_not_waited_for_at_the_end(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deepspeed's launcher ends wandb's process first when it is stopped; wandb's own hook for the end would fail."""
    torn: list[int] = []

    def finish(**_: Any) -> None:
        raise ConnectionResetError("Connection lost") if lost else RuntimeError("no space")

    def teardown(code: int) -> None:
        torn.append(code)
        raise ConnectionResetError("Connection lost")

    run = SimpleNamespace(finish=finish)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, teardown=teardown))
    told = WandbRun(tmp_path, TrainConfig(wandb=WandbConfig(mode="offline")), {})
    with pytest.warns(UserWarning, match="could not be ended") as caught:
        told.close()
    assert len(caught) == 1 and torn == ([1] if lost else [])
