"""Bad input on the command line: one sentence on stderr, nothing on stdout, the right exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_bundle import make_bundle, make_parts
from PIL import Image

from unclip.pipeline import UnCLIP

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fails(run_cli: Run) -> Callable[..., str]:
    """Run a command that must fail with `code`, in one line that starts with `unclip: `; returns it."""

    def run(code: int, *arguments: object) -> str:
        got, out, err = run_cli(*arguments)
        assert (got, out) == (code, ""), err
        assert err.startswith("unclip: ") and err.count("\n") == 1, err
        return err

    return run


Fails = Callable[..., str]


# ---- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt(fails: Fails, tiny_bundle: Path, prompt: str) -> None:
    message = fails(2, "sample", "--prompt", "pizza", "--prompt", prompt, "--model", tiny_bundle)
    assert "prompt 2 is empty" in message


def test_no_prompt(fails: Fails) -> None:
    assert "no prompt given; pass --prompt 'pizza' or --prompts-file" in fails(2, "sample")


def test_a_prompt_that_is_no_text(fails: Fails, tiny_bundle: Path, tmp_path: Path) -> None:
    message = fails(2, "sample", "-p", "caf\udce9", "--size", 64, "--model", tiny_bundle, "--out", tmp_path)
    assert "not valid UTF-8" in message


def test_prompts_files(fails: Fails, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    assert "cannot be read: No such file" in fails(1, "sample", "--prompts-file", file)
    assert "cannot be read: Is a directory" in fails(1, "sample", "--prompts-file", tmp_path)
    file.write_text("\n# nothing\n\n")
    assert "holds no prompt; expected one a line" in fails(1, "sample", "--prompts-file", file)
    file.write_bytes(b"\xff\xfe\x00pizza")
    assert "is not UTF-8 text" in fails(1, "sample", "--prompts-file", file)


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "texts"),
    [
        ("--size", "100", ["size 100 cannot be made by this model; it makes 64, 256, 1024"]),
        ("--size", "big", ["'big'", "64, 256 and 1024"]),
        ("--dtype", "float8", ["'float8' is not one of 'float32', 'bfloat16', 'float16'"]),
        ("--device", "tpu", ["unknown device 'tpu'; possible: auto, cpu, cuda, cuda:N"]),
        ("--num-images", "0", ["--num-images"]),
        ("--seed", "-1", ["--seed"]),
        ("--guidance", "nan", ["guidance"]),
        ("--decoder-steps", "0", ["--decoder-steps"]),
        ("--decoder-steps", "5000", ["5000 sampling steps", "1 to 1000 are possible"]),
        ("--colour", "red", ["no such option: --colour", "unclip sample --help"]),
    ],
)
def test_wrong_options(
    fails: Fails, tiny_bundle: Path, tmp_path: Path, option: str, value: str, texts: list[str]
) -> None:
    size = [] if option == "--size" else ["--size", 64]
    command = ["sample", "-p", "pizza", "--model", tiny_bundle, "--out", tmp_path / "o", *size]
    message = fails(2, *command, option, value)
    assert all(text in message for text in texts), message
    assert not (tmp_path / "o").exists()


def test_unknown_command(fails: Fails) -> None:
    assert "no such command 'smaple'" in fails(2, "smaple")


def test_no_cuda(fails: Fails, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["sample", "-p", "pizza", "--model", tiny_bundle, "--device"]
    assert "there is no CUDA device here" in fails(1, *command, "cuda")
    assert "there is no CUDA device here" in fails(1, *command, "cuda:7")


# ---- models ------------------------------------------------------------------------------------------------


def test_unknown_and_incomplete_models(fails: Fails, tiny_bundle: Path, tmp_path: Path) -> None:
    command = ["sample", "-p", "pizza", "--model"]
    message = fails(1, *command, tmp_path / "nowhere")
    assert "no model folder at" in message and "unclip.json" in message
    (tmp_path / "letter.txt").write_text("dear")
    message = fails(1, *command, tmp_path)
    assert "unclip.json is missing (found: letter.txt); `unclip bundle` makes one" in message
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    shutil.rmtree(broken / "decoder")
    message = fails(1, *command, broken)
    assert "part 'decoder' is missing (present: clip, prior, upsampler_256, upsampler_1024)" in message


def test_a_damaged_model(fails: Fails, tiny_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    weights = broken / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = fails(1, "sample", "-p", "pizza", "--size", 64, "--model", broken)
    assert "prior/model.safetensors is damaged or not a safetensors file" in message
    (broken / "unclip.json").write_text("{")
    assert "unclip.json cannot be read as JSON" in fails(1, "sample", "-p", "pizza", "--model", broken)


def test_a_manifest_that_points_outside(fails: Fails, tiny_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    manifest = json.loads((broken / "unclip.json").read_text())
    manifest["parts"]["decoder"] = "../elsewhere"
    (broken / "unclip.json").write_text(json.dumps(manifest))
    message = fails(1, "sample", "-p", "pizza", "--model", broken)
    assert "points part 'decoder' outside the bundle" in message


def test_parts_that_do_not_fit(fails: Fails, tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    foreign = make_parts(tmp_path / "parts", tiny_parts["clip"], embedding_dim=8)
    folder = make_bundle(tmp_path / "b", {**tiny_parts, "decoder": foreign["decoder"]})
    message = fails(1, "sample", "-p", "pizza", "--model", folder)
    assert "do not fit together: the CLIP's embeddings have 16 dimensions, the decoder takes 8" in message
    options = ["--clip", tiny_parts["clip"], "--decoder", foreign["decoder"]]
    message = fails(1, "bundle", "--out", tmp_path / "c", *options)
    assert "the decoder takes 8" in message and not (tmp_path / "c").exists()


def test_info_tells_the_rest_without_a_model(run_cli: Run, tmp_path: Path) -> None:
    code, out, err = run_cli("info", "--json", "--model", tmp_path / "nowhere")
    assert code == 1 and json.loads(out)["model"] is None and "no model folder" in err


# ---- pictures and embeddings -------------------------------------------------------------------------------


def test_images_that_are_none(
    fails: Fails, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ["--model", tiny_bundle, "--out"]
    text, bomb, out = tmp_path / "text.png", tmp_path / "bomb.png", tmp_path / "e.npy"
    text.write_text("not a picture")
    Image.new("1", (200, 200)).save(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    for command, target in (("variations", tmp_path / "o"), ("embed", out)):
        assert "text.png is not an image" in fails(1, command, text, *model, target)
        assert "there is no image file at" in fails(1, command, tmp_path / "none.png", *model, target)
        assert "possible decompression bomb" in fails(1, command, bomb, *model, target)
    assert not out.exists() and not (tmp_path / "o").exists()


def save_pickled(file: Path) -> None:
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (save_pickled, "holds pickled Python objects, which are never loaded"),
        (
            lambda file: file.write_bytes(b"\x80\x04\x95"),
            "is not a .npy file; expected one array written by numpy.save",
        ),
        (lambda file: file.write_bytes(b""), "is not a .npy file"),
        (lambda file: np.savez(file.open("wb"), a=np.ones(3)), "is a .npz archive"),
        (lambda file: file.write_bytes(b"\x93NUMPY\x01\x00v\x00{garbage"), "is damaged or empty"),
        (lambda file: np.save(file, np.ones((2, 8))), "shape (2, 8); this model takes (count, 16)"),
        (
            lambda file: np.save(file, np.ones((2, 3, 16))),
            "float64 of shape (2, 3, 16); expected floats of shape (N, E)",
        ),
        (
            lambda file: np.save(file, np.ones((2, 16), dtype=np.int8)),
            "int8 of shape (2, 16); expected floats",
        ),
        (
            lambda file: np.save(file, np.full((2, 16), np.nan)),
            "embedding 0 holds NaN or infinity (2 of 2 do)",
        ),
        (lambda file: np.save(file, np.zeros((1, 16))), "all zeros"),
    ],
)
def test_embeddings_that_are_none(
    fails: Fails, tiny_bundle: Path, tmp_path: Path, write: Callable[[Path], Any], text: str
) -> None:
    file = tmp_path / "e.npy"
    write(file)
    command = ["decode", file, "--size", 64, "--model", tiny_bundle, "--out", tmp_path / "o"]
    assert text in fails(2, *command)
    assert not (tmp_path / "o").exists()


def test_no_embeddings(fails: Fails, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in fails(1, "decode", tmp_path / "none.npy")


# ---- output ------------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written(fails: Fails, tiny_bundle: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file, so nothing can lie below it")
    command = ["sample", "-p", "pizza", "--size", 64, "--model", tiny_bundle, "--out"]
    message = fails(1, *command, blocker / "below")
    assert f"cannot write to {blocker / 'below'}: {blocker} is not a folder" in message
    assert "is not a folder" in fails(1, *command, blocker / "below" / "one.png")
    assert "is not a folder" in fails(1, *command, blocker)
    assert "is not a folder" in fails(1, "embed", blocker, "--model", tiny_bundle, "--out", blocker / "e.npy")


def test_output_names_that_do_not_fit(fails: Fails, tiny_bundle: Path, tmp_path: Path) -> None:
    command = ["sample", "-p", "pizza", "--model", tiny_bundle, "--out"]
    assert "a file for one picture, but 2 are asked for" in fails(2, *command, tmp_path / "o.png", "-n", 2)
    assert "pictures are written as .png" in fails(2, *command, tmp_path / "o.jpg")
    assert "is no .npy file" in fails(2, "embed", "a.png", "--out", tmp_path / "e.bin")
    assert "name what to write: --out FILE.npy" in fails(2, "embed", "a.png")


def test_a_full_disk(
    fails: Fails, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    command = ["sample", "-p", "pizza", "--size", 64, "--model", tiny_bundle, "--out", tmp_path]
    assert "pizza-seed0-1.png: No space left on device" in fails(1, *command)
    assert list(tmp_path.iterdir()) == []


# ---- what nobody foresaw -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 1, "out of memory; try a smaller --size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 1, "out of memory; try a smaller --size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (
            ZeroDivisionError("division by zero\nmore"),
            1,
            "unexpected ZeroDivisionError: division by zero (run with --debug",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_whatever_happens_becomes_a_sentence(
    run_cli: Run,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(UnCLIP, "from_pretrained", fail)
    monkeypatch.setattr("unclip.cli.entry.os.dup2", lambda *_: None)
    got, out, err = run_cli("sample", "-p", "pizza", "--model", tiny_bundle)
    assert (got, out) == (code, "")
    assert "Traceback" not in err and err.count("\n") == bool(text)
    assert err.startswith(f"unclip: {text}" if text else "")


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(run_cli: Run, tmp_path: Path, before: bool) -> None:
    command = ["sample", "-p", "pizza", "--model", tmp_path / "nowhere"]
    code, out, err = run_cli("--debug", *command) if before else run_cli(*command, "--debug")
    assert (code, out) == (1, "")
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("unclip: no model folder")


def test_an_error_as_a_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "unclip", "sample", "-p", "pizza", "--dtype", "int4"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("unclip: invalid value for '--dtype'") and done.stderr.count("\n") == 1
