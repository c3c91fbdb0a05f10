"""Where a decoder's context tokens come from: the frozen CLIP, a text transformer of its own, a frozen T5."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_decoder import DIM, SIZE, config, network, overfit, rand, stage, text, unit, worst_error
from helpers_t5 import save_tiny_t5
from torch import Tensor

from decoder import CaptionEncoder, Decoder, DecoderConfig
from decoder.config import GlideText
from decoder.t5 import FrozenT5
from decoder.text import TextSeed, TextTransformer, with_text_widths
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.config import DataConfig, parse_config
from unclip.errors import UnclipError, UsageError
from unclip.notices import CaptionCut
from unclip.training import EmbeddingMemo, open_memo

GLIDE: dict[str, Any] = {"kind": "glide", "vocab_size": 20, "length": 6, "width": 16, "depth": 2, "heads": 2}
CAPTIONS = ["a red disc", "the green disc on the left", "blue", "a disc below the disc on the right"]


@pytest.fixture(scope="module")
def clip(tiny_clip_folder: Path) -> FrozenCLIP:
    return FrozenCLIP.load(str(tiny_clip_folder))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    save_tiny_t5(folder)
    return folder


@pytest.fixture(scope="module")
def t5(t5_folder: Path) -> FrozenT5:
    return FrozenT5.load(str(t5_folder))


def for_clip(clip: FrozenCLIP, **changes: Any) -> DecoderConfig:
    plain = config(**changes)
    return parse_config(DecoderConfig, {**plain.model_dump(), **with_text_widths(plain, EmbeddingMemo(clip, 0).widths)})


def ids(count: int = 4) -> TextFeatures:
    """Token ids with their padding, as CaptionEncoder gives them to a decoder with a text transformer."""
    mask = torch.arange(6) < torch.arange(3, 3 + count)[:, None]
    drawn = torch.randint(1, 20, (count, 6), generator=torch.Generator().manual_seed(0))
    return TextFeatures(drawn * mask, mask, torch.zeros(count, 0))


# ---- a map of the caption ----------------------------------------------------------------------------------


def test_text_seed_attends_by_the_formula() -> None:
    """softmax(q k^T / sqrt(d)) v over the tokens that may be seen, then a feed-forward layer, each added to queries."""
    seed = TextSeed(2, 16, context_dim=6, head_channels=8).eval().requires_grad_(False)
    torch.nn.init.normal_(seed.to_map.weight)
    context, mask = rand(3, 5, 6), torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False, True] * 2 + [True]])
    norm_a, attention = seed.attender.layers[0][0][0], seed.attender.layers[0][1]
    norm_f, feed_forward = seed.attender.layers[1][0][0], seed.attender.layers[1][1]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 8)).transpose(-3, -2)

    expected = []
    for tokens, seen in zip(context, mask, strict=True):
        x = seed.queries
        q = heads(attention.to_q(norm_a(x)))
        k, v = (heads(project(tokens[seen])) for project in (attention.to_k, attention.to_v))
        found = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        x = x + attention.to_out(found.transpose(0, 1).flatten(1))
        x = x + feed_forward(norm_f(x))
        expected.append(seed.to_map(seed.attender.final_norm(x)).T.reshape(16, 2, 2))
    assert torch.allclose(seed(context, mask), torch.stack(expected), atol=1e-5)


def test_text_seed_reads_combinations_that_it_never_met() -> None:
    """Two of six things, the first above the second; the pairs (i, 5 - i) are kept for the test."""
    torch.manual_seed(0)
    things, order, looks = torch.randn(6, 12), torch.randn(2, 12), torch.randn(6, 16)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    held = pairs.sum(1) == 5
    seed = TextSeed(2, 16, context_dim=12, head_channels=8)
    optimizer = torch.optim.Adam(seed.parameters(), lr=3e-3)

    def error(chosen: Tensor) -> Tensor:
        """Squared distances (N, 4 places, 6 things) of every place's features from every thing's."""
        drawn = seed(things[chosen] + order, torch.ones(len(chosen), 2, dtype=torch.bool))
        return (drawn.flatten(2).transpose(1, 2)[:, :, None] - looks).square().mean(-1)

    def shown(chosen: Tensor) -> Tensor:
        return chosen.repeat_interleave(2, dim=1)  # two places above, two below

    for _ in range(150):
        loss = error(pairs[~held]).gather(2, shown(pairs[~held])[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(error(pairs[~held]).argmin(2), shown(pairs[~held]))
        assert torch.equal(error(pairs[held]).argmin(2), shown(pairs[held]))


# ---- a text transformer of its own -------------------------------------------------------------------------


def test_text_transformer_reads_padding_as_learned_rows() -> None:
    transformer = TextTransformer(parse_config(GlideText, GLIDE)).eval().requires_grad_(False)
    given = ids()
    features = transformer(given.tokens, given.mask)
    assert features.shape == (4, 6, 16)
    # What stands under the padding does not matter; what the padding's rows hold does, and reaches every token.
    other = torch.where(given.mask, given.tokens, 7)
    assert torch.equal(features, transformer(other, given.mask))
    transformer.padding[5] += rand(16)
    changed = (transformer(given.tokens, given.mask) - features).abs().amax(dim=2)
    assert bool((changed[:3] > 1e-4).all()) and not changed[3].any()  # the last caption fills all six places
    # No mask is causal: the first token sees the last.
    swapped = given.tokens.clone()
    swapped[3, 5] = 1 + swapped[3, 5] % 19
    assert float((transformer(swapped, given.mask) - transformer(given.tokens, given.mask))[3, 0].abs().max()) > 1e-4


def test_all_tokens_become_context_and_the_last_is_added_to_time() -> None:
    decoder, given = network(text=GLIDE), ids(2)
    calls: list[tuple[Any, ...]] = []
    decoder.unet.register_forward_pre_hook(lambda _module, args: calls.append(args))
    no = torch.zeros(2, dtype=torch.bool)
    z = unit(2)
    condition = {"image_embedding": z, "text_tokens": given.tokens, "text_mask": given.mask}
    decoder(rand(2, 3, SIZE, SIZE), torch.tensor([3, 900]), **condition, drop_embedding=no, drop_text=no)
    _, _, time, context, mask, _ = calls[-1]
    assert decoder.text_transformer is not None
    features = decoder.text_transformer(given.tokens, given.mask)
    assert torch.allclose(context[:, :6], decoder.text_to_tokens(features), atol=1e-6)
    expected = decoder.embedding_to_time(z * DIM**0.5) + decoder.last_token_to_time(features[:, -1])
    assert torch.allclose(time, expected, atol=1e-5) and bool(mask.all())
    # A dropped caption is one without tokens, whatever it was.
    decoder(rand(2, 3, SIZE, SIZE), torch.tensor([3, 900]), **condition, drop_embedding=no, drop_text=~no)
    empty = decoder.text_transformer(given.tokens * 0, given.mask & False)
    assert torch.allclose(calls[-1][3][:, :6], decoder.text_to_tokens(empty), atol=1e-6)
    assert not any("null_text" in name for name in decoder.state_dict())


def test_checkpointed_text_transformer_has_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        transformer = TextTransformer(parse_config(GlideText, GLIDE), checkpointed).train()
        transformer(ids().tokens, ids().mask).square().sum().backward()
        found.append([p.grad for p in transformer.parameters()])
    assert len(found[0]) > 10
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- captions ----------------------------------------------------------------------------------------------


def test_clip_features_are_taken_as_they_are(clip: FrozenCLIP) -> None:
    features = clip.encode_text(CAPTIONS)
    encoder = CaptionEncoder(for_clip(clip), clip)
    assert encoder.encode_text(CAPTIONS, features) is features
    assert torch.equal(encoder.encode_text(CAPTIONS).tokens, features.tokens)


def test_token_ids_are_the_clips_own_at_any_length(clip: FrozenCLIP) -> None:
    own = for_clip(clip, text={**GLIDE, "length": 20})
    assert isinstance(own.text, GlideText) and own.text.vocab_size == clip.vocab_size
    found = CaptionEncoder(own, clip).encode_text(CAPTIONS)
    assert found.tokens.shape == (4, 20) and found.tokens.dtype == torch.long
    assert 0 <= int(found.tokens.min()) <= int(found.tokens.max()) < clip.vocab_size
    assert found.embedding.shape == (4, 0)  # nobody asked for it
    short, mask = clip.token_ids(["disc"])
    assert short.shape == (1, clip.context_length)
    longer, wide = clip.token_ids(["disc"], 20)
    assert torch.equal(longer[wide], short[mask])  # start, tokens, end
    with pytest.warns(UserWarning, match=r"the text encoder's 3 tokens and was cut; dropped: 'sc on the left'"):
        clip.token_ids(["disc on the left"], 3)
    both = for_clip(clip, text=GLIDE, text_embedding_to_time=True)
    assert torch.equal(CaptionEncoder(both, clip).encode_text(CAPTIONS).embedding, clip.encode_text(CAPTIONS).embedding)


def test_a_vocabulary_of_another_size_is_refused(clip: FrozenCLIP) -> None:
    with pytest.raises(UnclipError, match=rf"knows 20 tokens, the CLIP's vocabulary has {clip.vocab_size}; use"):
        CaptionEncoder(config(text=GLIDE), clip)


# ---- T5 ----------------------------------------------------------------------------------------------------


def test_frozen_t5_gives_features_of_its_encoder(t5: FrozenT5, t5_folder: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    tokens, mask = t5.encode(CAPTIONS[:2], 9)
    assert tokens.shape == (2, 9, 16) and tokens.dtype == torch.float32 and mask.sum(1).tolist() == [4, 7]
    assert not tokens[~mask].any() and t5.width == FrozenT5.width_of(str(t5_folder)) == 16
    batch = AutoTokenizer.from_pretrained(t5_folder)(CAPTIONS[0], return_tensors="pt")
    with torch.no_grad():
        alone = T5EncoderModel.from_pretrained(t5_folder)(**batch).last_hidden_state
    assert torch.allclose(tokens[:1, :4], alone, atol=1e-5)
    assert not t5.train().training and not any(p.requires_grad for p in t5.parameters())
    with pytest.warns(UserWarning, match=r"longer than the text encoder's 4 tokens and was cut; dropped: 'below'"):
        t5.encode(["a red disc below"], 4)


def test_widths_come_from_the_encoder(clip: FrozenCLIP, t5_folder: Path) -> None:
    own = for_clip(clip, text={"kind": "t5", "name": str(t5_folder), "length": 9, "width": 99})
    assert own.text.width == 16 and own.feature_dim == 16 and own.context_length == 9  # type: ignore[union-attr]
    found = CaptionEncoder(own, clip).encode_text(CAPTIONS)
    assert found.tokens.shape == (4, 9, 16)
    Decoder(own)
    wide = own.model_copy(update={"text": own.text.model_copy(update={"width": 24})})
    with pytest.raises(UnclipError, match=r"gives features 16 wide, the decoder takes 24"):
        CaptionEncoder(wide, clip)


def test_a_run_tells_of_the_first_caption_that_is_cut_alone(tiny_clip_folder: Path, t5_folder: Path) -> None:
    memo = open_memo(DataConfig(source="synthetic"), str(tiny_clip_folder), torch.device("cpu"))
    long = "a red circle left of a blue square on a white background"
    with pytest.warns(CaptionCut, match="captions longer than CLIP's 12 tokens are cut; the first") as told:
        assert memo.encode_text([long, long + " below"]).mask.all()
        memo.encode_text([long])
    assert len(told) == 1
    reader = for_clip(memo.clip, text={"kind": "t5", "name": str(t5_folder), "length": 4, "width": 99})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the T5 beside the CLIP counts with it
        assert CaptionEncoder(reader, memo.clip).encode_text([long]).mask.all()


def test_text_encoders_that_are_not_there(
    tmp_path: Path, t5_folder: Path, monkeypatch: pytest.MonkeyPatch, clip: FrozenCLIP
) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UnclipError, match=r"is no text encoder: config\.json is missing \(found: notes\.txt\)"):
        FrozenT5.load(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnclipError, match=r"no text encoder 'nowhere/at-all': it is no folder here"):
        FrozenT5.load("nowhere/at-all")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnclipError, match=r"needs the package transformers; .*pip install 'unclip\[t5\]'"):
        FrozenT5.load(str(t5_folder))
    with pytest.raises(UnclipError, match="needs the package transformers"):
        for_clip(clip, text={"kind": "t5", "name": str(t5_folder)})


# ---- configuration and sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": {"kind": "glide", "width": 10, "heads": 3}}, r"text: heads 3 does not divide width 10"),
        ({"text": {"kind": "t5"}}, r"text\.name: field required"),
        ({"text": {"kind": "bert"}}, r"text.*'clip', 'glide', 't5'"),
        ({"text": {**GLIDE, "wdth": 3}}, r"unknown key 'text\.wdth'; did you mean 'text\.width'"),
        ({"text": GLIDE, "null_text": "clip"}, r"null_text 'clip' needs text\.kind 'clip', and it is 'glide'"),
    ],
)
def test_text_configurations_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_features_of_another_kind_are_refused(t5_folder: Path) -> None:
    with pytest.raises(UnclipError, match=r"\(1, 5, 10\) and type float32; this decoder takes \(1, 6\): token ids"):
        stage(text=GLIDE).sample(unit(1), [0], text=text(1))
    with pytest.raises(UnclipError, match=r"\(1, 6\) and type int64; this decoder takes \(1, 5, 10\): token features"):
        stage().sample(unit(1), [0], text=ids(1))
    with pytest.raises(UnclipError, match=r"takes \(1, 9, 16\): features of its T5"):
        name = str(t5_folder)
        stage(text={"kind": "t5", "name": name, "length": 9, "width": 16}).sample(unit(1), [0], text=text(1))


def test_ids_are_sampled_like_features() -> None:
    own, given = stage(text=GLIDE), ids(3)
    together = own.sample(unit(3), [5, 6, 5], text=given)
    assert torch.allclose(own.sample(unit(3)[1:2], [6], text=given[1:2])[0], together[1], atol=1e-4)
    assert not torch.allclose(own.sample(unit(3), [5, 6, 5]), together, atol=1e-2)


# ---- learning ----------------------------------------------------------------------------------------------


def _clip_features(_t5: FrozenT5) -> tuple[dict[str, Any], TextFeatures]:
    return {}, text(4)


def _glide_ids(_t5: FrozenT5) -> tuple[dict[str, Any], TextFeatures]:
    return {"text": GLIDE}, ids()


def _t5_features(t5: FrozenT5) -> tuple[dict[str, Any], TextFeatures]:
    tokens, mask = t5.encode(CAPTIONS, 9)
    body = {"text": {"kind": "t5", "name": "tiny", "length": 9, "width": 16}}
    return body, TextFeatures(tokens, mask, torch.zeros(4, 0))


@pytest.mark.parametrize("source", [_clip_features, _glide_ids, _t5_features])
def test_pictures_are_learned_from_captions_alone(
    source: Callable[[FrozenT5], tuple[dict[str, Any], TextFeatures]], t5: FrozenT5
) -> None:
    """From pure noise x̂_0 is the caption's picture, and another's with another caption."""
    body, features = source(t5)
    diffusion = {"prediction": "x_start", "timestep_bias": 4}
    own = config(**body, drop_embedding=1.0, drop_text=0.0, diffusion=diffusion)
    trained, history = overfit(own, unit(4, 7), features, steps=100, lr=8e-3)
    assert sum(history[-10:]) / 10 < 0.1 * history[0]

    def drawn(given: TextFeatures) -> Tensor:
        return trained.sample(None, range(4), text=given, steps=1, sampler="ddim", guidance=1.0)

    assert worst_error(drawn(features)) < 1.3 < 2.0 < worst_error(drawn(features[[3, 2, 1, 0]]))
