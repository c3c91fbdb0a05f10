"""Evaluations whose data were changed since they were begun, and what is said of the data and the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_evaluation import SIZE, evaluation, extractor, write_folder
from PIL import Image

from unclip.errors import UnclipError
from unclip.evaluation import evaluate, gallery, measure_memorisation
from unclip.evaluation import memorisation as memory
from unclip.evaluation.report import Report
from unclip.evaluation.sweeps import guidance_sweep, sweep

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty picture for each plot, since drawing them takes longer than all else."""
    for module in (gallery, memory):
        monkeypatch.setattr(module, "plot", lambda *_, **__: Image.new("RGB", (8, 8)))


def test_data_that_were_changed_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """Else the pictures of the old captions were compared with the new ones. Results may lie in the data's folder."""
    source, stages = write_folder(tmp_path / "set", 6), ("eval", "sweep", "memory")
    outs, cache = {name: source / "results" / name for name in stages}, source / "cache"
    made: list[str] = []

    def run(name: str) -> Report | None:
        asked, out = evaluation(tiny_bundle, source, 4, metrics=("clip",)), outs[name]
        given: dict[str, Any] = {"cache": cache, "told": lambda stage, _: made.append(stage)}
        if name == "eval":
            return evaluate(asked, out, **given)
        given["size"] = SIZE
        if name == "sweep":
            drawn: Any = asked.source
            return sweep(guidance_sweep([1, 3]), drawn, asked.prompts, asked.real, asked.extractor, out, **given)
        network = extractor(tiny_bundle, small=True)
        return measure_memorisation(asked.source, asked.prompts, asked.real, None, network, out, **given)

    assert run("eval") is not None
    # Of a folder that an earlier version began nothing is known but when that was.
    settings = outs["eval"] / "settings.json"
    before = json.loads(settings.read_text())
    old = {name: value for name, value in before.items() if name != "fingerprint"}
    settings.write_text(json.dumps(old))
    made.clear()
    assert run("eval") is not None and made == []  # all pieces are found, those of real pictures too
    assert json.loads(settings.read_text()) == before
    for name in stages[1:]:
        assert run(name) is not None
    captions = source / "metadata.jsonl"
    captions.write_text(captions.read_text().replace("picture", "photo"))
    refused = r"files of .*set' were added, changed or removed since .* was begun; name another folder, or remove this"
    for name in stages:
        report = (outs[name] / "report.json").read_bytes()
        with pytest.raises(UnclipError, match=refused):
            run(name)
        assert (outs[name] / "report.json").read_bytes() == report
    settings.write_text(json.dumps(old))
    os.utime(settings, (1, 1))
    with pytest.raises(UnclipError, match=refused):
        run("eval")
    settings.write_text(json.dumps({**before, "prompts": {**before["prompts"], "limit": 5}}))
    with pytest.raises(UnclipError, match=r'was begun with prompts \{"limit": 5\}, now it is \{"limit": 4\}; name'):
        run("eval")


def test_the_command_is_silent_and_checks_the_cache_first(
    run_cli: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    datasets.enable_progress_bars()
    source = write_folder(tmp_path / "set", 3)
    (tmp_path / "file").touch()
    command = ("eval", "--data", source, "--model", tiny_bundle, "--device", "cpu", "-q", "--out", tmp_path / "out")
    try:
        code, _, error = run_cli(*command, "--metrics", "clip", "--reconstructions", 0, "--cache", tmp_path / "file")
        assert code == 1 and error.startswith(f"unclip: cannot write to {tmp_path / 'file'}: "), error
        assert not (tmp_path / "out").exists()
        code, _, error = run_cli("prior-metrics", *command[1:], "--prior-steps", 2, "--batch-size", 3)
        assert code == 0 and error == ""
    finally:
        datasets.disable_progress_bars()
