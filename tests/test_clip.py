"""FrozenCLIP over a tiny random open_clip model; its folder and vocabulary; the loss that trains one."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import TINY_CLIP
from torch import Tensor
from torch.nn import functional as F

from unclip.clip import (
    CONFIG_FILE,
    FrozenCLIP,
    TextFeatures,
    build_trainable,
    clip_loss,
    save_folder,
    write_vocabulary,
)
from unclip.config import parse_config
from unclip.errors import UnclipError
from unclip.training import EmbeddingMemo
from unclip.training.clip_config import ClipConfig

LONG = "a red circle left of a blue square on a white background"


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: Path) -> FrozenCLIP:
    return FrozenCLIP.load(str(tiny_clip_folder))


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    """Smooth pictures in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def rewrite(folder: Path, **text_changes: Any) -> None:
    body = json.loads((folder / CONFIG_FILE).read_text())
    body["model_cfg"]["text_cfg"].update(text_changes)
    (folder / CONFIG_FILE).write_text(json.dumps(body))


# ---- frozen ------------------------------------------------------------------------------------------------


def test_shapes_are_read_from_the_model(clip: FrozenCLIP) -> None:
    assert (clip.embedding_dim, clip.token_dim, clip.context_length, clip.image_size) == (16, 24, 12, 16)
    assert clip.mean.flatten().tolist() == clip.std.flatten().tolist() == [0.5] * 3


def test_it_stays_frozen(clip: FrozenCLIP) -> None:
    assert clip.train() is clip
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert sum(p.numel() for p in clip.parameters()) > 10_000
    images = pictures(2).requires_grad_()
    for result in (clip.encode_image(images), clip.encode_text(["a star"]).embedding):
        assert not result.requires_grad and result.dtype == torch.float32


def test_embeddings_have_unit_length(clip: FrozenCLIP) -> None:
    text, image = clip.encode_text(["a star", "two rings", ""]), clip.encode_image(pictures(3))
    for embedding in (text.embedding, image):
        assert embedding.shape == (3, 16)
        assert torch.allclose(embedding.norm(dim=1), torch.ones(3), atol=1e-5)
        assert not torch.allclose(embedding[0], embedding[1], atol=1e-3)
    raw = clip.model.encode_text(clip.tokenizer(["a star"], context_length=12))  # type: ignore[operator]
    assert torch.allclose(text.embedding[0], F.normalize(raw, dim=1)[0], atol=1e-6)


# ---- text --------------------------------------------------------------------------------------------------


def test_token_features_are_the_models_own_final_norm(clip: FrozenCLIP) -> None:
    """Computed again through the model's layers, without the hook that FrozenCLIP uses."""
    captions, model = ["a red star", "ring"], clip.model
    ids = clip.tokenizer(captions, context_length=12)
    with torch.no_grad():
        x = model.token_embedding(ids) + model.positional_embedding  # type: ignore[operator]
        x = model.transformer(x, attn_mask=model.attn_mask)  # type: ignore[operator]
        expected = model.ln_final(x)  # type: ignore[operator]
    features = clip.encode_text(captions)
    assert features.tokens.shape == (2, 12, 24)
    assert torch.allclose(features.tokens, expected * features.mask[..., None], atol=1e-5)
    assert bool((features.tokens[~features.mask] == 0).all())
    end = ids.argmax(dim=1)
    pooled = expected[torch.arange(2), end] @ model.text_projection  # type: ignore[operator]
    assert torch.allclose(features.embedding, F.normalize(pooled, dim=1), atol=1e-5)


@pytest.mark.parametrize("caption", ["", "a", "a red star", "a red star on a blue ground", "ünïcode ☂"])
def test_mask_covers_start_to_end_token(clip: FrozenCLIP, caption: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = clip.encode_text([caption]).mask[0]
    length = min(len(clip.tokenizer.encode(caption)) + 2, 12)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True] * length + [False] * (12 - length)


