"""Prompt suites: files, checks of drawn scenes and of identity, intervals, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.config import DataConfig, parse_config
from unclip.data.synthetic import COLOURS, KINDS, PLACES, RADII, Scene, Shape, render, scene
from unclip.errors import UsageError
from unclip.evaluation import scenes, suites
from unclip.evaluation.bootstrap import mean_interval, pair_interval, sign_test, wilson
from unclip.evaluation.scenes import ASPECTS, Thing, check, parse, see
from unclip.evaluation.trained import Trained

# ---- intervals ---------------------------------------------------------------------------------------------


def test_wilson_against_known_values() -> None:
    found = wilson(8, 10)  # Newcombe 1998: 0.4902 to 0.9433
    assert found.value == 0.8 and (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == pytest.approx(1) and wilson(5, 5).low > 0.5
    for successes, trials in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(UsageError, match="successes of"):
            wilson(successes, trials)


def test_sign_test_is_the_binomial_tail() -> None:
    assert sign_test(0, 0) == 1 and sign_test(1, 1) == 1
    assert sign_test(9, 1) == sign_test(1, 9) == pytest.approx(2 * (10 + 1) / 2**10)
    assert sign_test(5, 0) == pytest.approx(2 / 2**5)


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = mean_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert mean_interval(values) == found and mean_interval(values, seed=1) != found
    assert mean_interval([2.0, 2.0]).low == 2.0
    with pytest.raises(UsageError, match="no mean"):
        mean_interval([])


def test_bootstrap_of_pairs_knows_that_pairs_share_samples() -> None:
    """Of f_i + f_j over i ≠ j the mean varies as 2·mean(f) does; pairs taken for independent would vary far less."""
    f = np.random.default_rng(2).normal(size=150)
    wanted = ~np.eye(len(f), dtype=bool)
    found = pair_interval(f[:, None] + f[None], wanted)
    assert found.value == pytest.approx(2 * f.mean())
    assert found.high - found.low == pytest.approx(4 * 1.96 * f.std() / math.sqrt(len(f)), rel=0.12)
    with pytest.raises(UsageError, match="no pair"):
        pair_interval(np.zeros((2, 2)), np.zeros((2, 2), dtype=bool))


# ---- scenes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "objects", "count"), [(64, 1, 160), (64, 2, 100), (64, 3, 70), (128, 3, 40)])
def test_rendered_scenes_are_judged_right(size: int, objects: int, count: int) -> None:
    asked = [scene(index, 11, objects) for index in range(count)]
    wrong = [one.caption for one in asked if not check(one.caption, render(one, size)).right]
    assert len(wrong) <= 0.01 * count, wrong


def altered(one: Scene, aspect: str, rng: np.random.Generator) -> Scene:
    """The scene with one thing drawn otherwise than its caption says."""

    def other(names: list[str], *taken: str) -> str:
        left = [name for name in names if name not in taken]
        return left[int(rng.integers(len(left)))]

    first, rest = one.objects[0], one.objects[1:]
    if aspect == "background":
        used = {shape.colour for shape in one.objects}
        return replace(one, background=other(["white", "grey", "pink", "black"], one.background, *used))
    if aspect == "count":
        if rest:
            return replace(one, objects=rest)
        corner = (0.12, 0.12) if first.x + first.y > 0.9 else (0.88, 0.88)
        return replace(one, objects=(first, Shape(first.colour, "circle", "small", *corner, 0.09)))
    if aspect == "colour":
        used = {shape.colour for shape in one.objects}
        first = replace(first, colour=other(list(COLOURS), one.background, *used))
    elif aspect == "shape":
        first = replace(first, kind=other(list(KINDS), first.kind))
    elif aspect == "size":
        size = "small" if first.size == "large" else "large"
        first = replace(first, radius=RADII[len(one.objects)][size])
    elif rest:  # position: the whole row turned upside down
        centres = [(shape.x, shape.y) for shape in reversed(one.objects)]
        return replace(one, objects=tuple(
            replace(shape, x=x, y=y) for shape, (x, y) in zip(one.objects, centres, strict=True)
        ))  # fmt: skip
    else:
        here = min(PLACES, key=lambda name: abs(PLACES[name][0] - first.x) + abs(PLACES[name][1] - first.y))
        x, y = PLACES[other(list(PLACES), here)]
        first = replace(first, x=x, y=y)
    return replace(one, objects=(first, *rest))


@pytest.mark.parametrize("aspect", ASPECTS)
def test_wrong_scenes_are_caught(aspect: str) -> None:
    """What was changed is found wrong; of a single object what was left alone is found right."""
    rng = np.random.default_rng(3)
    for index in range(24):
        one = scene(index, 21, 1 + index % 2)
        verdict = check(one.caption, render(altered(one, aspect, rng), 64))
        mirrored = aspect == "position" and len(one.objects) > 1  # which is then another object at each place
        assert not verdict.right and (mirrored or not getattr(verdict, aspect)), (one.caption, verdict)
        if len(one.objects) == 1 and aspect != "count":
            assert [name for name in ASPECTS if not getattr(verdict, name)] == [aspect], (one.caption, verdict)


def test_noise_and_other_sizes_do_not_mislead() -> None:
    rng = np.random.default_rng(4)
    asked = [scene(index, 31, 2) for index in range(40)]
    noisy = [np.clip(render(one, 64) + rng.normal(0, 8, (64, 64, 3)), 0, 255).astype(np.uint8) for one in asked]
    right = sum(check(one.caption, picture).right for one, picture in zip(asked, noisy, strict=True))
    assert right >= 38
    assert not check("a small red circle on a white background", np.full((64, 64, 3), 255, np.uint8)).count
    with pytest.raises(UsageError, match=r"\(16, 16, 3\)"):
        see(np.zeros((16, 16, 3), np.uint8))


def test_captions_are_read_as_they_are_written() -> None:
    found = parse("A large red star left of a small  pink ring on a grey background")
    assert found.things == (Thing("red", "star", "large"), Thing("pink", "ring", "small"))
    assert (found.relation, found.background) == ("left of", "grey")
    assert parse("a small orange cross at the top on a blue background").relation == "at the top"
    for index in range(200):
        one = scene(index, 41, 3)
        said = parse(one.caption)
        assert [(t.colour, t.kind, t.size) for t in said.things] == [(o.colour, o.kind, o.size) for o in one.objects]
    for words in ("a red circle on a white background", "a large red circle", "a small red dog on a white background"):
        with pytest.raises(UsageError, match="no caption of a drawn scene"):
            parse(words)


# ---- suites ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suites.names())
def test_suites_that_come_along(name: str) -> None:
    suite = suites.load_suite(name)
    assert len(set(suite.prompts)) == len(suite.prompts) >= 40 and len(suite.categories) >= 4
    assert all(one == " ".join(one.split()) for one in suite.prompts)
    if suite.check == "scenes":
        suites.SceneCheck(suite)
        said = [parse(one.prompt) for one in suite.categories["three objects"].prompts]
        assert all(len(one.things) == 3 for one in said)
        assert {parse(one.prompt).relation for one in suite.categories["places"].prompts} == set(PLACES)


def test_suites_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    body = {"one": {"prompts": ["a dog", {"prompt": "a cat", "target": "cat"}]}, "two": {"prompts": ["x"]}}
    file.write_text(json.dumps({"title": "T", "categories": body}))
    suite = suites.load_suite(str(file))
    assert suite.prompts == ["a dog", "a cat", "x"] and suite.categories["one"].prompts[1].target == "cat"
    assert suites.chosen(suite, ["two"]).prompts == ["x"]
    with pytest.raises(UsageError, match="no category 'onee'; nearest: one"):
        suites.chosen(suite, ["onee"])
    with pytest.raises(UsageError, match=r"no suite 'nonsense'.*emoji, general, scenes"):
        suites.load_suite("nonsense")
    file.write_text("title: T\ncategories: {one: {prompts: []}}")
    with pytest.raises(UsageError, match=r"categories\.one\.prompts"):
        suites.load_suite(str(file))


class Renderer:
    """In the place of a model: draws the scene that a prompt names, every third one wrongly."""

    def __init__(self, size: int = 64) -> None:
        self.size, self.drawn = size, 0
        self.seeds: list[tuple[str, int]] = []

    def sample(self, prompts: list[str], *, seed: list[int], output: str, **_: object) -> torch.Tensor:
        pictures = []
        for prompt, one in zip(prompts, seed, strict=True):
            self.seeds.append((prompt, one))
            said = parse(prompt)
            thing = said.things[0]
            x, y = PLACES[said.relation]
            wrong = self.drawn % 3 == 2
            self.drawn += 1
            kind = thing.kind if not wrong else "ring" if thing.kind != "ring" else "star"
            shape = Shape(thing.colour, kind, thing.size, x, y, RADII[1][thing.size])
            picture = render(Scene((shape,), said.background, prompt), self.size)
            pictures.append(torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)
        return torch.stack(pictures)

    def clip_scores(self, images: torch.Tensor, prompt: str) -> torch.Tensor:
        return torch.full((len(images),), 0.25)


def test_a_suite_is_drawn_judged_and_told() -> None:
    suite = suites.chosen(suites.load_suite("scenes"), ["shapes", "places"])
    model = Renderer()
    checker = suites.SceneCheck(suite)
    results = suites.run(model, suite, checker, num_images=3, seed=5, batch_size=7)  # type: ignore[arg-type]
    assert len(results) == 29 and model.seeds[:4] == [(suite.prompts[0], 5 + k) for k in range(3)] + [
        (suite.prompts[1], 5)
    ]
    trained = Trained.of(suite.prompts[:4])
    report = suites.summarise(suite, results, checker.aspects, trained)
    told = json.loads(report.json())["categories"]
    assert told["shapes"]["pictures"] == 42 and told["all"]["prompts"] == 29
    # The third picture of each is wrong.
    for name in ("shapes", "places", "caption trained on", suites.MET, suites.NEW):
        assert told[name]["right"]["value"] == told[name]["shape"]["value"] == pytest.approx(2 / 3)
        assert told[name]["colour"]["value"] == told[name]["position"]["value"] == 1
    assert told["caption trained on"]["prompts"] == 4
    assert (told[suites.MET]["prompts"], told[suites.NEW]["prompts"]) == (4, 25)
    apart = json.loads(report.json())["by_training"]
    assert apart["shapes"][suites.MET]["prompts"] == 4 and apart["shapes"][suites.NEW]["prompts"] == 10
    assert set(apart["places"]) == {suites.NEW} and apart["places"][suites.NEW]["value"] == pytest.approx(2 / 3)
    assert apart[suites.ONE][suites.NEW]["prompts"] == 25
    # Of six statements one is wrong in every third picture.
    assert apart["shapes"][suites.NEW]["statements"] == pytest.approx(1 - 1 / 18)
    assert "| shapes | 4 | 67% (39%–86%) | 94% | 10 | 67% (49%–81%) | 94% |" in report.markdown()
    pictures = [section.picture for section in report.sections if section.picture is not None]
    assert [name for name, _ in pictures] == ["sheet-shapes", "sheet-places"]
    assert "| shapes | 14 | 42 | 67% | 100% | 67% |" in report.markdown()


def drawn_shapes(**options: object) -> DataConfig:
    return parse_config(DataConfig, {"synthetic": {"size": 300, "max_objects": 1}, **options})


def test_what_was_trained_on_is_the_data_sets() -> None:
    """Captions and combinations are those of the scenes themselves, less what a run holds out or filters."""
    whole = Trained.read(drawn_shapes())
    shown = [scene(index, 0, 1) for index in range(300)]
    assert whole.captions == {one.caption for one in shown}
    places = {value: name for name, value in PLACES.items()}
    wanted = {(s.size, s.colour, s.kind, places[s.x, s.y]) for one in shown for s in one.objects}
    assert whole.combinations == wanted
    kept = Trained.read(drawn_shapes(holdout=0.3))
    held = [one.caption for one in shown if one.caption not in kept.captions]
    assert 50 < len(held) < 130 and kept.captions | set(held) == whole.captions
    assert any(not kept.knows(caption) for caption in held) and all(whole.knows(caption) for caption in held)
    with pytest.raises(UsageError, match="leave out all of them"):
        Trained.read(drawn_shapes(filter={"min_caption": 900}))


def test_a_combination_is_known_on_any_background_and_at_its_place_alone() -> None:
    trained = Trained.of(["a large red star at the top on a white background",
                          "a small blue ring left of a large pink cross on a grey background"])  # fmt: skip
    for prompt, known in (
        ("a large red star at the top on a green background", True),
        ("a large red star on a white background", False),
        ("a large red ring at the top on a white background", False),
        ("a small red star at the top on a white background", False),
        ("a small blue ring left of a large pink cross on a white background", True),
        ("a large pink cross left of a small blue ring on a grey background", False),
        ("a small blue ring above a large pink cross on a grey background", False),
        ("a small blue ring left of a large red star on a grey background", False),
        ("a large pink cross on the right on a grey background", False),
    ):
        assert trained.knows(prompt) == known, prompt


def test_identity_is_the_nearest_picture(tmp_path: Path, tiny_clip_folder: Path) -> None:
    from unclip.clip import FrozenCLIP
    from unclip.data import to_tensor
    from unclip.evaluation.dataset import EvaluationData
    from unclip.evaluation.identity import Gallery

    pictures = [Image.fromarray(render(scene(index, 3, 1), 64)) for index in range(6)]
    lines = []
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "captions": [f"thing {index}", f"The {index % 3}th"]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    data = EvaluationData(parse_config(DataConfig, {"source": str(tmp_path), "image_size": 64}))
    gallery = Gallery(data, FrozenCLIP.load(str(tiny_clip_folder)))
    drawn = torch.stack([to_tensor(pictures[4], 64), to_tensor(pictures[1], 64)])
    assert [found.tolist() for found in gallery.nearest(drawn)] == [[4, 1], [4, 1]]
    verdicts = gallery(suites.Prompt(prompt="one", target="thing 4"), drawn)
    assert [one["right"] for one in verdicts] == [True, False]
    assert gallery.find("the 1TH") == {1, 4}
    with pytest.raises(UsageError, match="no picture of the data has the caption 'thing 9'; nearest: thing"):
        gallery.expect(suites.Suite(title="t", categories={"a": suites.Category(prompts=("thing 9",))}))  # type: ignore[arg-type]


# ---- command -----------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


def test_suite_command(tmp_path: Path, tiny_bundle: Path, run_cli: Run) -> None:
    file, out = tmp_path / "own.yaml", tmp_path / "out"
    prompts = [scene(index, 0, 1).caption for index in (0, 1)] + ["a small red ring on a grey background"]
    file.write_text(json.dumps({"title": "T", "check": "scenes", "categories": {"a": {"prompts": prompts}}}))
    trained = ("--data", "synthetic", "--set", "synthetic.size=2", "--set", "synthetic.max_objects=1")
    options = ("--model", tiny_bundle, "--size", 64, "--decoder-steps", 1, "--prior-steps", 1)
    code, shown, _ = run_cli("suite", file, "--out", out, *options, *trained)
    assert code == 0 and shown.splitlines()[-1] == str(out / "report.html")
    body = json.loads((out / "report.json").read_text())
    assert body["categories"]["caption trained on"]["prompts"] == 2 and body["about"]["size"] == 64
    assert Image.open(out / "sheet-a.png").width > 300 and "sheet-a.png" in (out / "report.md").read_text()
    for arguments, words in (
        (("suite", "emoji", "--out", tmp_path / "x"), "name it with --data"),
        (("suite", "general", "--data", "synthetic", "--out", tmp_path / "x"), "leave it out"),
        (("suite", "scenes", "--data", "synthetic", "--split", "test", "--out", tmp_path / "x"), "only what was"),
        (("suite", "genral", "--out", tmp_path / "x"), "no suite 'genral'"),
    ):
        code, _, told = run_cli(*arguments)
        assert code == 2 and words in told, told
    assert not (tmp_path / "x").exists()
    code, _, told = run_cli("suite", file, "--out", out)
    assert code == 1 and "is there already" in told


def test_extents_are_those_of_the_drawings() -> None:
    assert scenes.extent("circle") == pytest.approx((-1, 1, -1, 1), abs=3e-3)
    assert scenes.extent("square") == pytest.approx((-0.82, 0.82, -0.82, 0.82), abs=3e-3)
