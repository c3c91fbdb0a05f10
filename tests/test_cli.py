"""The command line, used as it is meant to be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip import UnCLIP, __version__
from unclip.cli.output import grid_columns, slug

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]


def run_process(*arguments: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -m unclip …` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-m", "unclip", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def pixels(file: Path | str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from unclip.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'open_clip', 'huggingface_hub', 'pydantic', 'tqdm'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(
        command in done.stdout for command in ("sample", "variations", "embed", "decode", "bundle", "info")
    )


def test_sample_as_a_process(tiny_bundle: Path, tmp_path: Path) -> None:
    """To 1024 px, with nothing on stdout but JSON and nothing on stderr at all."""
    done = run_process("sample", "-p", "pizza", "--model", tiny_bundle, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    seconds = record.pop("seconds")
    assert record == {
        "path": str(Path("outputs") / "pizza-seed0-1.png"),
        "prompt": "pizza",
        "seed": 0,
        "width": 1024,
        "height": 1024,
        "model": "tiny",
    }
    assert list(seconds) == ["clip", "prior", "decoder", "upsampler_256", "upsampler_1024"]
    assert all(isinstance(value, float) and value >= 0 for value in seconds.values())
    with Image.open(tmp_path / record["path"]) as image:
        assert (image.size, image.mode, image.format) == ((1024, 1024), "RGB", "PNG")


def test_a_closed_pipe_is_no_news(tiny_bundle: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unclip", "info", "--model", str(tiny_bundle)]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(300) == 1


def test_version_and_help(run_cli: Run) -> None:
    assert run_cli("--version") == (0, f"unclip {__version__}\n", "")
    code, out, _ = run_cli()
    assert code == 0 and "Usage: unclip" in out
    code, out, _ = run_cli("sample", "--help")
    assert code == 0
    assert "unclip info --json" in " ".join(out.split()) and "example_prompts" in out


def test_names_are_free_and_nothing_is_overwritten(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    command = [
        "sample",
        "--prompt",
        "Piñata, 50%!",
        "--size",
        64,
        "--model",
        tiny_bundle,
        "--out",
        tmp_path / "o",
    ]
    code, out, err = run_cli(*command, "-n", 2, "--seed", 7)
    assert (code, err) == (0, "")
    names = ["piñata-50-seed7-1.png", "piñata-50-seed8-1.png"]
    assert out.splitlines() == [str(tmp_path / "o" / name) for name in names]
    before = (tmp_path / "o" / names[0]).read_bytes()
    _, out, _ = run_cli(*command, "--seed", 7, "--decoder-steps", 1)
    assert out.strip().endswith("piñata-50-seed7-2.png")
    assert (tmp_path / "o" / names[0]).read_bytes() == before
    _, out, _ = run_cli(*command, "--seed", 7, "--decoder-steps", 1, "--overwrite")
    assert out.strip().endswith(names[0])
    assert (tmp_path / "o" / names[0]).read_bytes() != before
    assert len(list((tmp_path / "o").iterdir())) == 3  # no temporary file stays


def test_one_file_and_its_metadata(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "one.png"
    command = ["sample", "-p", "red apple 苹果", "--size", 64, "--model", tiny_bundle, "--out", file]
    code, out, _ = run_cli(*command, "--seed", 3, "--guidance", 2)
    assert (code, out) == (0, f"{file}\n")
    with Image.open(file) as image:
        assert image.info == {
            "command": "sample",
            "prompt": "red apple 苹果",
            "seed": "3",
            "model": "tiny",
            "size": "64",
            "unclip": __version__,
            "dtype": "float32",
            "options": '{"guidance": 2.0}',
        }
    before = file.read_bytes()
    code, _, err = run_cli(*command)
    assert code == 1 and "exists; pass --overwrite" in err and file.read_bytes() == before
    assert run_cli(*command, "--overwrite")[0] == 0
    assert file.read_bytes() != before


def test_a_picture_does_not_hang_on_its_batch(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    """Alone, among others, in batches of any size: equal up to float32 rounding, at most one 8-bit level."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff# fruit\nred apple\n\n  pizza  \n# end\n", encoding="utf-8")
    common = ["--size", 64, "--model", tiny_bundle, "--json"]
    command = [
        "sample",
        "-p",
        "rainbow",
        "--prompts-file",
        prompts,
        *common,
        "-n",
        3,
        "--out",
        tmp_path / "a",
    ]
    code, out, _ = run_cli(*command)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(r["prompt"], r["seed"]) for r in records] == [
        (prompt, seed) for prompt in ("rainbow", "red apple", "pizza") for seed in range(3)
    ]
    _, out, _ = run_cli("sample", "-p", "pizza", "--seed", 1, *common, "--out", tmp_path / "b")
    alone = pixels(json.loads(out)["path"])
    assert np.abs(pixels(records[7]["path"]) - alone).max() <= 1
    assert np.abs(pixels(records[6]["path"]) - alone).max() > 10
    _, out, _ = run_cli(*command[:-1], tmp_path / "c", "--batch-size", 2)
    for first, second in zip(records, map(json.loads, out.splitlines()), strict=True):
        assert np.abs(pixels(first["path"]) - pixels(second["path"])).max() <= 1


