"""The recipes of the bundled model as scripts: every command could be run, on what commands before it made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers_emoji import scripts

from decoder.config import DecoderRunConfig
from prior.config import PriorRunConfig
from unclip.config import load_config
from unclip.training.clip_config import ClipRunConfig
from upsamplers.config import UpsamplerRunConfig

with scripts():
    import measure
    import prepare
    import scenes
    import teach_words

ROOT = Path(__file__).parents[1]
CONFIGS: dict[str, Any] = {
    "train_clip.py": ClipRunConfig,
    "train_prior.py": PriorRunConfig,
    "train_decoder.py": DecoderRunConfig,
    "train_upsampler.py": UpsamplerRunConfig,
}
# Each command notes its words, and makes the folder that it would leave behind.
STUBS = """
note() { printf '%s\\x1f' "$@" >> "$LOG"; printf '\\n' >> "$LOG"; }
made() {
    for word in "$@"; do
        case $word in train.run_dir=*)
            mkdir -p "${word#*=}/model"
            touch "${word#*=}/model/open_clip_config.json" ;;
        esac
        [ "${before:-}" != --out ] || mkdir -p "$word"
        before=$word
    done
}
python() { note python "$@"; made "$@"; }
deepspeed() { note deepspeed "$@"; made "$@"; }
unclip() { note unclip "$@"; made "$@"; }
export -f note made python deepspeed unclip
exec bash "$1"
"""


def commands(script: str, folder: Path) -> list[list[str]]:
    """The words of each command that the recipe gives, in their order."""
    (folder / "emoji").mkdir()
    log = folder / "log"
    start = {"SOURCE": str(folder / "emoji"), "DATA": str(folder / "data"), "RUNS": str(folder / "runs")}
    start |= {"OUT": str(folder / "model"), "START": str(folder / "start"), "LOG": str(log)}
    line = ["bash", "-c", STUBS, "stubs", str(ROOT / "examples/emoji" / script)]
    done = subprocess.run(line, env={**os.environ, **start}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def check_training(words: list[str], made: set[str]) -> str:
    """That the configuration is one, and all that it reads has been made. Returns the run's folder."""
    script = words[3]
    assert words[1:3] == ["--master_port", "29500"] and script in CONFIGS and (ROOT / script).is_file()
    config = load_config(CONFIGS[script], ROOT / value_of(words, "--config"), words[6:])
    named = [config.clip if hasattr(config, "clip") else None, *(one.source for one, _ in config.data.each())]
    missing = [name for name in named if name not in (None, *made)]
    if config.init_from is not None and not made & {config.init_from, str(Path(config.init_from).parent)}:
        missing.append(config.init_from)  # neither a model nor a part of one
    assert not missing, f"{script} reads {missing}, which nothing has made"
    return str(config.train.run_dir)


def check_data(words: list[str], made: set[str]) -> None:
    """That the example would accept its options, and that the lists of names and what it reads of a run are there."""
    program = ROOT / words[1]
    assert program.is_file()
    script = {"prepare.py": prepare, "scenes.py": scenes, "measure.py": measure, "teach_words.py": teach_words}
    if program.name in script:
        options = script[program.name].parse(words[2:])
        names = getattr(options, "names", None)
        assert not isinstance(names, Path) or (ROOT / names).is_file()
        missing = [path for name in ("decoder", "clip") if (path := getattr(options, name, None)) not in (None, *made)]
        assert not missing, f"{program.name} reads {missing}, which nothing has made"


@pytest.mark.parametrize("script", ["train.sh", "train_scenes.sh"])
def test_every_command_stands_on_what_was_made_before(script: str, tmp_path: Path) -> None:
    made = {str(tmp_path / "start")}  # a model that the test only names
    bundles = []
    for words in commands(script, tmp_path):
        if words[0] == "deepspeed":
            made.add(check_training(words, made) + "/model")
            continue
        if words[0] == "python":
            check_data(words, made)
        elif words[1] == "bundle":
            parts = {name: value_of(words, name) for name in words if name.startswith(("--clip", "--prior", "--upsam"))}
            parts["--decoder"] = value_of(words, "--decoder")
            missing = {name: path for name, path in parts.items() if not made & {path, str(Path(path).parent)}}
            assert not missing, f"the bundle takes {missing}, which nothing has made"
            bundles += [value_of(words, "--out")] if "--upsampler-1024" in parts else []
        if "--out" in words:
            made.add(value_of(words, "--out"))
    assert bundles[-1] == str(tmp_path / "model") and len(bundles) == (2 if script == "train.sh" else 1)


@pytest.mark.parametrize("script, runs", [("train.sh", 32), ("train_scenes.sh", 17)])
def test_a_run_is_gone_on_with_by_its_own_configuration_alone(script: str, runs: int, tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for words in commands(script, tmp_path):
        if words[0] == "deepspeed":
            run = next(word for word in words if word.startswith("train.run_dir="))
            file = value_of(words, "--config")
            assert files.setdefault(run, file) == file
    assert len(files) == runs
