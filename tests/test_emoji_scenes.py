"""The emoji example's scenes: what they state is what they show, at every size; and the judge that says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_emoji import make_source, scripts
from PIL import Image


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The scripts as modules, the tiny set and its vocabulary."""
    source = make_source(tmp_path_factory.mktemp("scenes") / "source")
    with scripts():
        import check_scenes
        import elsewhere
        import scene_drawing
        import scenes

        things = scenes.vocabulary(source)
        yield SimpleNamespace(
            scenes=scenes, drawing=scene_drawing, check=check_scenes, elsewhere=elsewhere, source=source,
            things=things, by_name={thing.name: thing for thing in things}, judge=check_scenes.Judge(things),
        )  # fmt: skip


def test_a_vocabulary_leaves_out_what_no_eye_can_tell_apart(world: SimpleNamespace, tmp_path: Path) -> None:
    assert [thing.noun for thing in world.things][:3] == ["red apple", "banana", "blue car"]
    assert "red" not in world.things[0].backgrounds and "white" in world.things[0].backgrounds
    source = make_source(tmp_path / "source")
    row = json.loads((source / "metadata.jsonl").read_text().splitlines()[0])
    with (source / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({**row, "name": "tomato"}) + "\n")  # the drawing of the apple
    assert [t.name for t in world.scenes.vocabulary(source)] == [t.name for t in world.things]


def test_a_scene_depends_on_seed_and_index_alone(world: SimpleNamespace) -> None:
    make = world.scenes.scene
    first = [make(world.things, i) for i in range(20)]
    assert first == [make(world.things, i) for i in range(20)]
    assert first[7] == make(world.things, 7, 0, "trained")
    assert len({s.captions[0] for s in first}) > 15
    assert first != [make(world.things, i, 1) for i in range(20)]


def test_emoji_stay_in_the_picture_and_apart(world: SimpleNamespace) -> None:
    totals = set()
    for index in range(300):
        found = world.scenes.scene(world.things, index)
        boxes = [box for group in found.groups for box in group.boxes]
        totals.add(len(boxes))
        assert len(boxes) == sum(group.count for group in found.groups)
        assert all(min(x, y) >= 0 and max(x, y) + edge <= 32 for x, y, edge in boxes)
        for (ax, ay, edge), (bx, by, _) in combinations(boxes, 2):
            assert max(abs(ax - bx), abs(ay - by)) >= edge
    assert totals == {1, 2, 3}


def test_captions_state_what_how_many_where_and_on_which_colour(world: SimpleNamespace) -> None:
    seen = set()
    for index in range(200):
        found = world.scenes.scene(world.things, index)
        assert all(f"{found.background} background" in text for text in found.captions)
        for group in found.groups:
            word = world.scenes.count_phrase(group.noun, group.count)
            assert all(word in text for text in found.captions)
        if found.relation in world.scenes.RELATIONS:
            one, other = found.groups
            axis = 0 if found.relation in {"left of", "right of"} else 1
            a, b = ([box[axis] for box in group.boxes] for group in (one, other))
            assert max(a) < min(b) if found.relation in {"left of", "above"} else min(a) > max(b)
            back = world.scenes.OPPOSITE[found.relation]
            assert f" {back} {world.scenes.count_phrase(one.noun, one.count)}" in found.captions[2]
        seen.add(found.relation)
    assert len(seen) >= 14  # nine places, four relations, rows and columns


def test_of_a_tidy_scene_the_caption_says_all(world: SimpleNamespace) -> None:
    """Two pictures of one caption would be two truths; what is left unsaid has one meaning."""
    pictures: dict[str, set[tuple]] = {}
    for index in range(600):
        found = world.scenes.scene(world.things, index, tidy=True)
        boxes = tuple(sorted((group.name, box) for group in found.groups for box in group.boxes))
        for caption in found.captions:
            pictures.setdefault(caption, set()).add((found.background, boxes))
    assert all(len(shown) == 1 for shown in pictures.values())
    assert any("background" not in caption for caption in pictures)  # on white
    assert sum(len(shown) for shown in pictures.values()) < sum(
        len(world.scenes.scene(world.things, index, tidy=True).captions) for index in range(600)
    )


