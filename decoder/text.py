"""What a decoder takes of a caption: CLIP's token features, ids for its own transformer, or a frozen T5's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decoder.config import DecoderConfig, GlideText, T5Text
from decoder.t5 import FrozenT5
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.errors import UnclipError
from unclip.nn.blocks import zeroed
from unclip.nn.embeddings import random_parameter


class TextTransformer(nn.Module):
    """GLIDE's text encoder (GLIDE, §3.1): every token attends to every other; the features of all become context, those
    of the last are added to the timestep embedding. A learned row for each position stands in the place of padding,
    so that the last position holds a summary of the caption whatever its length; nothing but padding is the null
    caption. The Transformer is x-transformers', pre-norm with a final norm.
    """

    def __init__(self, config: GlideText, checkpoint_activations: bool = False) -> None:
        from unclip.nn.transformers import Encoder

        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        width = config.width
        self.tokens = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = random_parameter(config.length, width, std=0.01)
        self.padding = random_parameter(config.length, width, std=0.02)
        self.transformer = Encoder(
            dim=width,
            depth=config.depth,
            heads=config.heads,
            attn_dim_head=width // config.heads,
            attn_dropout=config.dropout,
            ff_dropout=config.dropout,
            attn_flash=True,
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64, mask (B, L) bool, True = real token -> features (B, L, W)."""
        x = torch.where(mask[..., None], self.tokens(ids) + self.positions, self.padding)
        if self.checkpoint_activations and self.training:
            result: Tensor = checkpoint(self.transformer, x, use_reentrant=False)
            return result
        return self.transformer(x)  # type: ignore[no-any-return]


class TextSeed(nn.Module):
    """A caption as a map for the lowest feature map: a learned query for each place attends to the caption's context
    tokens, and a feed-forward layer makes features of what it found. Of scenes, this reads which thing stands where off
    the CLIP's token features, also in combinations that it never met, which no reader finds in the image embedding
    (docs/bundled-model.md). Ends in zeros.
    """

    def __init__(self, size: int, channels: int, context_dim: int, head_channels: int) -> None:
        from unclip.nn.transformers import CrossAttender

        super().__init__()
        self.size = size
        self.queries = random_parameter(size * size, channels, std=0.5)
        self.attender = CrossAttender(
            dim=channels,
            depth=1,
            heads=max(channels // head_channels, 1),
            attn_dim_head=head_channels,
            cross_attn_dim_context=context_dim,
            attn_flash=True,
        )
        self.to_map = zeroed(nn.Linear(channels, channels))

    def forward(self, context: Tensor, mask: Tensor) -> Tensor:
        """context (B, L, C), mask (B, L) bool, True = may be seen -> (B, channels, size, size)."""
        queries = self.queries.to(context.dtype).expand(len(context), -1, -1)
        found = self.to_map(self.attender(queries, context=context, context_mask=mask))
        return found.transpose(1, 2).unflatten(2, (self.size, self.size))


class CaptionEncoder:
    """Captions -> what a decoder of this configuration takes of them, as `TextFeatures`.

    `text.kind` clip: the CLIP's own features. glide: `tokens` are ids (B, L) int64. t5: `tokens` are the T5's features.
    `embedding` is the CLIP text embedding (B, E), or (B, 0) where the decoder has no use for it.
    Raises UnclipError: the CLIP or the T5 is not the one that the decoder was trained with, or cannot be loaded.
    """

    def __init__(self, config: DecoderConfig, clip: FrozenCLIP) -> None:
        self.config, self.clip = config, clip
        self._t5: FrozenT5 | None = None
        if isinstance(config.text, GlideText) and config.text.vocab_size != clip.vocab_size:
            raise UnclipError(
                f"the decoder's text transformer knows {config.text.vocab_size} tokens, the CLIP's vocabulary has "
                f"{clip.vocab_size}; use the CLIP that it was trained with"
            )
        if isinstance(config.text, T5Text):
            self._t5 = FrozenT5.load(config.text.name, clip.device)
            self._t5.cuts = clip.cuts
            if self._t5.width != config.text.width:
                raise UnclipError(
                    f"the text encoder {config.text.name!r} gives features {self._t5.width} wide, the decoder takes "
                    f"{config.text.width}; name the one that it was trained with"
                )

    def encode_text(self, captions: Sequence[str], features: TextFeatures | None = None) -> TextFeatures:
        """`features`, if they are known already, are the CLIP's of the same captions."""
        text = self.config.text
        if text.kind == "clip":
            return self.clip.encode_text(captions) if features is None else features
        if isinstance(text, GlideText):
            tokens, mask = self.clip.token_ids(captions, text.length)
        else:
            assert self._t5 is not None
            tokens, mask = self._t5.encode(self.clip.in_words(captions), text.length)
        if not self.config.text_embedding_to_time:
            return TextFeatures(tokens, mask, torch.zeros(len(tokens), 0, device=tokens.device))
        features = self.clip.encode_text(captions) if features is None else features
        return TextFeatures(tokens, mask, features.embedding, features.norm)


def text_embedding(text: TextFeatures, config: DecoderConfig) -> Tensor:
    """The CLIP text embedding (B, E) of the length that the decoder takes. UnclipError: its length is not known."""
    if config.embedding_length == "unit":
        return text.embedding
    if text.norm is None:
        raise UnclipError("this decoder takes embeddings of raw length; pass text features as FrozenCLIP gives them")
    return text.embedding * text.norm[:, None]


def null_text_state(empty: TextFeatures, config: DecoderConfig) -> dict[str, Tensor]:
    """The network's buffers for `null_text: clip` from the CLIP's features of '' (a batch of one)."""
    return {
        "null_text": empty.tokens[0],
        "null_mask": empty.mask[0],
        "null_text_embedding": text_embedding(empty, config)[0],
    }


def with_text_widths(config: DecoderConfig, clip: Mapping[str, int]) -> dict[str, Any]:
    """The entries of a decoder's configuration that the CLIP (`EmbeddingMemo.widths`) and the text encoder decide."""
    names = ("embedding_dim", "token_dim", "text_length")
    widths: dict[str, Any] = {name: clip[name] for name in names if name in clip}
    text = config.text
    if isinstance(text, GlideText) and "vocab_size" in clip:
        widths["text"] = {**text.model_dump(), "vocab_size": clip["vocab_size"]}
    if isinstance(text, T5Text):
        widths["text"] = {**text.model_dump(), "width": FrozenT5.width_of(text.name)}
    return widths
