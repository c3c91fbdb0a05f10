"""Personalisation on drawn shapes: a subject that was held out is recovered, and its class is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example
from helpers_personalise import SIZE, drawing, make_system, write_pictures
from torch import Tensor

from decoder import DecoderRunConfig
from decoder.train import run as run_decoder
from prior import PriorRunConfig
from unclip import LearnedTokens, UnCLIP
from unclip.bundle import load_weights
from unclip.config import load_config, parse_config
from unclip.errors import UsageError
from unclip.training import current

FOLDER = Path(__file__).parents[1] / "examples" / "personalise"
HELD_OUT = ("yellow", "cross")
PLACES = (-0.04, 0.0, 0.04)
BRIEF: dict[str, Any] = {"batch_size": 8, "log_every": 20, "checkpoint_every": 1000, "wandb": {"mode": "disabled"}}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that draws shapes and has never met a yellow cross."""
    return make_system(tmp_path_factory.mktemp("shapes"), HELD_OUT, (60, 90, 130))


def distance(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Root mean square distance (B,) of each picture to the nearest of those wanted."""
    return (drawn[:, None] - wanted[None]).square().mean((2, 3, 4)).sqrt().min(1).values


def test_a_held_out_combination_is_recovered_by_a_word_alone(shapes: Path, tmp_path: Path) -> None:
    """Textual inversion: the networks are frozen, and the word leads to a picture that no known word led to."""
    inversion = example("personalise/textual_inversion")
    subject = torch.stack([drawing(*HELD_OUT, right=place) for place in PLACES])
    source = write_pictures(tmp_path / "subject", subject, ["whatever"] * 3)
    train = {**BRIEF, "run_dir": str(tmp_path / "run"), "steps": 45, "optimizer": {"lr": 0.03}, "ema_decay": 0.9}
    body = {"bundle": str(shapes), "model": {"words": "cross"}, "templates": ["{}"], "train": train}
    body["data"] = {"source": str(source), "image_size": SIZE}
    before = {part: load_weights(shapes / part) for part in ("prior", "decoder")}
    inversion.run(parse_config(inversion.InversionConfig, body), current())
    file = tmp_path / "run" / "token.safetensors"
    learned = LearnedTokens.load(file)
    model = UnCLIP.from_pretrained(shapes, tokens=[file])
    assert learned.vectors["<zorb>"].shape == model.clip.token_vectors("cross").shape
    for part, state in before.items():
        network = getattr(model, part).network.state_dict()
        assert all(torch.equal(network[name], value) for name, value in state.items())
    options: dict[str, Any] = {"num_images": 6, "output": "tensor"}
    found, started = (distance(model.sample(text, **options), subject) for text in ("<zorb>", "cross"))
    assert found.mean() < 0.5 * started.mean(), (found, started)
    # As near as the frozen decoder comes when it is handed the pictures' own embeddings.
    best = distance(model.decode(model.embed_image(subject), output="tensor"), subject)
    assert found.mean() < 1.3 * best.mean(), (found, best)
    # The known words draw what they drew.
    plain = UnCLIP.from_pretrained(shapes).sample("red circle", output="tensor")
    assert torch.equal(model.sample("red circle", output="tensor"), plain)


def test_a_subject_is_recovered_and_its_class_kept(shapes: Path, tmp_path: Path) -> None:
    """DreamBooth: the decoder learns a subject of a colour that it never met, and its own pictures keep the rest."""
    subject = torch.stack([drawing("purple", "cross", right=place) for place in PLACES])
    write_pictures(tmp_path / "subject", subject, ["zorb cross"] * 3)
    model = UnCLIP.from_pretrained(shapes)
    prompts = [f"{colour} cross" for colour in ("red", "blue", "green", "black")]
    example("personalise/class_pictures").draw(model, prompts, tmp_path / "class", 2, SIZE)
    kept = model.sample(prompts, num_images=2, seed=50, output="tensor")

    def tune(name: str, weights: dict[str, float]) -> tuple[float, float]:
        sources = [{"source": str(tmp_path / folder), "weight": weight} for folder, weight in weights.items()]
        train = {**BRIEF, "run_dir": str(tmp_path / name), "steps": 40, "optimizer": {"lr": 2e-3}, "ema_decay": 0.9}
        body = {"clip": str(shapes), "clip_cache": 100, "init_from": str(shapes), "train": train}
        body["data"] = {"sources": sources, "image_size": SIZE}
        run_decoder(parse_config(DecoderRunConfig, body), current())
        return measure(tmp_path / name / "model")

    def measure(decoder: Path) -> tuple[float, float]:
        """How far the subject's pictures are from it, and the class's from what they were."""
        from decoder import DecoderStage

        tuned = UnCLIP(model.clip, DecoderStage.load(decoder), model.prior)
        text = model.embed_text(["zorb cross"] * 3)
        drawn = tuned.decoder.sample(model.embed_image(subject), [0, 1, 2], text=text)
        moved = (tuned.sample(prompts, num_images=2, seed=50, output="tensor") - kept).square().mean((1, 2, 3)).sqrt()
        return float(distance(drawn, subject).mean()), float(moved.mean())

    before, unmoved = measure(shapes / "decoder")
    assert unmoved == 0
    found, moved = tune("preserved", {"subject": 1.0, "class": 1.0})
    found_alone, moved_alone = tune("alone", {"subject": 1.0})
    assert found < 0.5 * before and found_alone < 0.5 * before, (found, found_alone, before)
    assert moved < 0.6 * moved_alone, (moved, moved_alone)


def test_the_recipes_are_what_they_say(shapes: Path, tmp_path: Path) -> None:
    inversion = example("personalise/textual_inversion")
    recipe = load_config(inversion.InversionConfig, FOLDER / "textual_inversion.yaml")
    assert recipe.bundle == "emoji" and recipe.model.name == "<zorb>"
    for stage, kind in (("decoder", DecoderRunConfig), ("prior", PriorRunConfig)):
        config: Any = load_config(kind, FOLDER / f"dreambooth_{stage}.yaml")
        assert [source.source for source in config.data.sources] == ["data/subject", "data/class"]
        assert config.train.lora is not None and config.init_from == "emoji"
    drawn = example("personalise/subject").pictures()
    assert len(drawn) == 5 and len({image.tobytes() for image in drawn}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "zorb"}}, "'zorb' cannot name a learned token"),
        ({"model": {"words": ""}}, r"model\.words is empty"),
        ({"data": {"image_size": 8}}, "size 8 cannot be made by this model"),
        ({"templates": ["a thing"]}, r"the template 'a thing' has no \{\} for the word"),
        ({"loss": {"prior": 0, "decoder": 0}}, "nothing to learn from"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    changes: dict[str, Any], message: str, shapes: Path, tmp_path: Path
) -> None:
    inversion = example("personalise/textual_inversion")
    body = {"bundle": str(shapes), "data": {"image_size": SIZE}, "train": {**BRIEF, "run_dir": str(tmp_path / "run")}}
    with pytest.raises(UsageError, match=message):
        inversion.run(parse_config(inversion.InversionConfig, {**body, **changes}), current())
    assert not (tmp_path / "run").exists()


def test_what_was_recovered_is_measured(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word that spells another one has that one's figures; what is not changed has not moved."""
    recover = example("personalise/recover")
    clip = UnCLIP.from_pretrained(tiny_bundle, size=64).clip
    (tmp_path / "token").mkdir()
    clip.learned({"<zorb>": clip.token_vectors("zorb apple")}, {}).save(tmp_path / "token" / "token.safetensors")
    ways = [way for way in recover.WAYS if not way.adapters]
    monkeypatch.setattr(recover, "WAYS", ways)
    monkeypatch.setattr(recover, "IMAGES", 3)
    found = recover.recover(tmp_path, str(tiny_bundle))
    before, word = found["before"], found["textual inversion"]
    assert before.distance == word.distance > 10 and before.cosine == word.cosine
    assert all(one.class_moved == one.others_moved == 0 for one in found.values())
    lines = recover.table(found).splitlines()
    assert len(lines) == 2 + len(ways) and lines[2].startswith(f"| before | {before.distance:.1f} | ")
    sheet = recover.sheet(found)
    assert sheet.height > len(ways) * 72 and len(sheet.convert("RGB").getcolors(1 << 20) or []) > 50