def test_families_differ_in_places_and_numbers_alone(world: SimpleNamespace) -> None:
    for family in range(20):
        alike = world.scenes.alike(world.things, family, 4, tidy=True)
        assert len({found.background for found in alike}) == 1
        assert len({frozenset(group.name for group in found.groups) for found in alike}) == 1
        pixels = {world.scenes.render(found, world.by_name, 64).tobytes() for found in alike}
        assert len(pixels) == 4 and not any(found.held_out for found in alike)
        assert alike == world.scenes.alike(world.things, family, 4, tidy=True)
        # What is said of one in full is said of no other, though an emoji may be anywhere within its place.
        loose = world.scenes.alike(world.things, family, 4)
        assert not any(one.captions[0] in other.captions for one in loose for other in loose if one is not other)
    held = world.scenes.alike(world.things, 0, 4, split="held_out")
    assert all(found.held_out for found in held)
    with pytest.raises(world.scenes.PrepareError, match="No 99 scenes of the split 'trained' that are alike"):
        world.scenes.alike(world.things[:1], 0, 99, tidy=True)


def test_one_scene_is_the_same_picture_at_every_size(world: SimpleNamespace) -> None:
    for index in range(6):
        found = world.scenes.scene(world.things, index)
        large = world.scenes.render(found, world.by_name, 256)
        for size in (64, 100):  # 100 is no multiple of the grid, and goes another way
            small = np.asarray(world.scenes.render(found, world.by_name, size), np.float32)
            reduced = np.asarray(large.resize((size, size), Image.Resampling.BOX), np.float32)
            assert np.abs(small - reduced).mean() < 1.5
            assert small.shape == (size, size, 3)


def test_held_out_combinations_follow_from_their_hash(world: SimpleNamespace) -> None:
    listed = {facet for kind in world.scenes.all_held_out(world.things).values() for facet in kind}
    assert listed and all(world.scenes.is_held_out(facet) for facet in listed)
    for index in range(60):
        for split in ("trained", "held_out"):
            found = world.scenes.scene(world.things, index, 0, split)
            groups = [(group.name, group.count, group.place) for group in found.groups]
            held = set(world.scenes.facets(found.background, groups)) & listed
            assert set(found.held_out) == held and bool(held) == (split == "held_out")
    shares = [world.scenes.is_held_out(f"thing {i} × 2") for i in range(4000)]
    assert sum(shares) / len(shares) == pytest.approx(world.scenes.HELD_PER_MILLE / 1000, abs=0.01)


