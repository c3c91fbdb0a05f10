"""The emoji example's figures: a perfect model gets full marks, a wrong one none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_emoji import DRAWINGS, make_source, scripts
from torch import Tensor
from torch.nn import functional as F


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The scripts as modules, the tiny set, its prepared folder and its scenes by caption."""
    folder = tmp_path_factory.mktemp("figures")
    source = make_source(folder / "source")
    with scripts():
        import check_scenes
        import measure
        import prepare
        import scenes

        arguments = ["--source", str(source), "--out", str(folder / "data"), "--size", "64", "--workers", "1"]
        assert prepare.main([*arguments, "--captions", "natural"]) == 0
        things = scenes.vocabulary(source)
        by_name = {thing.name: thing for thing in things}
        drawn = {}
        for split in ("trained", "held_out"):
            for index in range(20):
                found = scenes.scene(things, index, 1, split)
                picture = check_scenes.to_tensor(scenes.render(found, by_name, 64))
                drawn[found.captions[0]] = picture * 2 - 1
        yield SimpleNamespace(measure=measure, prepare=prepare, source=source, data=folder / "data", scenes=drawn)


class Oracle:
    """A model that knows the truth; `shift` makes it answer with another emoji's."""

    def __init__(self, emoji: Any, scenes: dict[str, Tensor], shift: int = 0) -> None:
        self.sizes = (64, 256) if shift else (64, 256, 1024)
        self.pictures = emoji.pictures
        self.where = {t: i for i, row in enumerate(emoji.rows) for t in [row["name"], *row["held_out"]]}
        self.scenes = dict(zip(scenes, [*list(scenes.values())[shift:], *list(scenes.values())[:shift]], strict=True))
        self.shift = shift
        self.options: dict[str, Any] = {}

    def _index(self, prompts: list[str]) -> list[int]:
        return [(self.where[prompt] + self.shift) % len(self.pictures) for prompt in prompts]

    def sample(self, prompts: list[str], **options: Any) -> Tensor:
        self.options = options
        if prompts[0] in self.scenes:
            return torch.stack([self.scenes[prompt] for prompt in prompts])
        return self.pictures[self._index(prompts)]

    @property
    def clip(self) -> Any:
        """Names embedded as their pictures are."""
        return SimpleNamespace(
            encode_text=lambda prompts: SimpleNamespace(embedding=self.predict_embedding(prompts, seed=0))
        )

    def embed_image(self, images: Tensor) -> Tensor:
        small = F.interpolate(images, (16, 16), mode="area").flatten(1)
        return F.normalize(small - small.mean(1, keepdim=True), dim=1)

    def predict_embedding(self, prompts: list[str], *, seed: int) -> Tensor:
        return self.embed_image(self.pictures[self._index(prompts)])

    def decode(self, embeddings: Tensor, **options: Any) -> Tensor:
        nearest = (embeddings @ self.embed_image(self.pictures).T).argmax(1)
        return self.pictures[(nearest + self.shift) % len(self.pictures)]

    def upscale(self, image: Any, *, size: int, seed: int, output: str) -> list[Tensor]:
        from unclip.data import to_tensor

        return [to_tensor(image.resize((size, size), resample=0 if self.shift else 1), size)]


@pytest.fixture(scope="module")
def emoji(world: SimpleNamespace) -> Any:
    return world.measure.read_emoji(world.data)


def figures(world: SimpleNamespace, emoji: Any, shift: int, wanted: list[str], **options: Any) -> dict[str, Any]:
    settings = world.measure.Settings(batch=3, options=options)
    if "scenes" in wanted or "upsamplers" in wanted:
        settings.count = 20 if "scenes" in wanted else 1
    return world.measure.measure(Oracle(emoji, world.scenes, shift), wanted, emoji, world.source, settings)


def test_a_perfect_model_gets_full_marks(world: SimpleNamespace, emoji: Any) -> None:
    report = figures(world, emoji, 0, ["clip", "names", "phrasings", "prior", "variations", "scenes"])
    assert report["clip"]["name_to_picture"] == report["clip"]["picture_to_name"] == 1.0
    assert report["names"]["identity"] == report["phrasings"]["identity"] == 1.0
    assert report["names"]["count"] == len(DRAWINGS) and report["names"]["wrong"] == []
    assert report["phrasings"]["keyword_identity"] == 1.0 and report["phrasings"]["keyword_count"] > 0
    assert report["prior"]["cos_prediction_real"] == pytest.approx(1.0, abs=1e-5)
    assert report["prior"]["cos_prediction_unrelated"] == pytest.approx(report["prior"]["cos_real_unrelated"], abs=1e-5)
    assert report["variations"]["identity"] == 1.0
    for split in ("trained", "held_out"):
        assert report["scenes"][split]["right"] == report["scenes"][split]["right_with_1"] == 1.0
        assert report["scenes"][split]["pictures"] == 20


