"""The unCLIP decoder's network: a GLIDE U-Net conditioned on a CLIP image embedding and a caption (unCLIP §2.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoder.config import DecoderConfig, GlideText
from decoder.text import TextSeed, TextTransformer, null_text_state
from unclip.clip import TextFeatures
from unclip.nn import UNet, timestep_embedding
from unclip.nn.attention import is_watched
from unclip.nn.blocks import ContextMemory, zeroed
from unclip.nn.embeddings import random_parameter


class ReadCondition(NamedTuple):
    """What the U-Net takes of the conditioning."""

    time: Tensor  # (B, 4·model_channels), added to the timestep embedding
    context: Tensor | ContextMemory  # (B, N, C)
    mask: Tensor  # (B, N), True = may be seen
    seed: Tensor | None  # (B, channels, h, w) for the lowest feature map
    known_image: Tensor | None = None
    known: Tensor | None = None


class Decoder(nn.Module):
    """The image embedding is added to the timestep embedding and becomes extra context tokens beside the caption's.

    A dropped image embedding is replaced by a learned one. A dropped caption is replaced by learned rows of token
    features, by the CLIP's features of '' (`null_text: clip`, see `set_null_text`), or, with a text transformer of the
    decoder's own, by a caption without tokens.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        out_channels = 2 * channels if config.diffusion.variance == "learned_range" else channels
        in_channels = 2 * channels + 1 if config.inpainting else channels
        self.unet = UNet(config.unet, in_channels, out_channels, config.context_dim)
        dim, time_dim = config.embedding_dim, self.unet.embedding_dim
        self.embedding_to_time = nn.Linear(dim, time_dim)
        self.embedding_to_tokens = nn.Linear(dim, config.image_tokens * config.context_dim)
        self.text_transformer: TextTransformer | None = None
        if isinstance(config.text, GlideText):
            self.text_transformer = TextTransformer(config.text, config.unet.checkpoint_activations)
            self.text_to_tokens = nn.Linear(config.text.width, config.context_dim)
            self.last_token_to_time = nn.Linear(config.text.width, time_dim)
        else:
            assert config.feature_dim is not None
            self.text_to_tokens = nn.Linear(config.feature_dim, config.context_dim)
            self.text_norm = nn.LayerNorm(config.context_dim)
        self.null_embedding = nn.Parameter(torch.zeros(dim))
        self._make_null_text()
        if config.text_embedding_to_time:
            self.text_embedding_to_time = nn.Linear(dim, time_dim)
        self.seed = (
            nn.Linear(dim, self.unet.bottom_channels * self.unet.bottom_size**2) if config.spatial_seed else None
        )
        self.text_seed: TextSeed | None = None
        if config.text_seed:
            bottom = self.unet.bottom_channels
            self.text_seed = TextSeed(self.unet.bottom_size, bottom, config.context_dim, config.unet.head_channels)
        if config.embedding_hidden:
            hidden = config.embedding_hidden
            self.embedding_features = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
            self.features_to_time = zeroed(nn.Linear(hidden, time_dim))
            self.features_to_tokens = zeroed(nn.Linear(hidden, self.embedding_to_tokens.out_features))
            if self.seed is not None:
                self.features_to_seed = zeroed(nn.Linear(hidden, self.seed.out_features))
        if config.embedding_noise_levels:
            width = config.unet.model_channels
            self.noise_level_to_time = nn.Sequential(
                nn.Linear(width, time_dim), nn.SiLU(), zeroed(nn.Linear(time_dim, time_dim))
            )

    def _make_null_text(self) -> None:
        config, length = self.config, self.config.context_length
        if config.null_text == "clip":
            self.register_buffer("null_text", torch.zeros(length, config.token_dim))
            self.register_buffer("null_mask", torch.zeros(length, dtype=torch.bool))
            self.register_buffer("null_text_embedding", torch.zeros(config.embedding_dim))
            return
        if config.feature_dim is not None:
            self.null_text = random_parameter(length, config.feature_dim, std=0.02)
        if config.text_embedding_to_time:
            self.null_text_embedding = nn.Parameter(torch.zeros(config.embedding_dim))

    def set_null_text(self, empty: TextFeatures) -> None:
        """Keep the CLIP's features of '' (a batch of one), which stand for a dropped caption (`null_text: clip`)."""
        for name, value in null_text_state(empty, self.config).items():
            getattr(self, name).copy_(value)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        image_embedding: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        drop_embedding: Tensor,
        drop_text: Tensor,
        text_embedding: Tensor | None = None,
        noise_level: Tensor | None = None,
        known_image: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """x_t (B, 3, H, W), t (B,), image_embedding (B, E), text_tokens (B, L, D), or ids (B, L) for a
        text transformer, text_mask (B, L) bool; drop_embedding and drop_text (B,) bool: True puts the null in its
        place. Where the configuration asks for them: text_embedding (B, E); noise_level (B,) of the image embedding;
        known_image (B, 3, H, W) and known (B, 1, H, W), 1 where the image is given and 0 where it is to be painted.
        -> (B, 3 or 6, H, W) float32.
        """
        condition = self._read(
            image_embedding, text_tokens, text_mask, drop_embedding, drop_text, text_embedding, noise_level
        )
        return self.conditioned(x_t, t, condition._replace(known_image=known_image, known=known))

    def read(
        self,
        *,
        image_embedding: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        drop_embedding: Tensor,
        drop_text: Tensor,
        text_embedding: Tensor | None = None,
        noise_level: Tensor | None = None,
        known_image: Tensor | None = None,
        known: Tensor | None = None,
    ) -> ReadCondition:
        """What `forward` makes of the conditioning alone, down to every attention layer's keys and values of it, for
        `conditioned`: neither x_t nor t has a say in it.
        """
        condition = self._read(
            image_embedding, text_tokens, text_mask, drop_embedding, drop_text, text_embedding, noise_level
        )
        context, mask = condition.context, condition.mask
        assert isinstance(context, Tensor)
        if context.device.type == "cpu" and not is_watched(self.unet):  # elsewhere one shape for all captions is faster
            seen = mask.any(dim=0)  # padding behind the longest caption is read by nobody
            context, mask = context[:, seen], mask[:, seen]
        memory = ContextMemory(self.unet, context)
        return condition._replace(context=memory, mask=mask, known_image=known_image, known=known)

    def conditioned(self, x_t: Tensor, t: Tensor, condition: ReadCondition) -> Tensor:
        """What `forward` gives for x_t (B, 3, H, W) and t (B,) under conditioning that was read."""
        if self.config.inpainting:
            known_image, known = condition.known_image, condition.known
            assert known_image is not None and known is not None
            x_t = torch.cat([x_t, known_image * known, known], dim=1)
        # Convolutions follow their input's layout, and channels_last is the fast one. In training the weights stay
        # contiguous, because DeepSpeed broadcasts them as flat memory.
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        return self.unet(x_t, t, condition.time, condition.context, condition.mask, condition.seed)  # type: ignore[no-any-return]

    def _read(
        self,
        image_embedding: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        drop_embedding: Tensor,
        drop_text: Tensor,
        text_embedding: Tensor | None,
        noise_level: Tensor | None,
    ) -> ReadCondition:
        embedding = torch.where(
            drop_embedding[:, None], self.null_embedding.to(image_embedding.dtype), self._scaled(image_embedding)
        )
        features = self.embedding_features(embedding) if self.config.embedding_hidden else None
        time = self.embedding_to_time(embedding)
        if features is not None:
            time = time + self.features_to_time(features)
        text_context, mask, summary = self._caption(text_tokens, text_mask, drop_text)
        if summary is not None:
            time = time + summary
        if self.config.text_embedding_to_time:
            assert text_embedding is not None
            null: Tensor = self.null_text_embedding.to(text_embedding.dtype)
            if self.config.null_text == "clip":
                null = self._scaled(null)
            time = time + self.text_embedding_to_time(
                torch.where(drop_text[:, None], null, self._scaled(text_embedding))
            )
        if self.config.embedding_noise_levels:
            assert noise_level is not None
            level = timestep_embedding(noise_level, self.config.unet.model_channels).to(time.dtype)
            # What is said of an embedding that is not there says nothing.
            time = time + self.noise_level_to_time(level) * ~drop_embedding[:, None]
        image_tokens, seed = self.embedding_to_tokens(embedding), self.embedding_map(embedding, features)
        if features is not None:
            image_tokens = image_tokens + self.features_to_tokens(features)
        if self.text_seed is not None:
            said = self.text_seed(text_context, mask)
            seed = said if seed is None else seed + said
        context, mask = self._context(text_context, mask, image_tokens)
        return ReadCondition(time, context, mask, seed)

    def embedding_map(self, embedding: Tensor, features: Tensor | None = None) -> Tensor | None:
        """What an embedding adds to the lowest feature map: (B, E) of the length that the network reads
        (`DecoderConfig.scale`), or `null_embedding` -> (B, channels, h, w); None without `spatial_seed`. `features` are
        its `embedding_features`, where they are known.
        """
        if self.seed is None:
            return None
        found = self.seed(embedding)
        if self.config.embedding_hidden:
            found = found + self.features_to_seed(self.embedding_features(embedding) if features is None else features)
        size = self.unet.bottom_size
        return found.unflatten(1, (-1, size, size))  # type: ignore[no-any-return]

    def caption_context(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Context tokens (B, L, C) of captions that are not dropped, and which of them may be seen (B, L)."""
        context, seen, _ = self._caption(tokens, mask, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device))
        return context, seen

    def _caption(self, tokens: Tensor, mask: Tensor, drop: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> context tokens (B, L, C), their mask, and what the last token adds to the timestep embedding."""
        if self.text_transformer is not None:
            features = self.text_transformer(tokens, mask & ~drop[:, None])
            everything = torch.ones_like(mask)  # padding is learned and speaks too
            return self.text_to_tokens(features), everything, self.last_token_to_time(features[:, -1])
        tokens = torch.where(drop[:, None, None], self.null_text.to(tokens.dtype), tokens)
        if self.config.null_text == "clip":
            mask = torch.where(drop[:, None], self.null_mask, mask)  # type: ignore[arg-type]
        else:
            mask = mask | drop[:, None]
        return self.text_norm(self.text_to_tokens(tokens)), mask, None

    def _context(self, text: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The caption's context tokens (B, L, C) and the image's (B, count·C), in the order that is wanted."""
        count = self.config.image_tokens
        image = image.to(text.dtype)
        if self.config.image_tokens_interleaved:
            image = image.unflatten(1, (-1, count)).transpose(1, 2)  # (B, tokens, C)
        else:
            image = image.unflatten(1, (count, -1))
        if self.config.image_tokens_first:
            return torch.cat([image, text], dim=1), F.pad(mask, (count, 0), value=True)
        return torch.cat([text, image], dim=1), F.pad(mask, (0, count), value=True)

    def _scaled(self, embedding: Tensor) -> Tensor:
        """By default a unit vector times sqrt(E): elements of size about 1, as linear layers expect."""
        return embedding * self.config.scale
