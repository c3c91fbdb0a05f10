"""Assembling bundles from trained parts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers_bundle import make_parts
from safetensors.torch import load_file, save_file

import unclip.bundle
from unclip import UnCLIP, UnclipError, UsageError
from unclip.assemble import assemble
from unclip.bundle import read_manifest
from unclip.clip_identity import identify
from unclip.describe import describe_model


def test_a_bundle_of_all_parts(tiny_parts: dict[str, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("# tiny\n", encoding="utf-8")
    out = tmp_path / "models" / "tiny"
    details = {"name": "tiny", "license": "Apache-2.0", "example_prompts": ["pizza", "piñata"]}
    assemble(out, tiny_parts, details, card)
    manifest = json.loads((out / "unclip.json").read_text(encoding="utf-8"))
    assert manifest == {"format": 1, "parts": {part: part for part in tiny_parts}, **details}
    assert (out / "README.md").read_text(encoding="utf-8") == "# tiny\n"
    assert [p.name for p in out.parent.iterdir()] == ["tiny"]  # nothing temporary stays
    for file in out.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}, file
        assert file.stat().st_mode & 0o044 == 0o044
    half = UnCLIP.from_pretrained(out, device="cpu").sample("pizza", size=256, output="tensor")
    full = UnCLIP.from_pretrained(tiny_bundle, device="cpu").sample("pizza", size=256, output="tensor")
    assert float((half - full).abs().mean()) < 0.02


def test_float32_keeps_every_bit(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    few = {name: tiny_parts[name] for name in ("clip", "decoder")}
    assemble(tmp_path / "b", few, dtype="float32")
    before = load_file(tiny_parts["decoder"] / "model.safetensors")
    after = load_file(tmp_path / "b" / "decoder" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "b" / "unclip.json").read_text())["example_prompts"] == []


def test_large_parts_are_split(
    tiny_parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unclip.bundle, "MAX_SHARD_BYTES", 2**16)
    few = {name: tiny_parts[name] for name in ("clip", "decoder")}
    assemble(tmp_path / "b", few)
    shards = list((tmp_path / "b" / "decoder").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert describe_model(tmp_path / "b")["parts"]["decoder"]["parameters"] > 60_000


def test_parts_that_do_not_fit_leave_nothing(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    foreign = make_parts(tmp_path / "parts", tiny_parts["clip"], embedding_dim=8)
    with pytest.raises(UnclipError, match="the decoder takes 8"):
        assemble(tmp_path / "b", {**tiny_parts, "decoder": foreign["decoder"]})
    assert not (tmp_path / "b").exists() and [p.name for p in tmp_path.iterdir()] == ["parts"]


def test_a_stage_of_another_clip_is_refused(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    """What a run writes down of its CLIP is compared with the bundle's, which may be in half precision."""
    decoder, clip = tmp_path / "decoder", tmp_path / "clip"
    shutil.copytree(tiny_parts["decoder"], decoder)
    shutil.copytree(tiny_parts["clip"], clip)
    body = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps({**body, "clip": identify(str(clip))}))
    few = {"clip": clip, "decoder": decoder}
    assemble(tmp_path / "half", few)
    assemble(tmp_path / "again", {"clip": tmp_path / "half" / "clip", "decoder": tmp_path / "half" / "decoder"})

    weights = load_file(clip / "open_clip_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, clip / "open_clip_model.safetensors")
    with pytest.raises(UnclipError, match=r"the decoder in .* was trained with another CLIP .* weights are others"):
        assemble(tmp_path / "b", few)
    assert not (tmp_path / "b").exists()


def test_an_existing_folder_is_replaced_only_when_asked(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    few = {name: tiny_parts[name] for name in ("clip", "decoder")}
    out = tmp_path / "b"
    assemble(out, few, {"name": "first"})
    with pytest.raises(UnclipError, match="pass --overwrite"):
        assemble(out, few, {"name": "second"})
    # A part may come from the bundle itself.
    assemble(out, {**few, "decoder": out / "decoder"}, {"name": "second"}, overwrite=True)
    assert json.loads((out / "unclip.json").read_text())["name"] == "second"


def test_a_folder_of_other_things_is_never_replaced(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(UnclipError, match=r"not a bundle.*not replaced"):
        assemble(home, tiny_parts, overwrite=True)
    assert (home / "letter.txt").read_text() == "dear"
    with pytest.raises(UnclipError, match="not a folder"):
        assemble(home / "letter.txt", tiny_parts, overwrite=True)


def test_missing_and_wrong_parts(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    clip, decoder = tiny_parts["clip"], tiny_parts["decoder"]
    with pytest.raises(UsageError, match="needs a decoder; given: clip"):
        assemble(tmp_path / "b", {"clip": clip})
    with pytest.raises(UsageError, match="unknown part 'vae'"):
        assemble(tmp_path / "b", {"clip": clip, "decoder": decoder, "vae": clip})
    with pytest.raises(UnclipError, match="holds a 'prior', expected a 'decoder'"):
        assemble(tmp_path / "b", {"clip": clip, "decoder": tiny_parts["prior"]})
    with pytest.raises(
        UnclipError, match=r"not an open_clip model: open_clip_config.json is missing \(found"
    ):
        assemble(tmp_path / "b", {"clip": decoder, "decoder": decoder})
    with pytest.raises(UnclipError, match="no such folder"):
        assemble(tmp_path / "b", {"clip": clip, "decoder": tmp_path / "nowhere"})
    with pytest.raises(UnclipError, match="no model card"):
        assemble(tmp_path / "b", {"clip": clip, "decoder": decoder}, card=tmp_path / "none.md")
    assert not any(tmp_path.iterdir())


def test_a_runs_folder_in_the_place_of_its_model(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").touch()
    wanted = re.escape(f"(found: a run, whose model is {run / 'model'})")
    with pytest.raises(UnclipError, match=f"is not a model part: config.json is missing {wanted}"):
        assemble(tmp_path / "b", {"clip": tiny_parts["clip"], "decoder": run})
    with pytest.raises(UnclipError, match=f"is not an open_clip model: open_clip_config.json is missing {wanted}"):
        assemble(tmp_path / "b", {"clip": run, "decoder": tiny_parts["decoder"]})
    with pytest.raises(UnclipError, match=f"is not a bundle: unclip.json is missing {wanted}"):
        read_manifest(run)


def test_a_pickled_clip_is_refused(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "open_clip_config.json").write_text("{}")
    (clip / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnclipError, match="no weights that are read here; expected one of open_clip_model"):
        assemble(tmp_path / "b", {"clip": clip, "decoder": tiny_parts["decoder"]})


def test_weights_too_large_for_float16(tiny_parts: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    parts = make_parts(tmp_path / "parts", tiny_parts["clip"])
    file = parts["decoder"] / "model.safetensors"
    state = load_file(file)
    state["null_embedding"][0] = 1e6
    save_file(state, file)
    with pytest.raises(UnclipError, match=r"null_embedding .* too large for float16"):
        assemble(tmp_path / "b", parts)
    assemble(tmp_path / "b", parts, dtype="float32")