def test_long_prompt_is_cut_with_the_dropped_words_quoted(clip: FrozenCLIP) -> None:
    whole = clip.tokenizer.encode(LONG)
    assert len(whole) > 10  # the vocabulary spells some of the words
    dropped = clip.tokenizer.decode(whole[10:]).strip()
    assert dropped and LONG.endswith(dropped)
    with pytest.warns(UserWarning, match=f"longer than CLIP's 12 tokens.*dropped: '{dropped}'"):
        features = clip.encode_text(["a star", LONG])
    assert features.mask.sum(dim=1).tolist()[1] == 12
    fitting = clip.tokenizer.decode(whole[:10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = clip.encode_text([fitting])
    assert len(clip.tokenizer.encode(fitting)) == 10  # full to the last place, and nothing to warn of
    assert torch.allclose(exact.embedding[0], features.embedding[1], atol=1e-5)


def test_captions_do_not_influence_each_other(clip: FrozenCLIP) -> None:
    together, alone = clip.encode_text(["a star", "two red rings"]), clip.encode_text(["two red rings"])
    assert torch.allclose(together[1:].embedding, alone.embedding, atol=1e-5)
    assert torch.allclose(together[1:].tokens, alone.tokens, atol=1e-5)


def test_text_features_are_indexed_together() -> None:
    features = TextFeatures(torch.randn(4, 3, 2), torch.rand(4, 3) > 0.5, torch.randn(4, 5))
    part = features[[2, 0]]
    assert len(features) == 4 and len(part) == 2
    assert torch.equal(part.tokens, features.tokens[[2, 0]]) and torch.equal(part.mask, features.mask[[2, 0]])
    assert torch.equal(part.to("cpu").embedding, features.embedding[[2, 0]])


# ---- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(16, 16), (64, 64), (7, 5), (33, 90), (1, 1)])
def test_images_of_any_size(clip: FrozenCLIP, height: int, width: int) -> None:
    embedding = clip.encode_image(pictures(2, height, width))
    assert embedding.shape == (2, 16)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)
    if height >= 16:  # the same picture, only sampled more finely
        assert float((embedding * clip.encode_image(pictures(2))).sum(1).min()) > 0.98


def test_images_are_normalised_as_the_model_wants(tiny_clip_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_clip_folder, tmp_path)
    body = json.loads((folder / CONFIG_FILE).read_text())
    body["preprocess_cfg"].update(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    (folder / CONFIG_FILE).write_text(json.dumps(body))
    clip = FrozenCLIP.load(str(folder))
    seen: list[Tensor] = []
    clip.model.visual.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # type: ignore[union-attr]
    clip.encode_image(torch.zeros(1, 3, 16, 16))
    expected = (0.5 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    assert torch.allclose(seen[0][0, :, 4, 4], expected)


# ---- memory ------------------------------------------------------------------------------------------------


def test_memo_gives_the_clips_answers_and_asks_once(clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    memo, images = EmbeddingMemo(clip, 10), pictures(3)
    captions = ["a star", "two rings", "a star"]
    expected_text, expected = clip.encode_text(captions), clip.encode_image(images)
    asked: list[int] = []
    encode_image, encode_text = clip.encode_image, clip.encode_text
    monkeypatch.setattr(clip, "encode_image", lambda x, **how: (asked.append(len(x)), encode_image(x, **how))[1])
    monkeypatch.setattr(clip, "encode_text", lambda x: (asked.append(len(x)), encode_text(x))[1])
    for _ in range(2):
        assert torch.allclose(memo.encode_image(images), expected, atol=1e-6)
        text = memo.encode_text(captions)
        assert torch.allclose(text.tokens, expected_text.tokens, atol=1e-6)
        assert torch.allclose(text.embedding, expected_text.embedding, atol=1e-6)
        assert torch.equal(text.mask, expected_text.mask)
    assert asked == [3, 2]  # once each, and a caption that comes twice is one
    flipped = memo.encode_image(images.flip(3))
    assert torch.allclose(flipped, encode_image(images.flip(3)), atol=1e-6)
    for _ in range(2):  # a full memory forgets and goes on
        many = pictures(40).roll(1, dims=0)
        assert torch.allclose(EmbeddingMemo(clip, 5).encode_image(many), encode_image(many), atol=1e-5)


def test_raw_embeddings_have_the_clips_own_length(clip: FrozenCLIP) -> None:
    """For systems that do not normalise, as Karlo: the same directions; a text embedding's length stands beside it."""
    images, captions = pictures(3), ["a star", "two rings"]
    raw = clip.encode_image(images, unit_length=False)
    assert torch.equal(torch.nn.functional.normalize(raw, dim=1), clip.encode_image(images))
    assert not torch.allclose(raw.norm(dim=1), torch.ones(3), atol=1e-2)
    assert torch.equal(EmbeddingMemo(clip, 5, unit_length=False).encode_image(images), raw)
    text = clip.encode_text(captions)
    ids, _ = clip.token_ids(captions)
    assert text.norm is not None
    assert torch.allclose(text.embedding * text.norm[:, None], clip.model.encode_text(ids), atol=1e-5)
    remembered = EmbeddingMemo(clip, 5).encode_text(captions)
    assert remembered.norm is not None and torch.allclose(remembered.norm, text.norm, atol=1e-5)
    assert torch.equal(text[1:].norm, text.norm[1:])  # type: ignore[arg-type]


# ---- loading -----------------------------------------------------------------------------------------------


def test_loaded_model_is_the_saved_one(tiny_clip_folder: Path, clip: FrozenCLIP, tmp_path: Path) -> None:
    model = open_clip.create_model(f"local-dir:{tiny_clip_folder}")
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    moved = FrozenCLIP.load(str(copied(tiny_clip_folder, tmp_path)))  # nothing depends on where it lies
    assert torch.equal(moved.encode_text(["a star"]).embedding, clip.encode_text(["a star"]).embedding)


def test_weights_of_any_size_are_one_file(
    tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip reads no shards, so the bound that other parts' files keep does not hold here."""
    monkeypatch.setattr("unclip.bundle.MAX_SHARD_BYTES", 10_000)
    config = json.loads((tiny_clip_folder / CONFIG_FILE).read_text())["model_cfg"]
    write_vocabulary(tmp_path / "bpe_vocabulary.txt.gz", 400)
    model, _ = build_trainable(config, tmp_path)
    state = {**model.state_dict(), "logit_scale": torch.tensor(2.0)}
    save_folder(tmp_path / "model", config, state, tmp_path / "bpe_vocabulary.txt.gz")
    loaded = FrozenCLIP.load(str(tmp_path / "model")).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


def test_folder_without_configuration(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UnclipError, match=rf"{CONFIG_FILE} is missing \(found: weights\.bin\)"):
        FrozenCLIP.load(str(tmp_path))


def test_folder_without_vocabulary(tiny_clip_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_clip_folder, tmp_path)
    next(folder.glob("*.gz")).unlink()
    with pytest.raises(UnclipError, match=r"vocabulary 'bpe_vocabulary\.txt\.gz' is missing"):
        FrozenCLIP.load(str(folder))


def test_vocabulary_is_not_taken_from_outside_the_folder(tiny_clip_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_clip_folder, tmp_path)
    shutil.move(next(folder.glob("*.gz")), tmp_path / "outside.gz")
    rewrite(folder, tokenizer_kwargs={"bpe_path": "../outside.gz"})
    with pytest.raises(UnclipError, match=r"vocabulary '\.\./outside\.gz' is missing"):
        FrozenCLIP.load(str(folder))


@pytest.mark.parametrize("damage", ["missing", "garbled", "other shape"])
def test_folder_with_bad_weights(tiny_clip_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = copied(tiny_clip_folder, tmp_path)
    weights = folder / "open_clip_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "garbled":
        weights.write_bytes(b"no safetensors")
    else:
        rewrite(folder, width=32)
    with pytest.raises(UnclipError, match="cannot be loaded"):
        FrozenCLIP.load(str(folder))


def test_names_that_cannot_be_loaded() -> None:
    with pytest.raises(UnclipError, match=r"no CLIP called 'ViT-Q-99'.*hf-hub:user/name"):
        FrozenCLIP.load("ViT-Q-99")
    with pytest.raises(UnclipError, match=r"'RN50' alone has random weights.*'RN50/openai'"):
        FrozenCLIP.load("RN50")
    with pytest.raises(UnclipError, match="'RN50' cannot be loaded"):
        FrozenCLIP.load("RN50/no_such_tag")


# ---- training one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merges", [0, 400, 48894])
def test_vocabulary_keeps_the_commonest_merges(tmp_path: Path, merges: int) -> None:
    file = tmp_path / "vocabulary.txt.gz"
    size = write_vocabulary(file, merges)
    tokenizer, whole = open_clip.SimpleTokenizer(bpe_path=str(file)), open_clip.SimpleTokenizer()
    assert size == tokenizer.vocab_size == 514 + merges
    assert tokenizer.eot_token_id == size - 1
    for words in ("a pizza", "the red circle ☂"):
        assert tokenizer.decode(tokenizer.encode(words)).strip() == words  # everything can be spelled
        assert len(tokenizer.encode(words)) >= len(whole.encode(words))
    if merges == 48894:
        assert tokenizer.encode(LONG) == whole.encode(LONG)
    with gzip.open(file) as lines:
        assert len(lines.read().decode().split("\n")) == merges + 1
    again = tmp_path / "again.txt.gz"
    write_vocabulary(again, merges)
    assert again.read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.txt.gz", "vocabulary.txt.gz"]


def test_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    config = parse_config(ClipConfig, {"vocabulary_merges": 100}).open_clip_config()
    write_vocabulary(tmp_path / "bpe_vocabulary.txt.gz", 200)
    with pytest.raises(UnclipError, match="vocab_size is 614, the tokenizer has 714"):
        build_trainable(config, tmp_path)


def test_loss_is_the_symmetric_cross_entropy() -> None:
    image, text = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    logits = 30 * image @ text.T
    expected = -(logits.log_softmax(0).diagonal().mean() + logits.log_softmax(1).diagonal().mean()) / 2
    assert clip_loss(image, text, torch.tensor(30.0)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_crowding_loss_counts_the_dimensions_in_use() -> None:
    from unclip.training.clip import crowding_loss

    eye = torch.eye(16)
    spread = torch.cat([eye, -eye])  # covariance a multiple of the identity: all sixteen alike
    torch.testing.assert_close(crowding_loss(spread), torch.tensor(0.0), atol=1e-6, rtol=0)
    four = torch.cat([eye[:4], -eye[:4]])
    torch.testing.assert_close(crowding_loss(four), torch.tensor(4.0).log())
    torch.testing.assert_close(crowding_loss(torch.cat([eye[:1], -eye[:1]])), torch.tensor(16.0).log())
    shifted = torch.nn.functional.normalize(four + 3 * eye[5], dim=1)  # a common component is no use of a dimension
    torch.testing.assert_close(crowding_loss(shifted), torch.tensor(4.0).log())


def test_training_may_go_on_from_a_clip(tiny_clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from unclip.training.clip import carry_over

    shape = parse_config(ClipConfig, TINY_CLIP).open_clip_config()
    torch.manual_seed(5)
    model, _ = build_trainable(shape, tiny_clip_folder)
    carry_over(model, str(tiny_clip_folder))
    for name, value in load_file(tiny_clip_folder / "open_clip_model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name].reshape(value.shape), value.float(), msg=name)
    wider = parse_config(ClipConfig, {**TINY_CLIP, "embed_dim": 48}).open_clip_config()
    with pytest.raises(UnclipError, match=r"do not fit .*48"):
        carry_over(build_trainable(wider, tiny_clip_folder)[0], str(tiny_clip_folder))
    with pytest.raises(UnclipError, match=r"init_from names .* no open_clip_model\.safetensors"):
        carry_over(model, str(tmp_path))
    shutil.copytree(tiny_clip_folder, tmp_path / "model")
    (tmp_path / "model" / "open_clip_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(UnclipError, match="damaged"):
        carry_over(model, str(tmp_path))
