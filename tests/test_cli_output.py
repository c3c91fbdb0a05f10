"""Where the command line writes: names that cannot be meant, full disks, and being ended half-way."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.cli.output import PictureWriter, bare_name, write_atomically
from unclip.errors import UsageError

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def fails(run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command in an empty folder that must fail with `code`, in one line, and leave it empty."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(code: int, *arguments: object) -> str:
        got, out, err = run_cli(*arguments)
        assert (got, out) == (code, "") and err.startswith("unclip: ") and err.count("\n") == 1, err
        assert list(here.iterdir()) == []
        return err

    return run


Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out is empty; name a .png file or a folder"),
        (" ", "--out is empty"),
        ("-", "--out - asks for stdout, where pictures are not written"),
        ("a.svg", "--out a.svg asks for .svg; pictures are written as .png, or into a folder"),
        ("b/a.PDF", "asks for .pdf; pictures are written as .png"),
        ("a.mp4", "asks for .mp4; pictures are written as .png, or into a folder; a moving picture is what"),
    ],
)
def test_places_that_cannot_be_meant(fails: Fails, out: str, message: str) -> None:
    assert message in fails(2, "sample", "-p", "pizza", "--out", out)


def test_names_that_are_too_long_are_found_before_anything_is_drawn(fails: Fails, tmp_path: Path) -> None:
    for out in ("a" * 300, "new/" + "ü" * 150 + ".png", "a" * 252 + ".png"):
        assert "file systems take up to 255" in fails(1, "sample", "-p", "pizza", "--model", "nowhere", "--out", out)
    assert "cannot write" in fails(1, "sample", "-p", "pizza", "--model", "nowhere", "--out", "a/" * 3000)
    parts = ["--clip", tmp_path, "--decoder", tmp_path]
    assert "File name too long" in fails(1, "bundle", "--out", "a" * 300, *parts)


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    file = tmp_path / ("a" * 251 + ".png")
    writer = PictureWriter(file, 1)
    assert writer.save(Image.new("RGB", (8, 8)), "label", 0, {}) == file and file.is_file()
    assert writer.save_grid([Image.new("RGB", (8, 8))], 1).name == "grid-1.png"
    write_atomically(file, lambda stream: stream.write(b"new"), replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "grid-1.png"]


def test_a_file_is_refused_for_many_pictures_before_they_are_listed(fails: Fails, tmp_path: Path) -> None:
    """A list of as many jobs would take the machine's memory first."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    for command in (
        ["sample", "-p", "pizza"],
        ["variations", picture],
        ["mix", "--mix", picture],
        ["edit", picture],
        ["outpaint", picture, "--left", 8],
    ):
        message = fails(2, *command, "-n", 10**12, "--out", "x.png", "--model", "nowhere")
        assert "a file for one picture, but 1000000000000 are asked for" in message


def test_a_writer_of_an_existing_folder_takes_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.svg").mkdir()
    assert PictureWriter(tmp_path / "a.svg", 2).folder == tmp_path / "a.svg"
    with pytest.raises(UsageError, match=r"asks for \.svg"):
        PictureWriter(tmp_path / "b.svg", 2)


def test_a_picture_without_permission(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(file)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(file) and allowed(path, mode))
    assert fails(1, "variations", file).rstrip().endswith(f"'{file}' cannot be read: permission denied")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENAMETOOLONG])
def test_what_the_system_refuses_is_not_unexpected(fails: Fails, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "some/file")

    monkeypatch.setattr("unclip.describe.describe_environment", refuse)
    assert fails(1, "info") == f"unclip: some/file: {os.strerror(code)}\n"


@pytest.mark.parametrize(("unbuffered", "what"), [("", "cannot write to stdout"), ("1", "cannot write")])
def test_a_full_stdout(tiny_bundle: Path, tmp_path: Path, unbuffered: str, what: str) -> None:
    """A file that has reached the size which the system allows, as on a full disk."""
    size = 2**20
    command = [sys.executable, "-m", "unclip", "info", "--model", str(tiny_bundle)]
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    (tmp_path / "stdout").write_bytes(bytes(size))
    with (tmp_path / "stdout").open("a") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, preexec_fn=limited
        )
    assert (done.returncode, done.stderr) == (1, f"unclip: {what}: File too large\n")


