"""`unclip runs` and `unclip plot`: how a run's state is known, also a killed one's, and what its curves look like."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from unclip.config import TrainConfig, WandbConfig
from unclip.curves import arrange, read_curves, smoothed
from unclip.errors import UnclipError
from unclip.runs import STALE_SECONDS, StatusFile, find_runs, last_row, read_rows, read_run
from unclip.training import tracking
from unclip.training.tracking import Tracker

ROOT = Path(__file__).parents[1]
Cli = Callable[..., tuple[int, str, str]]


def begun(folder: Path, **changes: Any) -> Path:
    """A run folder whose status says that this process trains there, but for `changes`."""
    folder.mkdir(parents=True, exist_ok=True)
    status = StatusFile(folder, interval=1e6, stage="prior", step=3, steps=10)
    status._stop.set()
    body = json.loads((folder / "status.json").read_text())
    process = {**body["process"], **changes.pop("process", {})}
    (folder / "status.json").write_text(json.dumps({**body, **changes, "process": process}))
    return folder


# ---- how a state is known ------------------------------------------------------------------------------------


def test_a_run_of_a_living_process_is_running(tmp_path: Path) -> None:
    assert read_run(begun(tmp_path / "a")).state == "running"
    old = begun(tmp_path / "b", updated=time.time() - 500)  # stopped, or on a disk that hangs
    assert (read_run(old).state, read_run(old).reason) == ("running", "silent for 500 s")


def test_a_run_of_a_dead_process_is_interrupted_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        born = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        folder = begun(tmp_path / "a", process={"pid": child.pid, "born": born})
        assert read_run(folder).state == "running"
        reused = begun(tmp_path / "b", process={"pid": child.pid, "born": born - 1})
        assert read_run(reused).state == "interrupted"  # another process has its number by now
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
        assert (read_run(folder).state, read_run(folder).reason) == ("interrupted", "its process is gone")
    assert read_run(folder).state == "interrupted"


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"place": "another boot"}])
def test_a_run_elsewhere_is_judged_by_its_heartbeat(elsewhere: dict[str, str], tmp_path: Path) -> None:
    folder, now = begun(tmp_path / "a", process={**elsewhere, "pid": 1}), time.time()
    assert read_run(folder, now + STALE_SECONDS - 5).state == "running"
    stale = read_run(folder, now + STALE_SECONDS + 5)
    assert stale.state == "interrupted" and stale.reason.startswith("no sign of life for 6")


def test_the_heartbeat_renews_the_status(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, interval=0.01, step=0, steps=2)
    first = read_run(tmp_path).updated
    status.update(step=1)
    end = time.monotonic() + 60
    while (read_run(tmp_path).updated == first or read_run(tmp_path).step < 1) and time.monotonic() < end:
        time.sleep(0.005)
    assert read_run(tmp_path).updated > first and read_run(tmp_path).step == 1
    status.close("finished")
    done = read_run(tmp_path)
    time.sleep(0.05)
    assert done.state == "finished" and read_run(tmp_path) == done  # no beat after the end
    assert StatusFile(tmp_path, interval=1e6)["started"] == done.started  # continued, it is as old as before


class Signalled(UnclipError):
    exit_code = 143


@pytest.mark.parametrize(
    "error, steps, expected",
    [
        (None, 2, ("finished", "")),
        (None, 3, ("interrupted", "")),
        (KeyboardInterrupt(), 3, ("interrupted", "KeyboardInterrupt")),
        (SystemExit(143), 3, ("interrupted", "143")),
        (Signalled("SIGTERM; saved"), 3, ("interrupted", "SIGTERM; saved")),
        (UnclipError("no sample can be used"), 3, ("failed", "no sample can be used")),
        (ZeroDivisionError("first\nsecond"), 3, ("failed", "first")),
    ],
)
def test_how_a_run_ended_is_told(
    error: BaseException | None, steps: int, expected: tuple[str, str], tmp_path: Path
) -> None:
    config = TrainConfig(steps=steps, wandb=WandbConfig(mode="disabled"))
    try:
        with Tracker(tmp_path, config, {}, 0, True, stage="clip") as tracker:
            for step in (1, 2):
                tracker.advance()
                tracker.log(step, {"loss": 1.0 / step, "images_per_second": 7.0})
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    run = read_run(tmp_path)
    assert (run.state, run.reason) == expected
    assert (run.stage, run.step, run.steps, run.loss, run.images_per_second) == ("clip", 2, steps, 0.5, 7.0)


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = StatusFile(tmp_path, interval=1e6, step=0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        status.write()
        status.close("finished")
    assert read_run(tmp_path).state == "running"  # as it stood before


def test_runs_of_older_versions_are_listed_too(tmp_path: Path) -> None:
    bodies = {"clip": {"vision": {}}, "prior": {"width": 8}, "decoder": {"unet": {}}, "upsampler": {"low_size": 8}}
    for stage, model in bodies.items():
        folder = tmp_path / stage
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"steps": 5}}))
        (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 0.5}\n')
    (tmp_path / "prior" / "model").mkdir()
    runs = {Path(run.path).name: run for run in find_runs(tmp_path)}
    assert {name: run.stage for name, run in runs.items()} == {stage: stage for stage in bodies}
    assert runs["prior"].state == "finished"
    assert (runs["clip"].state, runs["clip"].reason) == ("interrupted", "kept no status")


# ---- the real thing ------------------------------------------------------------------------------------------


def training(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train_prior.py", "--config", str(recipe), *overrides]
    places = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    environment = {**os.environ, **{name: str(recipe.parent / "cache") for name in places}, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_killed_run_is_seen_as_interrupted_and_goes_on_in_the_same_files(
    tmp_path: Path, tiny_clip_folder: Path, run_cli: Cli
) -> None:
    steps, run_dir = 30, tmp_path / "runs" / "prior"
    train = {"run_dir": str(run_dir), "steps": steps, "batch_size": 16, "log_every": 2, "checkpoint_every": 5}
    train |= {"sample_every": 3, "log_param_norm": True, "wandb": {"mode": "offline"}}
    body = {
        "clip": str(tiny_clip_folder),
        "clip_cache": 100,
        "statistics_batches": 1,
        "dashboard_samples": 6,
        "model": {"width": 16, "depth": 1, "heads": 2, "steps": 2},
        "data": {"source": "synthetic", "image_size": 16, "synthetic": {"size": 40}},
        "train": train,
    }
    recipe = tmp_path / "prior.yaml"
    recipe.write_text(yaml.safe_dump(body))
    victim = training(recipe)
    try:
        while not list((run_dir / "checkpoints").glob("step-*")) and victim.poll() is None:
            time.sleep(0.002)
        running = read_run(run_dir)
    finally:
        victim.send_signal(signal.SIGKILL)
    output, _ = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, output
    assert running.state == "running" and running.stage == "prior" and running.steps == steps
    code, out, _ = run_cli("runs", tmp_path / "runs", "--json")
    listed = json.loads(out)
    assert code == 0 and len(listed) == 1
    assert (listed[0]["state"], listed[0]["reason"]) == ("interrupted", "its process is gone")
    assert 4 <= listed[0]["step"] <= steps and listed[0]["bytes"] > 10_000 and listed[0]["loss"] > 0

    again = training(recipe)
    output, _ = again.communicate(timeout=900)
    assert again.returncode == 0, output
    assert f"step {steps}/{steps}  loss " in output and "MFU " in output and "GiB" in output  # no terminal, so no bar
    done = read_run(run_dir)
    assert (done.state, done.step, done.started) == ("finished", steps, running.started)
    rows = read_rows(run_dir / "metrics.jsonl")
    told = [row["step"] for row in rows]
    assert told == sorted({*range(2, steps + 1, 2), *range(3, steps + 1, 3)})  # each once, in order
    for row in rows:
        cosines = [value for key, value in row.items() if key.startswith("cos_")]
        assert len(cosines) == (6 if row["step"] % 3 == 0 else 0) and all(-1 <= value <= 1 for value in cosines)
        if row["step"] % 2 == 0:
            quartiles = [row[key] for key in ("loss_q0", "loss_q1", "loss_q2", "loss_q3") if key in row]
            assert len(quartiles) >= 3 and min(quartiles) <= row["loss"] <= max(quartiles)
            assert row["grad_norm"] > 0 and row["lr"] > 0 and row["param_norm"] > 1 and row["mfu"] > 0
    fixed = {(row["cos_text_real"], row["cos_real_unrelated"]) for row in rows if "cos_text_real" in row}
    assert len(fixed) == 1  # the same captions and pictures before and after
    identity = json.loads((run_dir / "wandb.json").read_text())["id"]
    folders = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(identity) for name in folders)

    picture = tmp_path / "curves.png"
    code, out, err = run_cli("plot", run_dir, "--out", picture)
    assert (code, out.strip(), err) == (0, str(picture), "")
    code, out, _ = run_cli("runs", tmp_path / "runs")
    assert f"prior  prior  finished  {steps}/{steps}" in out


# ---- the commands --------------------------------------------------------------------------------------------


def test_the_table_of_runs(tmp_path: Path, run_cli: Cli) -> None:
    now = time.time()
    begun(tmp_path / "x" / "one", started=now - 7300, updated=now - 200, state="failed", reason="the disk is full")
    begun(tmp_path / "two", stage="clip", steps=400, started=now - 5)
    (tmp_path / "two" / "metrics.jsonl").write_text('{"step": 200, "loss": 1.23456, "images_per_second": 1234.5}\n{"st')
    begun(tmp_path / "two" / "checkpoints" / "inner")  # what lies inside a run is no run
    code, out, err = run_cli("runs", tmp_path)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["run", "stage", "state", "step", "loss", "images/s", "age", "seen", "size"]
    assert lines[1][:6] == ["two", "clip", "running", "200/400", "1.235", "1,234.5"]
    assert lines[2][:4] == ["x/one", "prior", "failed", "3/10"] and lines[2][4:8] == ["2.0", "h", "3", "min"]
    assert out.splitlines()[2].endswith("the disk is full")
    code, out, _ = run_cli("runs", tmp_path / "two")
    assert code == 0 and out.splitlines()[1].startswith("two ")
    (tmp_path / "none").mkdir()
    assert run_cli("runs", tmp_path / "none") == (0, f"no runs in {tmp_path / 'none'}\n", "")
    assert run_cli("runs", tmp_path / "none", "--json")[1].strip() == "[]"
    code, out, err = run_cli("runs", tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert err.startswith(f"unclip: there is no folder {tmp_path / 'nowhere'}; name the one that holds your runs")


def metrics(folder: Path, scale: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 41):
            row: dict[str, Any] = {"step": step, "loss": scale / step, "lr": 1e-3, "images_per_second": 5.0}
            row |= {f"loss_q{i}": scale * (i + 1) / step for i in range(4)}
            if step % 10 == 0:
                row |= {"validation_loss": 1.1 * scale / step, "cos_text_real": 0.3, "cos_prediction_real": 0.5}
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 41, "loss": NaN}\n{"step": 42, "lo')
    return folder


def test_plots_are_pictures_with_curves(tmp_path: Path, run_cli: Cli) -> None:
    one, two = metrics(tmp_path / "a" / "prior"), metrics(tmp_path / "b" / "prior", 3.0)
    sizes = {}
    for name, arguments in {
        "all": (one,),
        "some": (one, two, "--keys", "loss,cos_*", "--smooth", "0.9", "--log"),
        "file": (one / "metrics.jsonl", "--keys", "loss_q?"),
    }.items():
        out = tmp_path / "deeper" / f"{name}.png"
        assert run_cli("plot", *arguments, "--out", out) == (0, f"{out}\n", "")
        with Image.open(out) as picture:
            sizes[name] = picture.size
            seen = picture.convert("RGB").getcolors(1 << 20)
        colours = {colour for _, colour in seen or []}
        assert (31, 119, 180) in colours  # matplotlib's first
        assert (255, 127, 14) in colours  # the second: of quartiles, cosines or runs
    assert sizes["some"][0] > 1.8 * sizes["file"][0] and sizes["all"][1] > 1.5 * sizes["some"][1]
    assert not list(tmp_path.rglob(".tmp*"))


def test_a_plot_replaces_nothing_unasked(tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run, kept = metrics(tmp_path / "run"), tmp_path / "precious.png"
    kept.write_bytes(b"precious")
    code, out, err = run_cli("plot", run, "--out", kept)
    assert (code, out, kept.read_bytes()) == (1, "", b"precious") and "exists; pass --overwrite" in err
    assert run_cli("plot", run, "--out", kept, "--overwrite") == (0, f"{kept}\n", "")
    drawn = kept.read_bytes()

    def full(_self: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    code, _, err = run_cli("plot", run, "--out", kept, "--overwrite")
    assert code == 1 and "precious.png cannot be written: No space left on device" in err
    assert kept.read_bytes() == drawn and not list(tmp_path.glob(".tmp*"))


def test_panels_hold_what_belongs_together() -> None:
    keys = ["mse", "loss", "loss_q0", "loss_q3", "lr", "validation_loss", "cos_text_real", "grad_norm", "mfu", "vb_q1"]
    assert [panel.keys for panel in arrange(keys)] == [
        ("loss", "validation_loss"),
        ("cos_text_real",),
        ("loss_q0", "loss_q3"),
        ("mse",),
        ("vb_q1",),
        ("lr",),
        ("grad_norm",),
        ("mfu",),
    ]


def test_smoothing_is_an_unbiased_running_mean() -> None:
    values = [3.0, 1.0, float("nan"), 5.0]
    expected = [3.0, (0.5 * 3 + 1) / 1.5, (0.5 * 3 + 1) / 1.5, (0.25 * 3 + 0.5 + 5) / 1.75]
    assert smoothed(values, 0.5) == pytest.approx(expected)
    assert smoothed([2.0] * 9, 0.99) == pytest.approx([2.0] * 9)


def test_curves_are_read_with_damaged_lines_left_out(tmp_path: Path) -> None:
    curves = read_curves(metrics(tmp_path / "run"))
    assert curves.points["cos_text_real"] == ([10, 20, 30, 40], [0.3] * 4)
    assert curves.points["loss"][0] == list(range(1, 42))
    assert last_row(tmp_path / "run" / "metrics.jsonl")["validation_loss"] == pytest.approx(1.1 / 40)


def test_bad_input_to_plot(tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run, empty = metrics(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "x.png"
    for arguments, code, expected in (
        ((run, "--out", tmp_path / "x.jpg"), 2, "expected a file that ends in .png"),
        ((run, "--keys", "los", "--out", out), 2, "no run has the metric 'los'; known: loss, lr, images_per_second"),
        ((empty, "--out", out), 1, f"{empty} is no run: it has no metrics.jsonl; `unclip runs FOLDER` lists"),
        ((tmp_path / "nowhere", "--out", out), 1, f"there is no run {tmp_path / 'nowhere'}"),
        ((run, "--smooth", "1.5", "--out", out), 2, "less than or equal to 0.999"),
        ((run, "--out", run / "metrics.jsonl" / "x.png"), 1, "metrics.jsonl is not a folder"),
    ):
        got, printed, err = run_cli("plot", *arguments)
        assert (got, printed) == (code, "") and expected in err and len(err.splitlines()) == 1, err
    (empty / "metrics.jsonl").write_text("")
    code, _, err = run_cli("plot", empty, "--out", out)
    assert code == 1 and "holds no metrics yet; the first are written at step train.log_every" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run_cli("plot", run, "--out", out)
    assert code == 1 and "needs the package matplotlib; install it with: pip install 'unclip[plot]'" in err
    assert not out.exists()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", TrainConfig(), {}, 0, False) as tracker, tracker.counting_flops(torch.nn.Identity()):
        tracker.advance()
        assert tracker.speed(1) == {}
        tracker.log(1, {"loss": 1.0})
        tracker.image(1, tmp_path / "none.png")
        tracker.say("nothing")
    assert not (tmp_path / "run").exists()


def test_the_stage_follows_from_the_configuration() -> None:
    from decoder.config import DecoderRunConfig
    from prior.config import PriorRunConfig
    from unclip.training.clip_config import ClipRunConfig
    from upsamplers.config import UpsamplerRunConfig

    bodies = {"prior": PriorRunConfig, "decoder": DecoderRunConfig, "upsampler": UpsamplerRunConfig}
    for stage, kind in {**bodies, "clip": ClipRunConfig}.items():
        assert tracking.stage_of(kind.model_construct()) == stage  # type: ignore[attr-defined]