def test_scenes_are_written_as_tars_that_a_stage_reads(world: SimpleNamespace, tmp_path: Path) -> None:
    from unclip.config import DataConfig
    from unclip.data.sources import open_source

    out = tmp_path / "tars"
    arguments = ["--source", str(world.source), "--out", str(out), "--count", "12", "--size", "32", "--workers", "1"]
    assert world.scenes.main([*arguments, "--list-held-out", str(tmp_path / "held.json")]) == 0
    rows = open_source(DataConfig(source=str(out), image_size=32)).rows(list(range(12)))  # type: ignore[union-attr]
    for index, row in enumerate(rows):
        found = world.scenes.scene(world.things, index)
        assert row.captions == found.captions
        expected = np.asarray(world.scenes.render(found, world.by_name, 32))
        assert torch.equal(row.pixels(32), torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert json.loads((tmp_path / "held.json").read_text()) == world.scenes.all_held_out(world.things)
    kept = (out / "000000.tar").stat().st_mtime_ns
    assert world.scenes.main(arguments) == 0 and (out / "000000.tar").stat().st_mtime_ns == kept
    assert world.scenes.main([*arguments, "--seed", "1"]) == 1  # not made with these arguments


def test_wrong_usage_is_one_sentence(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.scenes.main(["--source", str(world.source)]) == 1
    assert "give --out, --sheet or --list-held-out" in capsys.readouterr().err
    assert world.scenes.main(["--source", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    assert "no metadata.jsonl" in capsys.readouterr().err


# ---------------------------------------------------------------- the judge


def test_the_judge_finds_true_scenes_right_and_altered_ones_wrong(world: SimpleNamespace) -> None:
    report = world.check.prove(world.things, 50, 64)
    assert report["true_right"] == 1.0 and report["altered_caught"] == 1.0, report["misjudged"]
    assert world.check.prove(world.things, 20, 64, wear=True)["true_right"] >= 0.95


def test_the_judge_names_what_is_wrong(world: SimpleNamespace) -> None:
    picture = world.scenes.render
    group, make = world.scenes.Group, world.scenes.Scene
    apples = group("red apple", "red apple", 2, "left of", ((3, 4, 10), (3, 18, 10)))
    car = group("sport utility vehicle", "blue car", 1, "right of", ((19, 11, 10),))
    asked = make("yellow", "left of", (apples, car), ("two red apples left of a blue car",), ())

    def verdict(shown: object) -> object:
        return world.check.judge(asked, *world.judge.find(world.check.to_tensor(picture(shown, world.by_name, 64))))

    assert verdict(asked).right
    green = verdict(replace(asked, background="green"))
    assert not green.background and green.objects and green.count and green.position
    fewer = verdict(replace(asked, groups=(replace(apples, boxes=apples.boxes[:1]), car)))
    assert not fewer.count and fewer.objects
    swapped = verdict(replace(asked, groups=(replace(apples, boxes=((19, 4, 10), (19, 18, 10))),
                                             replace(car, boxes=((3, 11, 10),)))))  # fmt: skip
    assert not swapped.position and swapped.objects and swapped.count
    owl = verdict(replace(asked, groups=(apples, replace(car, name="owl"))))
    assert not owl.objects and owl.count
    more = verdict(replace(asked, groups=(apples, replace(car, name="red apple"))))
    assert not more.objects and not more.right


def test_the_judge_sees_nothing_where_there_is_nothing(world: SimpleNamespace) -> None:
    blank = torch.tensor(world.drawing.BACKGROUNDS["blue"]).view(3, 1, 1).expand(3, 64, 64) / 255
    assert world.judge.find(blank) == ("blue", [])
    noise = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    asked = world.scenes.scene(world.things, 0)
    assert not world.check.judge(asked, *world.judge.find(noise)).right


# ---------------------------------------------------------------- other styles


def test_pictures_from_elsewhere_show_the_thing_in_another_way(world: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    assert world.elsewhere.main(["--source", str(world.source), "--out", str(out), "--size", "64"]) == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * len(world.elsewhere.STYLES) and not list(out.glob(".part*"))
    seen = {row["style"]: np.asarray(Image.open(out / row["file_name"]), np.float32) for row in rows[:5]}  # the apple
    assert seen["palette"][32, 32, 0] < 150  # a red apple is red no longer
    assert (seen["line art"][32, 32] > 200).all() and seen["line art"].min() < 80
    sharpest = {style: np.abs(np.diff(picture, axis=0)).max() for style, picture in seen.items()}
    assert sharpest["blurred"] < 0.6 * sharpest["rotated"]
    assert seen["photo"][:8].std() > 2  # its background is not plain
    again = world.elsewhere.restyled(world.source / "svg" / "0.svg", "red apple", "photo", 64)
    assert np.array_equal(np.asarray(again), seen["photo"].astype(np.uint8))


def test_a_rotated_picture_is_turned(world: SimpleNamespace) -> None:
    svg = world.source / "svg" / "3.svg"  # the ladder, upright
    upright = world.drawing.piece(str(svg), 50)
    turned = world.elsewhere.restyled(svg, "ladder", "rotated", 64)
    dark = np.asarray(turned.convert("L")) < 200
    assert dark.sum() == pytest.approx((np.asarray(upright)[..., 3] > 100).sum(), rel=0.15)
    columns = dark.any(0).sum()
    assert columns > (np.asarray(upright)[..., 3] > 100).any(0).sum() + 8