def test_a_wrong_model_gets_none(world: SimpleNamespace, emoji: Any) -> None:
    report = figures(world, emoji, 1, ["clip", "names", "phrasings", "prior", "variations", "scenes"])
    assert report["clip"]["name_to_picture"] == report["clip"]["picture_to_name"] == 0.0
    assert len(report["clip"]["wrong_name_to_picture"]) == report["clip"]["count"]
    assert report["names"]["identity"] == report["phrasings"]["identity"] == report["variations"]["identity"] == 0.0
    assert len(report["names"]["wrong"]) == len(DRAWINGS)
    assert report["prior"]["cos_prediction_real"] < 0.9
    assert report["scenes"]["trained"]["right"] <= 0.1 and report["scenes"]["held_out"]["right"] <= 0.1
    assert 0 < report["scenes"]["trained"]["background"] < 0.6  # a background may agree by chance


def test_emoji_that_share_a_drawing_count_as_one(world: SimpleNamespace, emoji: Any) -> None:
    twins = emoji.pictures.clone()
    twins[3] = twins[1]
    some = world.measure.Emoji(emoji.rows, twins, emoji.asked)
    assert some.drawing.tolist() == [1 if i == 3 else i for i in range(len(twins))]
    assert some.is_nearest(twins[[1, 1, 0]], [1, 3, 3]).tolist() == [True, True, False]


def test_variations_of_restyled_drawings_are_told_apart_by_style(world: SimpleNamespace, emoji: Any) -> None:
    report = figures(world, emoji, 0, ["elsewhere"])["elsewhere"]
    styles = [report[style] for style in world.measure.STYLES]
    # An embedding of plain pixels sees through a blur and not through another palette.
    assert report["blurred"] >= 0.5 > report["palette"]
    assert report["identity"] == pytest.approx(sum(styles) / len(styles))
    assert figures(world, emoji, 1, ["elsewhere"])["elsewhere"]["blurred"] <= 0.25


def test_lanczos_gains_nothing_on_itself_and_nearest_loses(world: SimpleNamespace, emoji: Any) -> None:
    report = figures(world, emoji, 0, ["upsamplers"])["upsamplers"]
    worse = figures(world, emoji, 1, ["upsamplers"])["upsamplers"]
    for size in ("256", "1024"):
        assert report[size]["gain_db"] == pytest.approx(0, abs=1e-6)
        assert 15 < report[size]["lanczos_db"] < 60
    assert worse["256"]["gain_db"] < -0.5 and "1024" not in worse
    assert world.measure.psnr(torch.full((3, 4, 4), 0.2), torch.zeros(3, 4, 4)) == pytest.approx(20.0, abs=1e-4)


def test_count_and_names_choose_what_is_measured(world: SimpleNamespace, emoji: Any) -> None:
    measure = world.measure
    model = Oracle(emoji, world.scenes)
    report = measure.measure(model, ["names"], emoji, None, measure.Settings(count=3, options={"guidance": 2.0}))
    assert report["names"]["count"] == 3 and model.options["guidance"] == 2.0 and model.options["size"] == 64
    some = measure.Emoji(emoji.rows, emoji.pictures, [4])
    assert measure.measure(model, ["variations"], some, None, measure.Settings())["variations"]["count"] == 1
    with pytest.raises(world.prepare.PrepareError, match="needs the vectors: give --source"):
        measure.measure(model, ["scenes"], emoji, None, measure.Settings())


def test_a_folder_without_held_out_phrasings_is_told(world: SimpleNamespace, emoji: Any, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "held_out"} for row in emoji.rows]
    bare = world.measure.Emoji(rows, emoji.pictures, list(range(len(rows))))
    with pytest.raises(world.prepare.PrepareError, match="--captions natural"):
        world.measure.phrasings(Oracle(emoji, {}), bare, world.measure.Settings())
    with pytest.raises(world.prepare.PrepareError, match=r"no metadata\.jsonl"):
        world.measure.read_emoji(tmp_path)


def test_the_table_says_what_was_asked_for_and_reached(world: SimpleNamespace) -> None:
    report = {"model": "emoji", "seed": 0, "names": {"identity": 0.95, "count": 8, "wrong": ["x"]}}
    report |= {"prior": {"cos_prediction_unrelated": 0.3}, "scenes": {"held_out": {"right": 0.59}}}
    lines = world.measure.markdown(report).splitlines()
    assert "| names.identity | 0.950 | ≥ 0.9 | yes |" in lines
    assert "| prior.cos prediction unrelated | 0.300 | ≤ 0.2 | no |" in lines
    assert "| scenes.held out.right | 0.590 | ≥ 0.6 | no |" in lines
    assert "| names.count | 8 |  |  |" in lines and len(lines) == 6
    json.dumps(report)


def test_the_command_measures_the_bundled_model(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(world.data), "--figures", "variations", "--count", "1", "--decoder-steps", "2"]
    assert world.measure.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert report["variations"]["count"] == 1 and report["options"] == {"decoder_steps": 2}
    assert (tmp_path / "out" / "figures.md").read_text() in capsys.readouterr().out
    assert world.measure.main(["--data", str(world.data), "--model", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
