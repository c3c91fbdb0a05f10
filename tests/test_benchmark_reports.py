"""The report of all benchmarks: kept parts, budgets, and what a training step takes in memory."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import conversion, everything, peer_dalle2, training_memory
from benchmarks.timing import BUDGET, CUT, in_turns

FAKE = """
import json, os, pathlib, subprocess, sys, time
work, file = sys.argv[1], sys.argv[sys.argv.index("--json") + 1]
if work == "slow":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path("child").write_text(str(child.pid))
    time.sleep(60)
with open("log", "a") as log:
    log.write(work + "\\n")
print("budget", os.environ.get("UNCLIP_BENCHMARKS_SECONDS"))
print("cut short: 1 of 5 rounds of a, b", file=sys.stderr)
pathlib.Path(file).write_text(json.dumps({"work": work}))
sys.exit(work == "wrong")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of benchmarks that loads nothing, in the place of ours."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text(FAKE)
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    works = {name: ([name], [name, "--tiny"]) for name in ("first", "wrong", "last")}
    monkeypatch.setattr(everything, "WORKS", works)
    return tmp_path


def test_a_report_is_gone_on_with(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it holds already is kept, what failed is measured again, and so is what is asked for otherwise."""
    out = fake / "out"
    with pytest.raises(SystemExit):
        everything.main(["--out", str(out), "--only", "first", "wrong"])
    with pytest.raises(SystemExit):
        everything.main(["--out", str(out), "--budget", "20"])
    log = fake / "log"
    assert log.read_text().split() == ["first", "wrong", "wrong", "last"]
    body, text = json.loads((out / "report.json").read_text()), (out / "report.md").read_text()
    assert list(body["parts"]) == ["first", "wrong", "last"]
    assert body["parts"]["first"]["figures"] == {"work": "first"} and body["parts"]["first"]["text"] == "budget None"
    assert body["parts"]["last"]["text"] == "budget 20.0" and "first: kept" in capsys.readouterr().out
    assert "The budget cut this short: 1 of 5 rounds of a, b" in text and "## wrong" in text and "Failed: " in text
    everything.main(["--out", str(out), "--only", "first", "--again"])
    assert log.read_text().split()[4:] == ["first"]
    everything.main(["--out", str(out), "--only", "first", "--tiny"])  # another command
    assert len(log.read_text().split()) == 6
    (out / "report.json").write_text('{"parts": 3}')
    with pytest.raises(SystemExit, match="is no report of these benchmarks"):
        everything.main(["--out", str(out)])
    with pytest.raises(SystemExit):
        everything.main(["--out", str(out), "--budget", "0"])
    assert not list(out.glob(".tmp-*"))


def test_what_takes_too_long_is_ended_with_what_it_started(fake: Path) -> None:
    found = everything.run(["slow"], 0.5)
    assert found["error"] == "ended after 2 s, 3 times its budget" and found["figures"] is None
    child = Path(f"/proc/{(fake / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_budget_leaves_every_work_one_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(BUDGET, "0")
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = in_turns(works, 4, torch.device("cpu"), warm_up=1)  # type: ignore[arg-type]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 1, "b": 1} and len(order) == 4
    assert capsys.readouterr().err == f"{CUT}1 of 4 rounds of a, b\n"
    monkeypatch.setenv(BUDGET, "1e9")
    assert len(in_turns(works, 4, torch.device("cpu"))["a"]) == 4  # type: ignore[arg-type]


def test_memory_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """More with a larger batch, at least gradients and moments, and nothing of a peer that is not there."""
    monkeypatch.setattr(peer_dalle2, "INSTALLED", False)
    options = Namespace(size="tiny", device="cpu", batch=1)
    assert training_memory.step_memory("prior", "dalle2-pytorch", options) is None
    found = [
        training_memory.step_memory("upsampler", "unclip, eager float32", Namespace(size="tiny", device="cpu", batch=n))
        for n in (1, 64)
    ]
    assert found[0] is not None and found[1] is not None
    least = 3 * 4 * found[1]["parameters"] / 2**20
    assert found[1]["megabytes"] > max(least, found[0]["megabytes"] + 50)
    sizes = {training_memory.NAMES[0]: 50.0, "diffusers": 100.0}
    rows = [found[1] | {"name": name, "megabytes": size} for name, size in sizes.items()]
    text = training_memory.to_text(
        {"machine": {"processor": "p", "device": "cpu"}, "size": "tiny", "batch": 64, "rows": rows}
    )
    assert "| 100 | **50%** |" in text
    with pytest.raises(SystemExit):
        training_memory.main(["--batch", "0"])


def test_memory_of_a_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row a layout, in which what the process rose by is held against the weights; the CLIP is among them where the
    layout has one.
    """
    parts = {"prior": 2, "decoder": 6, "upsampler_256": 1}
    for name, megabytes in parts.items():
        (tmp_path / name).mkdir()
        body = {f"{n}.weight": torch.zeros(2**18) for n in range(megabytes)}
        save_file(body, tmp_path / name / "model.safetensors")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_model.safetensors").write_bytes(bytes(3 * 2**20))
    assert conversion.sizes(tmp_path, with_clip=True) == {"weights": 12, "part": 6, "tensor": 1}
    assert conversion.sizes(tmp_path, with_clip=False) == {"weights": 9, "part": 6, "tensor": 1}
    row = {"layout": "diffusers", "weights": 12.0, "part": 6.0, "tensor": 1.0, "rise": 9.0, "own": 2.0}
    text = conversion.to_text({"machine": {"processor": "p"}, "dtype": "float16", "rows": [row]})
    assert "stored float16" in text and "| 9 | **0.75** | 1.50 | 2 |" in text
    with conversion.Watch() as watch:
        held = torch.ones(16 * 2**20)  # 64 MB
        for _ in range(1000):  # the other thread may not have its turn at once
            if watch.largest > 64:
                break
            time.sleep(0.01)
    assert watch.largest > held.numel() * 4 / 2**20
    with pytest.raises(SystemExit):
        conversion.main(["--times", "0"])