SLOW = """
import sys, time
from unclip import bundle, cli

def slow(*_):
    print("busy", flush=True)
    time.sleep(100)

bundle.load_weights = slow
import unclip.assemble
unclip.assemble.load_weights = slow
sys.exit(cli.main())
"""


def test_sigterm_leaves_nothing_half_written(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    parts = [f"--{part}={tiny_parts[part]}" for part in ("clip", "decoder", "prior")]
    command = [sys.executable, "-c", SLOW, "bundle", "--out", str(tmp_path / "o" / "bb"), *parts]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "busy\n"
        assert len(list((tmp_path / "o").glob(".tmp-*"))) == 1
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "", "unclip: terminated\n")
    assert list((tmp_path / "o").iterdir()) == []


def test_sigterm_of_others_is_left_alone(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process nothing is set; as the command, what was there before is there again."""
    from unclip.cli import entry

    monkeypatch.setattr(entry.lean, "claim_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["unclip", "--version"])
    seen: list[object] = []

    def run(_: object) -> int:
        seen.append(signal.getsignal(signal.SIGTERM))
        return 0

    monkeypatch.setattr(entry, "_run", run)

    def theirs(*_: object) -> None: ...

    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN, theirs):
            signal.signal(signal.SIGTERM, handler)
            entry.main()
            entry.main(["--version"])
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert callable(seen[0]) and seen[1:] == [signal.SIG_DFL, *[signal.SIG_IGN] * 2, *[theirs] * 2]


# ---- what a picture says of itself -------------------------------------------------------------------------


def test_pictures_say_all_that_they_were_made_with(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    """Command, row, frame, the size that squares are painted at; of files the names, and not where they lie."""
    photo, other, rows, mask = (tmp_path / name for name in ("photo.png", "other.png", "rows.npy", "mask.png"))
    assert bare_name("folder/caf\udce9.png") == "caf?.png"
    noise = np.random.default_rng(0)
    for file in (photo, other):
        Image.fromarray(noise.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    Image.linear_gradient("L").resize((50, 40)).save(mask)
    np.save(rows, noise.normal(size=(2, 16)).astype(np.float32))
    fast = ["--prior-steps", 1, "--decoder-steps", 2, "--resamplings", 1, "--jump-length", 1]
    painted = ["--size", 64, "--model", tiny_bundle, "--quiet"]
    for command, wanted in (
        (["decode", rows], [{"size": "64", "embeddings": "rows.npy", "row": str(row)} for row in (0, 1)]),
        (["variations", photo, "--eta", 0.5, "--steps", 3], [{"image": "photo.png"}]),
        (["variations", photo, "--eta-sheet", 0, 1, "--steps", 3], [{"image": "photo.png", "etas": "[0.0, 1.0]"}]),
        (["typographic", photo, "--texts", "fox", "--labels", "fox", "owl"], [{"image": "photo.png"}]),
        (["reconstruct", photo, "--steps", 3], [{"image": "photo.png", "psnr_size": "64"}]),
        (["edit", photo, "-p", "pizza", "--decoder-steps", 2], [{"image": "photo.png", "prompt": "pizza"}]),
        (["outpaint", photo, "--to", "60x50", *fast], [{"image": "photo.png", "size": "60x50"}]),
        (["inpaint", photo, "--mask", mask, *fast], [{"image": "photo.png", "mask": "mask.png", "size": "50x40"}]),
        (["mix", "--mix", photo, "fox:0.5"], [{"size": "64"}]),
        (
            ["interpolate", photo, other, "--frames", 3, "--noise", "fixed"],
            [{"frame": str(frame)} for frame in range(3)],
        ),
        (["textdiff", photo, "--to", "fox", "--frames", 2, "--steps", 3], [{"frame": "0", "theta": "0.0"}, {}]),
    ):
        out = tmp_path / f"{command[0]}-drawn"
        code, told, err = run_cli(*command, *painted, "--out", out)
        assert code == 0, err
        files = [line for line in told.splitlines() if line.endswith(".png")]
        for file, more in zip(files, wanted, strict=True):
            with Image.open(file) as image:
                text = dict(image.info)
            assert {"command": command[0], **more}.items() <= text.items()
            assert not any(str(tmp_path) in value for value in text.values())
            options = json.loads(text.get("options", "{}"))
            assert options.get("size") == (64 if "x" in text.get("size", "") else None)
            assert not options.keys() & text.keys() - {"size"}