def test_grid(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    command = [
        "sample",
        "-p",
        "pizza",
        "-p",
        "rainbow",
        "-n",
        3,
        "--size",
        64,
        "--model",
        tiny_bundle,
        "--grid",
    ]
    code, out, _ = run_cli(*command, "--out", tmp_path / "o")
    assert code == 0 and len(out.splitlines()) == 7
    grid = pixels(out.splitlines()[-1])
    assert grid.shape == (2 * 64 + 2, 3 * 64 + 4, 3)
    assert np.array_equal(grid[66:, :64], pixels(out.splitlines()[3]))
    code, out, err = run_cli(*command, "--out", tmp_path / "o", "--json")
    assert all(json.loads(line)["width"] == 64 for line in out.splitlines()) and len(out.splitlines()) == 6
    assert err.strip() == str(tmp_path / "o" / "grid-2.png")


def test_half_precision(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    command = ["sample", "-p", "pizza", "--size", 64, "--model", tiny_bundle, "--dtype", "bfloat16"]
    code, out, err = run_cli(*command, "--device", "cpu", "--out", tmp_path)
    assert (code, err) == (0, "") and pixels(out.strip()).std() > 0


def test_a_long_prompt_warns_in_one_line(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    prompt = "pizza " * 12 + "with olives"
    command = ["sample", "-p", prompt, "-n", 2, "--size", 64, "--model", tiny_bundle, "--out", tmp_path]
    code, _, err = run_cli(*command)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("unclip: warning: the prompt is longer than CLIP's 12 tokens and was cut; dropped:")


SOLVING: list[tuple[list[object], dict[str, object]]] = [
    (["--sampler", "dpmpp_2m", "--decoder-steps", 4], {"sampler": "dpmpp_2m", "decoder_steps": 4}),
    (["--eta", 1, "--decoder-steps", 4], {"eta": 1.0, "decoder_steps": 4}),
    (
        ["--guidance", 3, "--guidance-interval", 0.2, 0.6, "--guidance-rescale", 0.5],
        {"guidance": 3.0, "guidance_interval": (0.2, 0.6), "guidance_rescale": 0.5},
    ),
]


@pytest.mark.parametrize(("given", "options"), SOLVING, ids=["sampler", "eta", "interval"])
def test_the_decoders_sampler_is_as_in_python(
    given: list[object], options: dict[str, object], run_cli: Run, tiny_bundle: Path, tmp_path: Path
) -> None:
    from unclip.pipeline import UnCLIP

    command = ["sample", "--model", tiny_bundle, "--prompt", "pizza", "--size", 64, "--device", "cpu"]
    code, _, err = run_cli(*command, "--out", tmp_path / "a.png", *given)
    assert code == 0, err
    code, _, err = run_cli(*command, "--out", tmp_path / "plain.png")
    assert code == 0, err
    drawn = UnCLIP.from_pretrained(tiny_bundle, device="cpu").sample("pizza", size=64, **options)[0]  # type: ignore[call-overload]
    with Image.open(tmp_path / "a.png") as kept, Image.open(tmp_path / "plain.png") as plain:
        assert kept.tobytes() == drawn.tobytes() != plain.tobytes()


def test_embed_decode_and_variations(run_cli: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    """Pictures of every kind become embeddings, and embeddings become the pictures that variations makes."""
    noise = np.random.default_rng(0)
    colour = Image.fromarray(noise.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    kinds = {
        "rgb.png": colour,
        "alpha.png": Image.merge("RGBA", (*colour.split(), colour.getchannel(0))),
        "grey.jpg": colour.convert("L"),
        "16bit.png": Image.fromarray(noise.integers(0, 65535, (40, 60), dtype=np.uint16)),
        "palette.gif": colour.convert("P"),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    files, out = [tmp_path / name for name in kinds], tmp_path / "e.npy"
    assert run_cli("embed", *files, "--model", tiny_bundle, "--out", out) == (0, f"{out}\n", "")
    rows = np.load(out, allow_pickle=False)
    assert (rows.dtype, rows.shape) == (np.float32, (5, 16))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    code, _, err = run_cli("embed", files[1], "--model", tiny_bundle, "--out", out)
    assert code == 1 and "exists; pass --overwrite" in err
    assert run_cli("embed", files[1], "--model", tiny_bundle, "--out", out, "--overwrite")[0] == 0
    assert np.allclose(np.load(out), rows[1:2], atol=1e-5)
    own = tmp_path / "own.npy"
    assert run_cli("embed", *files, "--model", tiny_bundle, "--out", own, "--raw-length")[0] == 0
    lengths = np.linalg.norm(np.load(own), axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.01 and np.allclose(np.load(own) / lengths, rows, atol=1e-5)
    code, _, err = run_cli("embed", "--dataset", tmp_path, "--out", tmp_path / "set", "--raw-length")
    assert code == 2 and "--raw-length is for pictures" in err
    raw = Path(shutil.copytree(tiny_bundle, tmp_path / "raw"))
    for part in ("prior", "decoder"):
        described = json.loads((raw / part / "config.json").read_text())
        described["config"]["embedding_length"] = "raw"
        (raw / part / "config.json").write_text(json.dumps(described))
    drawing = ["--size", 64, "--model", raw, "--out", tmp_path / "drawn"]
    assert run_cli("decode", own, *drawing)[0] == 0
    wanted = UnCLIP.from_pretrained(raw, device="cpu").decode(np.load(own), size=64, seed=0)
    for picture, file in zip(wanted, sorted((tmp_path / "drawn").glob("*.png")), strict=True):
        with Image.open(file) as kept:
            assert np.abs(np.asarray(kept, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1
    code, _, err = run_cli("decode", out, *drawing)
    assert code == 2 and "embeddings of length 1; this model reads them as long as its CLIP makes them" in err

    np.save(out, rows.astype(np.float64) * 3)
    common = ["--size", 64, "--model", tiny_bundle, "--json", "--out", tmp_path / "o"]
    code, text, _ = run_cli("decode", out, "-n", 2, *common)
    decoded = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [(r["row"], r["seed"]) for r in decoded] == [
        (row, seed) for row in range(5) for seed in (0, 1)
    ]
    assert decoded[0]["prompt"] is None and decoded[0]["embeddings"] == str(out)
    code, text, _ = run_cli("variations", files[1], "-n", 3, "--batch-size", 2, *common)
    varied = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [r["seed"] for r in varied] == [0, 1, 2]
    assert varied[0]["image"] == str(files[1])
    assert np.abs(pixels(varied[1]["path"]) - pixels(decoded[3]["path"])).max() <= 1


def test_bundle(run_cli: Run, tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("pizza\n# no\npiñata\n", encoding="utf-8")
    options = [f"--{part.replace('_', '-')}={folder}" for part, folder in tiny_parts.items()]
    command = ["bundle", "--out", tmp_path / "b", *options, "--example-prompts", names, "--license", "MIT"]
    assert run_cli(*command, "--model-version", "2") == (0, f"{tmp_path / 'b'}\n", "")
    code, out, _ = run_cli("info", "--json", "--model", tmp_path / "b")
    model = json.loads(out)["model"]
    assert code == 0
    assert {key: model[key] for key in ("name", "version", "license", "sizes", "example_prompts")} == {
        "name": "b",
        "version": "2",
        "license": "MIT",
        "sizes": [64, 256, 1024],
        "example_prompts": ["pizza", "piñata"],
    }
    code, _, err = run_cli(*command)
    assert code == 1 and "exists; pass --overwrite" in err


def test_info(run_cli: Run, tiny_bundle: Path) -> None:
    code, out, err = run_cli("info", "--json", "--model", tiny_bundle)
    body = json.loads(out)
    assert (code, err, body["unclip"]) == (0, "", __version__)
    assert {"python", "torch", "devices", "packages", "platform"} <= body.keys()
    assert body["packages"]["open_clip_torch"] and body["devices"][0] == "cpu"
    parts = body["model"]["parts"]
    assert list(parts) == ["clip", "prior", "decoder", "upsampler_256", "upsampler_1024"]
    assert parts["decoder"]["defaults"] == {"steps": 3, "guidance": 3.0, "sampler": "ddpm"}
    assert all(
        part["parameters"] > 1000 and part["bytes"] > 4 * part["parameters"] for part in parts.values()
    )
    assert body["model"]["bytes"] > sum(part["bytes"] for part in parts.values())
    code, out, _ = run_cli("info", "--model", tiny_bundle)
    assert code == 0 and all(text in out for text in ("64, 256, 1024 px", "M parameters", "pizza, red apple"))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Red Apple", "red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("苹果", "苹果"),
        ("🍕", "picture"),
        ("a" * 300, "a" * 80),
        (".hidden", "hidden"),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@pytest.mark.parametrize(
    ("count", "each", "columns"), [(1, 1, 1), (9, 1, 3), (6, 6, 3), (6, 3, 3), (6, 2, 2)]
)
def test_grid_columns(count: int, each: int, columns: int) -> None:
    assert grid_columns(count, each) == columns
