"""Evaluations as a whole: shared by processes, gone on with, kept, and told of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_data import write_shards
from helpers_evaluation import SIZE, data, evaluation, extractor, write_folder
from helpers_html import Page
from PIL import Image

from unclip.data.fingerprint import fingerprint
from unclip.errors import UnclipError, UsageError
from unclip.evaluation import evaluate, measure_memorisation
from unclip.evaluation.dataset import PIECE
from unclip.evaluation.drawing import Read, SampleFeatures
from unclip.evaluation.metrics import frechet_distance
from unclip.evaluation.pieces import Pieces, Share
from unclip.evaluation.real import RealFeatures
from unclip.evaluation.report import Report, number
from unclip.evaluation.sweeps import guidance_sweep, prior_sweep, steps_sweep, sweep

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]
KINDS = ("frechet", "kernel", "precision", "clip", "diversity")  # without torchmetrics, which takes long to import


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes started below have: on some CPUs another number of threads rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "set", 70)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, folder: Path) -> tuple[Path, Path, Report]:
    """One process's evaluation: its folder, the cache, and the report."""
    root = tmp_path_factory.mktemp("alone")
    asked = evaluation(tiny_bundle, folder, num_images=2, reconstructions=10, reconstruction_steps=4)
    report = evaluate(asked, root / "out", cache=root / "cache")
    assert report is not None
    return root / "out", root / "cache", report


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty picture for each plot, since drawing them takes longer than all else."""
    from unclip.evaluation import gallery
    from unclip.evaluation import memorisation as memory

    for module in (gallery, memory):
        monkeypatch.setattr(module, "plot", lambda *_, **__: Image.new("RGB", (8, 8)))


def test_the_report(alone: tuple[Path, Path, Report], tiny_bundle: Path, folder: Path) -> None:
    out, _, report = alone
    body = json.loads((out / "report.json").read_text(encoding="utf-8"))
    wanted = {"frechet", "kernel", "precision", "recall", "clip_score", "clip_score_other", "r_at_1", "r_at_5",
              "r_at_10", "diversity", "psnr", "ssim"}  # fmt: skip
    assert set(body["figures"]) == wanted
    assert body["figures"]["frechet"]["label"] == "FD-CLIP"
    assert body["figures"]["kernel"]["label"] == "KD-CLIP"
    assert "FID" not in {figure["label"] for figure in body["figures"].values()}
    assert body["about"]["prompts"] == "40 captions, 2 pictures of each"
    assert body["about"]["real pictures"].startswith("70 of ")
    # What the figures are of: the model's own pictures, with seeds of their own, as they would be written.
    asked = evaluation(tiny_bundle, folder, num_images=2)
    samples = asked.prompts.first(40)
    system = asked.source.system  # type: ignore[attr-defined]
    seeds = [2 * sample.number + k for sample in samples for k in range(2)]
    images = system.sample([s.caption for s in samples for _ in range(2)], seed=seeds, size=SIZE)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    truth = asked.real.pixels([s for _, piece in asked.real.pieces() for s in piece], SIZE)[1]
    own, theirs = (asked.extractor.compared(asked.extractor(one)) for one in (pixels, truth))
    assert body["figures"]["frechet"]["value"] == pytest.approx(frechet_distance(own, theirs), rel=1e-4)
    text = asked.extractor.texts([sample.caption for sample in samples]).repeat(2, axis=0)
    cosines = (asked.extractor(pixels)["clip"] * text).sum(1)
    assert report["clip_score"].value == pytest.approx(100 * float(cosines.clip(min=0).mean()), rel=1e-4)
    halves = frechet_distance(theirs[::2], theirs[1::2])
    assert report["frechet"].reference == pytest.approx(halves, rel=0.5)


def test_the_page_needs_nothing_beside_it(alone: tuple[Path, Path, Report]) -> None:
    out, _, _ = alone
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "http" not in page and Page(page).wrong == []
    assert page.count("data:image/png;base64,") > 40
    assert "picture 3" in page and "FD-CLIP" in page
    markdown = (out / "report.md").read_text(encoding="utf-8")
    for name in ("curves", "samples", "reconstructions"):
        assert f"({name}.png)" in markdown
        with Image.open(out / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    assert not list(out.rglob(".tmp-*"))


def test_two_processes_write_what_one_does(
    alone: tuple[Path, Path, Report], tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    """As torchrun starts them, at the same time, with a cache of their own."""
    out, _, _ = alone
    command = [
        sys.executable, "-m", "unclip", "eval", "--data", folder, "--model", tiny_bundle, "--prompts", 40, "-n", 2,
        "--size", SIZE, "--reconstructions", 0, "--batch-size", 16, "--out", tmp_path / "out", "--cache",
        tmp_path / "cache", "--device", "cpu", "--metrics", *KINDS,
    ]  # fmt: skip
    processes = []
    for rank in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(
                list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert any("report.html" in stdout for stdout, _ in told)
    first, second = (json.loads((place / "report.json").read_text()) for place in (out, tmp_path / "out"))
    assert len(second["figures"]) == 7
    assert second["figures"] == {key: first["figures"][key] for key in second["figures"]}
    assert first["curves"]["frechet_by_count"] == second["curves"]["frechet_by_count"]
    for name in ("samples",):
        assert (out / f"{name}.png").read_bytes() == (tmp_path / "out" / f"{name}.png").read_bytes()


@pytest.mark.usefixtures("without_plots")
def test_a_process_that_is_done_first_leaves_the_report_to_the_last(
    alone: tuple[Path, Path, Report], tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    asked = evaluation(tiny_bundle, folder, num_images=2, reconstructions=10, reconstruction_steps=4)
    assert evaluate(asked, tmp_path / "out", cache=tmp_path / "cache", share=Share(0, 2)) is None
    assert not (tmp_path / "out" / "report.json").exists()
    report = evaluate(asked, tmp_path / "out", cache=tmp_path / "cache", share=Share(1, 2))
    assert report is not None and report.json() == (alone[0] / "report.json").read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_plots")
def test_what_was_killed_goes_on(
    tiny_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = evaluation(tiny_bundle, folder, metrics=("frechet", "clip"))
    drawn: list[int] = []
    draw = type(asked.source).__call__

    def counting(source: Any, samples: Any) -> Any:
        drawn.append(len(samples))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(source, samples)

    monkeypatch.setattr(type(asked.source), "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(asked, tmp_path / "out", cache=tmp_path / "cache")
    first = evaluate(asked, tmp_path / "out", cache=tmp_path / "cache")
    assert drawn == [PIECE, 40 - PIECE, 40 - PIECE]  # the first piece was kept
    whole = evaluate(asked, tmp_path / "other", cache=tmp_path / "cache")
    assert first is not None and whole is not None and first.json() == whole.json()
    with pytest.raises(UnclipError, match=r"was begun with prompts .*name another folder, or say the same as then"):
        evaluate(replace(asked, prompts=data(folder, 39)), tmp_path / "out", cache=tmp_path / "cache")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").touch()
    with pytest.raises(UnclipError, match="holds something else; name a folder that is new or empty"):
        evaluate(asked, tmp_path / "full", cache=tmp_path / "cache")
    piece = next((tmp_path / "out" / "pieces").glob("samples-00001.npz"))
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(UnclipError, match=r"samples-00001\.npz is damaged; remove it"):
        evaluate(asked, tmp_path / "out", cache=tmp_path / "cache")


def test_features_of_real_pictures_are_kept(tiny_bundle: Path, tmp_path: Path) -> None:
    source, network = write_folder(tmp_path / "set", 40), extractor(tiny_bundle)

    def made(**options: Any) -> tuple[int, int]:
        real = RealFeatures(data(source, **options), network, SIZE, tmp_path / "cache")
        real.make(Share())
        real.gaussian(network.compared(real.load()))
        return real.made, real.found

    assert made() == (2, 0)
    assert made() == (0, 2)
    assert made(limit=33) == (2, 0)  # other pictures, another name
    before = fingerprint(data(source).config)
    file = source / "images" / "3.png"
    Image.new("RGB", (SIZE, SIZE), "red").save(file)
    assert fingerprint(data(source).config) != before
    # A key's hash says what is held out; a stream's first pictures are not those drawn from an index.
    changed = {"key_column": "other", "streaming": True}
    found = {fingerprint(data(source).config.model_copy(update={name: value})) for name, value in changed.items()}
    assert len(found | {fingerprint(data(source).config)}) == 3
    assert made() == (2, 0)
    assert len([p for p in (tmp_path / "cache").iterdir() if (p / "gaussian-00000.npz").is_file()]) == 3


def test_which_samples(tmp_path: Path, folder: Path) -> None:
    """By index and in order, whole and limited, held out, and broken ones."""

    def names(*arguments: Any, **options: Any) -> list[str]:
        return [s.caption for _, piece in data(*arguments, **options).pieces() for s in piece]

    assert names(folder) == [f"picture {i}" for i in range(70)]
    some, more = names(folder, 20), names(folder, 40)
    assert more[:20] == some and len(set(more)) == 40 and some != [f"picture {i}" for i in range(20)]
    kept, held = names(folder, holdout=0.3), names(folder, holdout=0.3, part="validation")
    assert sorted(kept + held) == sorted(names(folder)) and 5 < len(held) < 40
    assert set(names(folder, 20, holdout=0.3)) <= set(kept)
    shards = write_shards(tmp_path / "tars", [20, 30])
    whole = [f"c{i}" for i in range(50)]
    assert names(shards) == names(shards, streaming=True) == whole
    assert names(shards, 35, streaming=True) == whole[:35]
    assert list(data(folder).fetch([3, 66])) == [3, 66]
    limited = data(folder, 20)
    assert [s.number for s in limited.first(5)] == [0, 1, 2, 3, 4]
    assert {s.caption for s in limited.fetch([7]).values()} == {some[7]}
    broken = write_folder(tmp_path / "broken", 8)
    (broken / "images" / "2.png").write_bytes(b"nothing")
    rows = data(broken)
    kept_samples, pixels = rows.pixels(rows.first(8), 32)
    assert [s.number for s in kept_samples] == [0, 1, 3, 4, 5, 6, 7] and pixels.shape == (7, 3, 32, 32)
    assert "1 broken sample was skipped" in rows.tally.report()


@pytest.mark.usefixtures("without_plots")
def test_broken_pictures_are_counted_in_the_report(tiny_bundle: Path, tmp_path: Path) -> None:
    """Also where they were met by another process, or before."""
    broken = write_folder(tmp_path / "broken", 40)
    (broken / "images" / "2.png").write_bytes(b"nothing")
    asked = evaluation(tiny_bundle, broken, 5, metrics=("frechet",))
    evaluate(asked, tmp_path / "out", cache=tmp_path / "cache", share=Share(0, 2))
    report = evaluate(asked, tmp_path / "out", cache=tmp_path / "cache", share=Share(1, 2))
    assert report is not None and report.about["skipped"] == "real pictures that could not be read: 1"
    assert report.about["real pictures"].startswith("39 of ")


def test_stored_embeddings_take_the_place_of_pictures(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    from unclip.precompute import embed_dataset

    network = extractor(tiny_bundle)
    embed_dataset(data(folder).config, str(tiny_bundle / "clip"), network.clip, tmp_path / "embedded")
    arrays = []
    for source in (folder, tmp_path / "embedded"):
        real = RealFeatures(data(source), network, SIZE, tmp_path / "cache")
        real.make(Share())
        arrays.append(real.load())
    cosines = (arrays[0]["clip"] * arrays[1]["clip"]).sum(1)
    assert cosines.min() > 0.98  # the stored ones are of pictures that were resized once
    assert np.allclose(arrays[0]["texts"], arrays[1]["texts"], atol=1e-5)
    stored = data(tmp_path / "embedded")
    with pytest.raises(UsageError, match="holds embeddings without pictures"):
        stored.pixels(stored.first(2), SIZE)
    other = json.loads((tmp_path / "embedded" / "embeddings.json").read_text())
    other["clip"]["config"] = "0" * 64
    (tmp_path / "embedded" / "embeddings.json").write_text(json.dumps(other))
    with pytest.raises(UnclipError, match="are not of tiny's CLIP: its architecture is another"):
        RealFeatures(data(tmp_path / "embedded"), network, SIZE, tmp_path / "d").make(Share())


@pytest.mark.usefixtures("without_plots")
def test_pictures_that_are_the_data_set(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    """Of a set against itself every distance is 0, and nothing is missed; memorised is all of it."""
    asked = replace(evaluation(tiny_bundle, folder), source=Read(data(folder), SIZE), prompts=data(folder), system=None)
    report = evaluate(asked, tmp_path / "out", cache=tmp_path / "cache")
    assert report is not None
    assert report["frechet"].value == pytest.approx(0, abs=1e-3)
    assert (report["precision"].value, report["recall"].value) == (1.0, 1.0)
    assert report["clip_score"].value == report["clip_score"].reference
    held_out = write_folder(tmp_path / "held", 40, seed=1)
    fresh = write_folder(tmp_path / "fresh", 40, seed=2)
    network = extractor(tiny_bundle, small=True)
    shares = {}
    for name, source, others in (("copies", folder, held_out), ("fresh", fresh, held_out), ("alone", folder, None)):
        pictures = data(source)
        out = tmp_path / f"memory-{name}"
        unseen = None if others is None else data(others)
        found = measure_memorisation(
            Read(pictures, SIZE), pictures, data(folder), unseen, network, out, size=SIZE, cache=tmp_path / "m"
        )
        assert found is not None
        shares[name] = (found["share_clip"].value, found["share_pixels"].value)
        closest = json.loads((out / "report.json").read_text())["closest"]
        assert len(closest) == 16
        if name != "fresh":
            assert all(pair["pixels"]["training"] == pair["sample"] for pair in closest)
            assert all(pair["pixels"]["distance"] == 0 for pair in closest)
    assert shares["copies"] == shares["alone"] == (100.0, 100.0)
    told = (tmp_path / "memory-alone" / "report.md").read_text()
    assert "training pictures among themselves" in told and "of held-out" not in told
    assert max(shares["fresh"]) < 20  # of 40, about one in a hundred is expected
    with Image.open(tmp_path / "memory-copies" / "closest.png") as sheet:
        assert sheet.height > 16 * 64


def test_sweeps(tiny_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = evaluation(tiny_bundle, folder, 12)
    made: list[str] = []
    make = SampleFeatures._piece

    def counting(self: Any, samples: Any) -> Any:
        made.append(self.pieces.folder.name)
        return make(self, samples)

    monkeypatch.setattr(SampleFeatures, "_piece", counting)

    def run(wanted: Any, name: str, **options: Any) -> dict[str, Any]:
        source: Any = replace(asked.source, options={"size": SIZE, **options})  # type: ignore[type-var]
        report = sweep(
            wanted, source, asked.prompts, asked.real, asked.extractor, tmp_path / name,
            size=SIZE, cache=tmp_path / "cache",
        )  # fmt: skip
        assert report is not None
        for picture in ("sweep", "pictures"):
            with Image.open(tmp_path / name / f"{picture}.png") as image:
                assert min(image.size) > 100
        return {point["name"]: point for point in json.loads(report.json())["points"]}

    first = run(guidance_sweep([1, 3]), "guidance")
    assert [point["guidance scale"] for point in first.values()] == [1, 3]
    assert made == ["guidance-1", "guidance-3"]
    again = run(guidance_sweep([1, 2, 3]), "guidance")
    assert made[2:] == ["guidance-2"] and again["guidance 3"] == first["guidance 3"]
    assert first["guidance 1"]["clip_score"] != first["guidance 3"]["clip_score"]
    steps = run(steps_sweep([1, 2], [0, "hat"], ["ddim", "dpmpp_2m"]), "steps")
    assert list(steps) == [f"{line}, {n} steps" for line in ("ddim η = 0", "ddim η = σ̂", "dpmpp_2m") for n in (1, 2)]
    # In two steps, of which the last is of first order, DPM-Solver++ is DDIM.
    assert len({point["frechet"] for name, point in steps.items() if name.endswith("2 steps")}) == 2
    told = (tmp_path / "steps" / "report.md").read_text(encoding="utf-8")
    figures = [number(steps[f"ddim η = 0, {n} steps"]["frechet"]) for n in (1, 2)]
    assert f"| steps | 1 | 2 |\n| --- | --- | --- |\n| ddim η = 0 | {' | '.join(figures)} |" in told
    assert Page((tmp_path / "steps" / "report.html").read_text(encoding="utf-8")).wrong == []
    ways = run(prior_sweep(), "prior", guidance=1.0)
    assert list(ways) == ["caption", "text embedding", "prior"]
    # The same captions and noise: the prior's point is what the model draws.
    assert ways["prior"]["frechet"] == first["guidance 1"]["frechet"]


def test_what_a_sweep_refuses(tiny_bundle: Path, folder: Path, tmp_path: Path) -> None:
    for build, message in (
        (lambda: guidance_sweep([]), "no guidance scales to sweep over"),
        (lambda: guidance_sweep([1, 1]), "1 is named twice"),
        (lambda: steps_sweep([5], [0.2], ["euler"]), "unknown sampler 'euler'"),
        (lambda: steps_sweep([5], ["hut"]), "the eta 'hut' is unknown; expected numbers from 0 to 1, or hat"),
        (lambda: steps_sweep([5], [2.0]), "the eta 2.0 is unknown"),
    ):
        with pytest.raises(UsageError, match=message):
            build()
    asked = evaluation(tiny_bundle, folder, 4)

    def run(wanted: Any, source: Any) -> None:
        sweep(wanted, source, asked.prompts, asked.real, asked.extractor, tmp_path / "out", size=SIZE)

    source: Any = asked.source
    with pytest.raises(UsageError, match="guidance is what the sweep varies; leave it out"):
        run(guidance_sweep([1, 2]), replace(source, options={"size": SIZE, "guidance": 3.0}))
    with pytest.raises(UsageError, match="2000 sampling steps asked for; the process has 1000"):
        run(steps_sweep([2000], [0.0], ["ddim"]), source)
    with pytest.raises(UnclipError, match="needs statistics of the decoder; measure them"):
        run(steps_sweep([5], [0.0], ["analytic"]), source)


def test_pieces_are_whole_or_not_there(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "there", "samples")
    pieces.write(0, {"a": np.arange(3), "text": np.array(["x", "a longer one"])})
    pieces.write(1, {"a": np.arange(2), "text": np.array(["é"])})
    found = pieces.load(2)
    assert found["a"].tolist() == [0, 1, 2, 0, 1] and found["text"].tolist() == ["x", "a longer one", "é"]
    assert pieces.complete(2) and not pieces.complete(3)
    (tmp_path / "file").touch()
    with pytest.raises(UnclipError, match="cannot write to"):
        Pieces(tmp_path / "file", "samples").write(0, {"a": np.zeros(1)})
