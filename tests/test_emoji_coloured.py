"""The emoji example's coloured backgrounds: what captions state is in the picture, and the judge sees what is not."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_emoji import DRAWINGS, make_source, scripts
from torch import Tensor

NAMES = [name for name, *_ in DRAWINGS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The scripts as modules and the tiny set, of which nearly a third is held out."""
    folder = tmp_path_factory.mktemp("coloured")
    source = make_source(folder / "source")
    with scripts(), pytest.MonkeyPatch.context() as patch:
        import check_scenes
        import coloured
        import measure
        import scenes

        patch.setattr(scenes, "HELD_PER_MILLE", 300)
        yield SimpleNamespace(
            coloured=coloured, scenes=scenes, measure=measure, source=source, folder=folder,
            tensor=check_scenes.to_tensor, trained=coloured.coloured(source, None, "trained"),
            held_out=coloured.coloured(source, None, "held_out"),
        )  # fmt: skip


def test_each_pair_is_trained_or_held_out(world: SimpleNamespace) -> None:
    trained, held = ({(one.name, one.background) for one in rows} for rows in (world.trained, world.held_out))
    assert trained and held and not trained & held
    assert all(world.scenes.is_held_out(f"{name} on {background}") for name, background in held)
    assert not any(world.scenes.is_held_out(f"{name} on {background}") for name, background in trained)
    assert {name for name, _ in trained | held} == set(NAMES)
    assert ("red apple", "red") not in trained | held  # it would not be seen
    assert "white" not in {background for _, background in trained | held}


def test_captions_end_with_the_background(world: SimpleNamespace) -> None:
    for one in [*world.trained, *world.held_out]:
        where = f" on {'an' if one.background == 'orange' else 'a'} {one.background} background"
        assert one.captions and all(text.endswith(where) for text in one.captions)
        assert all(text.count("background") == 1 for text in one.captions)
    assert world.trained == world.coloured.coloured(world.source, None, "trained")  # always in the same order


def test_true_pictures_are_right_and_altered_ones_are_not(world: SimpleNamespace) -> None:
    eyes, rows = world.coloured.Coloureds(world.source), [*world.trained, *world.held_out]
    for number, one in enumerate(rows):
        picture = world.tensor(world.coloured.render(one, 64))
        assert eyes.judge(picture, one) == (True, True)
        assert eyes.judge((picture + 0.03 * torch.randn_like(picture)).clamp(0, 1), one) == (True, True)
        others = rows[number + 1 :] + rows[:number]
        repainted = next(other for other in others if other.name == one.name)
        assert eyes.judge(world.tensor(world.coloured.render(repainted, 64)), one)[0] is False
        exchanged = next(other for other in others if other.background == one.background)
        assert eyes.judge(world.tensor(world.coloured.render(exchanged, 64)), one)[1] is False


def test_the_tars_hold_the_truth_and_are_gone_on_with(
    world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world.coloured, "SHARD", 10)
    line = ["--source", str(world.source), "--out", str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    assert world.coloured.main(line) == 0
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) == -(-len(world.trained) // 10) and f"{len(world.trained)} pictures" in capsys.readouterr().err
    with tarfile.open(tars[1]) as tar:
        truth = json.loads(tar.extractfile("000000010.json").read())  # type: ignore[union-attr]
    one = world.trained[10]
    assert (truth["name"], truth["background"]) == (one.name, one.background)
    assert tuple(truth["captions"]) == one.captions and truth["caption"] == one.captions[0]
    before = tars[0].read_bytes()
    tars[1].unlink()
    tars[0].write_bytes(before + b"kept")
    assert world.coloured.main(line) == 0
    assert tars[1].exists() and tars[0].read_bytes() == before + b"kept"
    assert world.coloured.main([*line, "--split", "held_out"]) == 1
    assert "was not made with these arguments" in capsys.readouterr().err


@pytest.mark.parametrize("right", [True, False])
def test_the_figure_of_a_perfect_and_of_a_wrong_model(world: SimpleNamespace, right: bool) -> None:
    rows = [*world.trained, *world.held_out]
    drawn = {one.captions[0]: world.tensor(world.coloured.render(one, 64)) * 2 - 1 for one in rows}

    class Model:
        def sample(self, prompts: list[str], **options: object) -> Tensor:
            return torch.stack([drawn[prompt] for prompt in prompts]) * (1 if right else -1)  # colours inverted

    emoji = SimpleNamespace(rows=[{"name": name} for name in NAMES], asked=list(range(len(NAMES))))
    report = world.measure.measure(Model(), ["coloured"], emoji, world.source, world.measure.Settings(batch=50))
    assert report["coloured"]["trained"]["pictures"] == len(world.trained)
    for split in ("trained", "held_out"):
        assert report["coloured"][split]["right"] == float(right)
        assert len(report["coloured"][split]["wrong"]) == (0 if right else report["coloured"][split]["pictures"])
