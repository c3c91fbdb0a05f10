"""What newcomers type wrong or find damaged: it is never drawn as something else, and the answer says what came."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unclip
from prior.config import PriorRunConfig
from unclip.bundle import read_manifest
from unclip.cli.film import read_ends
from unclip.cli.mix import read_parts
from unclip.data.images import load_image
from unclip.errors import TOLD, UnclipError, UsageError
from unclip.inputs import SampleOptions, check_count, check_embeddings, check_prompts, check_seeds, check_size
from unclip.manipulation import Prompt
from unclip.runs import StatusFile, read_run, trainer_of
from unclip.training.distributed import current
from unclip.training.rundir import open_run

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


def test_a_pictures_name_is_never_drawn_as_a_prompt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    known, names = read_ends([str(tmp_path / "a.png"), "no. 7"], [], ["gone.png"])
    assert isinstance(known[0], Image.Image) and known[1:] == [Prompt("no. 7"), Prompt("gone.png")]
    assert names == ["a.png", "no. 7", "gone.png"]
    with pytest.raises(UnclipError, match=r"there is no image file at gone\.jpg; a prompt does not end in \.jpg"):
        read_ends(["fox", "gone.jpg"], [], [])
    long = "fox " * 100  # longer than a file's name may be
    assert read_ends([long, "owl"], [], [])[0] == [Prompt(long), Prompt("owl")]
    with pytest.raises(UsageError, match="an end is empty"):
        read_ends(["fox"], [], [" "])


@pytest.mark.parametrize("part", ["{folder}/a.png:x", "fox:0,4", "{folder}/a.png:0,6"])
def test_what_stands_behind_a_picture_or_a_comma_is_no_prompt(tmp_path: Path, part: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="is no weight; expected a number, such as"):
        read_parts([part.format(folder=tmp_path)])


def test_words_that_belong_to_no_option(run_cli: Run) -> None:
    code, _, err = run_cli("sample", "--prompt", "red", "apple")
    assert code == 2 and "extra argument(s) (apple); a prompt stands behind --prompt, in quotes if it has" in err
    code, _, err = run_cli("decode", "a.npy", "b.npy")
    assert code == 2 and "(b.npy) (see `unclip decode --help`)" in err, "a command without prompts"


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [("--seed", "-1", "greater than or equal to 0, got '-1'"), ("--guidance", "x", "as a number, got 'x'")],
)
def test_a_wrong_value_is_named(run_cli: Run, option: str, value: str, text: str) -> None:
    code, out, err = run_cli("sample", "--prompt", "pizza", option, value)
    assert (code, out) == (2, "") and text in err


def test_what_is_said_of_an_empty_text_fits_it() -> None:
    with pytest.raises(UsageError, match="prompt 1 is empty; say what the picture shows"):
        check_prompts("")
    with pytest.raises(UsageError, match="negative prompt 1 is empty; expected a word or more"):
        check_prompts("", "negative prompt")
    with pytest.raises(UsageError, match="prompt 2 is 3, not a text"):
        check_prompts(["a", 3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="there are 0 rows, expected 1 or more"):
        check_embeddings(np.zeros((0, 4), np.float32), 4)


def test_folders_in_the_place_of_files_and_models(tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match="is a folder, expected an image file"):
        load_image(tmp_path)
    for number in range(TOLD + 30):
        (tmp_path / f"{number:02d}.png").touch()
    with pytest.raises(UnclipError, match=r"\(found: 00\.png, .*07\.png and 30 more\)"):
        read_manifest(tmp_path)


def test_info_tells_of_weights_that_are_not_there(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bundle, folder)
    assert json.loads(run_cli("info", "--model", folder, "--json")[1])["model"]["parts"]["decoder"]["missing"] == []
    (folder / "decoder" / "model.safetensors").unlink()
    code, out, _ = run_cli("info", "--model", folder)
    assert code == 0 and "cannot be used: model.safetensors is missing" in out and "0.00 M" not in out
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "decoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "prior" / "model.safetensors").rename(folder / "decoder" / "model-1.safetensors")
    parts = json.loads(run_cli("info", "--model", folder, "--json")[1])["model"]["parts"]
    assert parts["decoder"]["missing"] == ["model-2.safetensors"] and parts["prior"]["missing"] == ["model.safetensors"]


def test_a_sheets_prompt_stands_in_one_of_two_places(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    common = ["--model", tiny_bundle, "--size", 64, "--scales", 1]
    assert run_cli("guidance-sheet", "pizza", *common, "--out", tmp_path / "a.png")[0] == 0
    assert run_cli("guidance-sheet", "--prompt", "pizza", *common, "--out", tmp_path / "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for given, number in (((), 0), (("pizza", "-p", "fox"), 2)):
        code, _, err = run_cli("guidance-sheet", *given, *common)
        assert code == 2 and f"a sheet is of one prompt, got {number}; name one" in err


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """Each would take back the other's lines and checkpoints."""
    config = PriorRunConfig.model_validate({"clip": "x", "model": {"width": 32, "heads": 2}})
    script = "import sys, pathlib, unclip.runs; unclip.runs.StatusFile(pathlib.Path(sys.argv[1])); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as other:
        try:
            while read_run(tmp_path).state != "running":
                assert other.poll() is None
                time.sleep(0.05)
            with pytest.raises(UnclipError, match=rf"process {other.pid} on .* trains in .* already; let it end"):
                open_run(tmp_path, config, config.train, current())
            assert not (tmp_path / "config.yaml").exists() and read_run(tmp_path).state == "running"
        finally:
            other.kill()
    open_run(tmp_path, config, config.train, current())
    StatusFile(tmp_path, stage="prior")  # this process's own
    open_run(tmp_path, config, config.train, current())


def test_a_process_out_of_sight_lives_while_it_writes(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, interval=1e6)
    body = json.loads((tmp_path / "status.json").read_text())
    elsewhere = {**body, "process": {**body["process"], "host": "node7", "pid": 41}}

    def heard(updated: float) -> None:
        (tmp_path / "later").write_text(json.dumps({**elsewhere, "updated": updated}))
        (tmp_path / "later").replace(tmp_path / "status.json")

    heard(time.time())
    assert trainer_of(tmp_path, patience=0.2) is None, "killed a moment ago"
    beat = threading.Timer(0.1, heard, [time.time() + 1])
    beat.start()
    assert trainer_of(tmp_path, patience=30) == "process 41 on node7"
    beat.join()
    heard(time.time() - 500)
    assert trainer_of(tmp_path, patience=30) is None, "nothing to wait for"
    status.close("finished")
    assert trainer_of(tmp_path) is None


def test_values_of_a_wrong_type_are_told_apart_from_wrong_values() -> None:
    with pytest.raises(UsageError, match="guidance is '3', expected a number of 0 or more"):
        SampleOptions(guidance="3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="size '64' cannot be made by this model; it makes 64, 256"):
        check_size("64", (64, 256))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"num_images is 2\.0, expected a whole number"):
        check_count(2.0)  # type: ignore[arg-type]
    for wrong in (1.5, "7", None, [1.5, 2]):
        with pytest.raises(UsageError, match="expected a whole number, or one a sample"):
            check_seeds(wrong, 2)  # type: ignore[arg-type]
    assert check_seeds(np.int64(3), 2) == [3, 3]  # type: ignore[arg-type]
    assert check_seeds(np.arange(2), 2) == [0, 1]  # type: ignore[arg-type]
    assert check_seeds(range(4, 6), 2) == [4, 5]


def test_completion_shows_what_is_not_loaded_yet() -> None:
    assert set(unclip.__all__) <= set(dir(unclip))
