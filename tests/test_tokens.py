"""Learned tokens: new words of a frozen CLIP, their file, and what captions that mention them become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from decoder.config import GlideText
from decoder.text import CaptionEncoder, DecoderConfig
from unclip import LearnedTokens, UnCLIP
from unclip.clip import FrozenCLIP
from unclip.errors import UnclipError, UsageError
from unclip.tokens import check_name, in_words, pieces


@pytest.fixture
def clip(tiny_clip_folder: Path) -> FrozenCLIP:
    return FrozenCLIP.load(str(tiny_clip_folder))


def spelled_like(clip: FrozenCLIP, name: str, words: str) -> LearnedTokens:
    return clip.learned({name: clip.token_vectors(words)}, {name: words})


@pytest.mark.parametrize("words", ["star", "red star"])
def test_a_token_with_a_words_rows_is_that_word(clip: FrozenCLIP, words: str) -> None:
    """However many rows it is spelled with, and wherever it stands."""
    captions = ["a {} on blue", "{}", "{} and {}", "a plain caption"]
    expected = clip.encode_text([caption.format(words, words) for caption in captions])
    before = clip.encode_text([captions[3]])
    clip.add_tokens(spelled_like(clip, "<zorb>", words))
    found = clip.encode_text([caption.format("<Zorb>", "<zorb>") for caption in captions])
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.embedding, expected.embedding)
    assert torch.equal(before.tokens[0], found.tokens[3])


def test_rows_that_are_learned_take_gradients_and_nothing_else_does(clip: FrozenCLIP) -> None:
    rows = clip.token_vectors("star").requires_grad_()
    assert torch.equal(clip.encode_text(["a star"]).tokens, clip.text_features(["a <zorb>"], {"<zorb>": rows}).tokens)

    def loss(vectors: torch.Tensor) -> torch.Tensor:
        features = clip.text_features(["a <zorb>", "<zorb> star"], {"<zorb>": vectors})
        return features.tokens.square().sum() * 0.1 + features.embedding[:, 0].sum()

    loss(rows).backward()
    assert rows.grad is not None and not any(p.grad is not None for p in clip.parameters())
    direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(rows + 1e-3 * direction) - loss(rows - 1e-3 * direction)) / 2e-3
    assert float((rows.grad * direction).sum()) == pytest.approx(float(slope), rel=0.02)
    assert not clip.encode_text(["a star"]).tokens.requires_grad
    assert clip.tokens == {}


def test_the_file_is_read_back_and_belongs_to_its_clip(clip: FrozenCLIP, tmp_path: Path) -> None:
    tokens = spelled_like(clip, "<zorb>", "star")
    tokens.save(tmp_path / "token.safetensors")
    read = LearnedTokens.load(tmp_path / "token.safetensors")
    assert dict(read.words) == {"<zorb>": "star"} and torch.equal(read.vectors["<zorb>"], tokens.vectors["<zorb>"])
    with torch.no_grad():
        clip._token_table.weight.copy_(clip._token_table.weight.half().float())  # as a bundle stores it
    clip.add_tokens(read)
    with pytest.raises(UsageError, match="<zorb> is there already"):
        clip.add_tokens(read)
    with torch.no_grad():
        clip._token_table.weight.mul_(1.1)
    with pytest.raises(UnclipError, match="belong to another CLIP than"):
        clip.add_tokens(LearnedTokens({"<other>": read.vectors["<zorb>"]}, {}, read.probe))
    with pytest.raises(UnclipError, match=r"is 5 wide and the tokens of the CLIP .* are 24 wide"):
        clip.add_tokens(LearnedTokens({"<other>": torch.ones(1, 5)}, {}, read.probe))


def test_files_that_are_none_are_refused(clip: FrozenCLIP, tmp_path: Path) -> None:
    with pytest.raises(UnclipError, match="no file of learned tokens at"):
        LearnedTokens.load(tmp_path / "nowhere")
    file = tmp_path / "token.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(UnclipError, match="damaged or not a safetensors file"):
        LearnedTokens.load(file)
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(UnclipError, match="holds no learned tokens"):
        LearnedTokens.load(file)
    spelled_like(clip, "<zorb>", "star").save(file)
    tensors = load_file(file)
    save_file(tensors, file, {"format": "unclip-tokens-1"})
    with pytest.raises(UnclipError, match="metadata lacks or garbles 'words'"):
        LearnedTokens.load(file)
    tensors["<zorb>"] = torch.full((1, 24), torch.nan)
    save_file(tensors, file, {"format": "unclip-tokens-1", "words": json.dumps({})})
    with pytest.raises(UnclipError, match="one or more rows of finite numbers"):
        LearnedTokens.load(file)
    with pytest.raises(UnclipError, match="cannot write"):
        spelled_like(clip, "<zorb>", "star").save(tmp_path / "no" / "token.safetensors")


@pytest.mark.parametrize("name", ["zorb", "<Zorb>", "<a b>", "<>", "<end_of_text>", "<-a>"])
def test_names_that_captions_could_not_mention_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a learned token"):
        check_name(name)


def test_captions_are_cut_at_known_names_alone() -> None:
    assert pieces("a <zorb>, <other> <ZORB>", ["<zorb>"]) == ["a ", "<zorb>", ", <other> ", "<zorb>"]
    assert pieces("a < b <zorb", ["<zorb>"]) == ["a < b <zorb"]
    assert in_words("a <Zorb> and <other>", {"<zorb>": "red star"}) == "a red star and <other>"


def test_a_caption_that_is_too_long_is_cut_and_says_what_was_dropped(clip: FrozenCLIP) -> None:
    clip.add_tokens(clip.learned({"<zorb>": torch.zeros(9, 24)}, {"<zorb>": "star"}))
    with pytest.warns(UserWarning, match="was cut; dropped: '<zorb> star'"):
        features = clip.encode_text(["a red <zorb> star"])
    assert features.mask.all()
    assert torch.isfinite(features.tokens).all()


def test_readers_of_their_own_vocabulary_read_the_words(clip: FrozenCLIP) -> None:
    clip.add_tokens(spelled_like(clip, "<zorb>", "red star"))
    ids, mask = clip.token_ids(["a <zorb>", "a red star"], 10)
    assert torch.equal(ids[0], ids[1]) and torch.equal(mask[0], mask[1])
    text = GlideText(vocab_size=clip.vocab_size, length=10, width=8, depth=1, heads=1)
    encoder = CaptionEncoder(DecoderConfig(text=text), clip)
    found = encoder.encode_text(["a <zorb>", "a red star"])
    assert torch.equal(found.tokens[0], found.tokens[1])


def test_a_bundle_loads_tokens_and_draws_with_them(
    tiny_bundle: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    clip = FrozenCLIP.load(str(tiny_bundle))
    file = tmp_path / "token.safetensors"
    spelled_like(clip, "<zorb>", "pizza").save(file)
    model = UnCLIP.from_pretrained(tiny_bundle, size=64, tokens=[file])
    drawn = model.sample(["<zorb>", "pizza"], size=64, output="tensor")
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], UnCLIP.from_pretrained(tiny_bundle, size=64).sample("<zorb>", output="tensor")[0])
    asked = ("sample", "--model", tiny_bundle, "--size", 64, "--prompt", "<zorb>", "--quiet", "--overwrite")
    code, out, _ = run_cli(*asked, "--token", file, "--out", tmp_path / "a.png")
    assert code == 0 and (tmp_path / "a.png").is_file() and out.strip() == str(tmp_path / "a.png")
    mixture = ("mix", "--model", tiny_bundle, "--size", 64, "--token", file, "--mix")
    assert run_cli(*mixture, "<zorb>", "--out", tmp_path / "x.png")[0] == 0
    assert run_cli(*mixture, "pizza", "--out", tmp_path / "y.png")[0] == 0
    with Image.open(tmp_path / "x.png") as one, Image.open(tmp_path / "y.png") as other:
        assert one.tobytes() == other.tobytes() and one.text["tokens"].endswith(file.name)  # type: ignore[attr-defined]
    code, _, err = run_cli(*asked, "--token", tmp_path / "none", "--out", tmp_path / "b.png")
    assert code == 1 and "no file of learned tokens" in err and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("command", "few"),
    [
        (("edit", "{image}", "--strength", 0.5, "--prompt", "{word}"), ("--decoder-steps", 2, "--prior-steps", 1)),
        (("mix", "--mix", "{image}:0.4", "{word}:0.6"), ("--decoder-steps", 2, "--prior-steps", 1)),
        (("textdiff", "{image}", "--to", "{word}"), ("--frames", 2, "--steps", 2)),
    ],
)
def test_every_prompt_may_mention_them(
    command: tuple[Any, ...],
    few: tuple[Any, ...],
    tiny_bundle: Path,
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    from PIL import Image

    image, file = tmp_path / "image.png", tmp_path / "token.safetensors"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(image)
    spelled_like(FrozenCLIP.load(str(tiny_bundle)), "<zorb>", "pizza").save(file)
    drawn = {}
    for word, token in (("<zorb>", ("--token", file)), ("pizza", ())):
        asked = [part.format(image=image, word=word) if isinstance(part, str) else part for part in command]
        shared = (*few, "--model", tiny_bundle, "--size", 64, "--json", "--quiet", "--out", tmp_path / word[1:4])
        code, out, err = run_cli(*asked, *shared, *token)
        assert code == 0, err
        with Image.open(json.loads(out.splitlines()[-1])["path"]) as picture:
            drawn[word] = picture.tobytes()
            assert picture.info.get("tokens") == (f"{tmp_path.name}/token.safetensors" if token else None)
    assert drawn["<zorb>"] == drawn["pizza"]
