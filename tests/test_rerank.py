"""Many pictures drawn, and those kept that CLIP finds closest to the prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unclip import UnCLIP, UsageError
from unclip.inputs import LARGEST_SEED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_bundle, device="cpu", size=256)


def test_scores_are_cosines(model: UnCLIP) -> None:
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    z, text = model.embed_image(images), model.embed_text(["pizza", "rainbow"]).embedding
    assert torch.allclose(model.clip_scores(images, ["pizza", "rainbow"]), (z * text).sum(1))
    assert torch.allclose(model.clip_scores(images, "pizza"), z @ text[0])
    with pytest.raises(UsageError, match="3 prompts for 2 images"):
        model.clip_scores(images, ["a", "b", "c"])


def test_the_best_are_kept_in_order(model: UnCLIP) -> None:
    prompts = ["pizza", "rainbow"]
    best = model.sample_best(prompts, num_images=7, keep=3, seed=10, batch_size=3, size=64)
    assert [(one.prompt, one.rank) for one in best] == [(text, rank) for text in prompts for rank in (1, 2, 3)]
    for text, found in (("pizza", best[:3]), ("rainbow", best[3:])):
        drawn = model.sample(text, num_images=7, seed=10, size=64, output="tensor")
        scores = model.clip_scores(drawn, text)
        order = scores.argsort(descending=True)[:3]
        assert [one.seed for one in found] == [10 + int(i) for i in order]
        assert [one.score for one in found] == pytest.approx([float(scores[i]) for i in order], abs=1e-4)
        assert len({round(float(score), 6) for score in scores}) == 7


def test_only_the_kept_are_enlarged_and_equal_plain_samples(
    model: UnCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    enlarged: list[int] = []
    for stage, seen in ((model.decoder, decoded), (model.upsamplers[0], enlarged)):
        own = stage.sample

        def spy(first: Any, seeds: Any, *rest: Any, own: Any = own, seen: list[int] = seen, **options: Any) -> Any:
            seen.append(len(seeds))
            return own(first, seeds, *rest, **options)

        monkeypatch.setattr(stage, "sample", spy)
    assert model.scoring_size(None) == 64 and model.scoring_size(64) == 64
    best = model.sample_best("pizza", num_images=5, keep=2, seed=3, batch_size=2)
    assert decoded == [2, 2, 1], "no more than a batch at once"
    assert enlarged == [2]
    assert [one.image.size for one in best] == [(256, 256)] * 2
    monkeypatch.undo()
    for one in best:
        plain = torch.frombuffer(bytearray(model.sample("pizza", seed=one.seed)[0].tobytes()), dtype=torch.uint8)
        kept = torch.frombuffer(bytearray(one.image.tobytes()), dtype=torch.uint8)
        assert int((plain.int() - kept.int()).abs().max()) <= 1  # another batch rounds otherwise


def test_a_large_clip_is_shown_larger_pictures(model: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.clip, "image_size", 224)
    assert model.scoring_size(None) == 256 and model.scoring_size(64) == 64
    monkeypatch.setattr(model.clip, "image_size", 336)
    assert model.scoring_size(None) == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 3, "keep": 4}, "keep is 4, expected 1 to the number of pictures drawn, 3"),
        ({"num_images": 3, "keep": 0}, "keep is 0"),
        ({"num_images": 0}, "num_images is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": LARGEST_SEED}, "seed 4294967296 is out of range"),
        ({"colour": 1}, "unknown option 'colour'"),
    ],
)
def test_what_cannot_be_kept(model: UnCLIP, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.sample_best("pizza", **options)


def test_reranking_on_the_command_line(tiny_bundle: Path, tmp_path: Path, run_cli: Run) -> None:
    command = ["sample", "-p", "pizza", "-p", "rainbow", "--model", tiny_bundle, "--size", 64, "--out", tmp_path]
    code, out, err = run_cli(*command, "--rerank", "clip", "-n", 5, "--keep", 2, "--batch-size", 2, "--json", "--grid")
    assert code == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    assert [(one["prompt"], one["rank"], one["drawn"]) for one in records] == [
        ("pizza", 1, 5), ("pizza", 2, 5), ("rainbow", 1, 5), ("rainbow", 2, 5),
    ]  # fmt: skip
    assert records[0]["clip_score"] >= records[1]["clip_score"]
    with Image.open(records[0]["path"]) as image:
        text: dict[str, str] = image.text  # type: ignore[attr-defined]
    assert float(text["clip_score"]) == records[0]["clip_score"] and text["rank"] == "1"
    assert text["seed"] == str(records[0]["seed"])
    assert len(list(tmp_path.glob("*.png"))) == 5, "four pictures and the grid"
    assert run_cli(*command[:3], *command[5:9], "--rerank", "clip", "-n", 3, "--out", tmp_path / "one.png")[0] == 0
    for options, message in (
        (["--keep", 2], "--keep 2 chooses the best of several pictures; add --rerank clip"),
        (["--rerank", "clip", "-n", 2, "--keep", 3], "--keep 3 is more than the 2 pictures drawn"),
        (["--rerank", "taste"], "--rerank"),
    ):
        code, out, err = run_cli(*command, *options)
        assert (code, out) == (2, "") and message in err, err
