"""From rows to batches: selecting, decoding, the random changes, and counting what is skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from unclip.config import DataConfig
from unclip.data.augment import augment_batch, random_crop, random_flip, random_paired_crop
from unclip.data.embeddings import holds_embeddings
from unclip.data.images import ImageError, Unwanted, to_float
from unclip.data.order import IndexOrder, MixedOrder, Order, Sample
from unclip.data.restyle import restyle_batch
from unclip.data.rows import Row, Rows, Shards, is_sharded
from unclip.data.select import select
from unclip.data.sources import open_source
from unclip.data.stream import StreamOrder
from unclip.data.tally import Tally
from unclip.errors import UnclipError, UsageError

_MOST_BROKEN_IN_A_ROW = 10_000
_DECODING_THREADS = 8

_Decoded = tuple[Row, Tensor | None, Tensor | None]  # the row, its pixels, its low-resolution picture


class Batch(TypedDict, total=False):
    """What a stage's loss function receives: image (B, 3, S, S) in [-1, 1] and B captions. From stored embeddings
    come, of the CLIP's own length, image_embedding (B, E) and text_embedding (B, E), and token features `tokens`
    (B, L, D) in half precision with their `mask` (B, L); the images are there where they were stored.

    With data.plain, `plain` (B, 3, S, S) is the image before augment and restyle where `has_plain` (B,) is true, and
    `image` itself where the sample's source has plain: false.
    With data.low_column, `low` (B, 3, s, s) in [-1, 1] is the low-resolution picture of the same crop, zeros where
    `has_low` (B,) says that the sample has none. `condition` is what a stage's `Complete` made.
    """

    image: Tensor
    plain: Tensor
    has_plain: Tensor
    low: Tensor
    has_low: Tensor
    condition: Tensor
    caption: list[str]
    image_embedding: Tensor
    text_embedding: Tensor
    tokens: Tensor
    mask: Tensor


Complete = Callable[[Batch, Sequence[int]], Batch]
"""What a stage adds to a batch of which every sample has a seed of its own, where it is made: in the background."""


@dataclass(frozen=True)
class Making:
    """What all parts of a run make their batches of; `parts` are the workers of all ranks."""

    config: DataConfig
    batch_size: int
    parts: int
    seed: int
    complete: Complete | None = None


class Maker:
    """Makes the batches of one part: one worker of one rank. `sources` are the opened ones, where there are some."""

    def __init__(self, making: Making, part: int, sources: list[Rows | Shards] | None = None) -> None:
        config, parts, seed = making.config, making.parts, making.seed
        self.tally = Tally()
        self._complete = making.complete
        self._config = config
        self._each = [one for one, _ in config.each()]
        self._batch_size = making.batch_size
        self._broken_in_a_row = 0
        self._skipped_since: int | None = None  # epoch in which the last usable sample was followed by skipped ones
        if config.has_low and config.low_size is None:
            raise UsageError(
                "data.low_column names low-resolution pictures, which only upsamplers are conditioned on; leave it out"
            )
        # Files that cannot be opened are every part's; the first one counts them.
        counted = self.tally if part == 0 else Tally()
        sources = open_sources(config, counted) if sources is None else sources
        self._order = _order_of(config, sources, part, parts, seed)
        threads = max(1, min(_DECODING_THREADS, _cores() // max(1, config.workers)))
        self._decoders = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def state_dict(self) -> dict[str, Any]:
        return {**self._order.state_dict(), "tally": self.tally.state_dict()}

    def load_states(self, states: Sequence[dict[str, Any]], own: int | None) -> None:
        self._order.load_states(states, own)
        self._broken_in_a_row, self._skipped_since = 0, None
        if own is not None and "tally" in states[own]:
            self.tally.load_state_dict(states[own]["tally"])

    def make(self) -> tuple[Batch, dict[str, Any]]:
        """The next batch, and the state after it."""
        images: list[Tensor] = []
        lows: list[Tensor | None] = []
        captions: list[str] = []
        features: list[dict[str, np.ndarray]] = []
        rngs: list[np.random.Generator] = []
        sources: list[DataConfig] = []
        while len(captions) < self._batch_size:
            samples = self._order.take(self._batch_size - len(captions))
            for sample, result in zip(samples, self._decode(samples), strict=True):
                if isinstance(result, (ImageError, Unwanted)):
                    self._skip(sample, result)
                    continue
                row, pixels, low = result
                self._broken_in_a_row, self._skipped_since = 0, None
                rng = np.random.default_rng((sample.seed, sample.epoch, *sample.place))
                number = int(rng.integers(len(row.captions)))
                captions.append(row.captions[number])
                rngs.append(rng)
                sources.append(self._each[sample.source])
                if pixels is not None:
                    images.append(pixels)
                    lows.append(low)
                if row.features is not None:
                    features.append(row.features(number))
        batch: Batch = {"caption": captions}
        if images:
            if self._config.has_low:
                batch |= self._finish_pairs(images, lows, rngs)
            else:
                batch["image"] = self._finish(images, rngs, sources)
                if self._config.plain:
                    batch["has_plain"] = torch.tensor([one.plain for one in sources])
                    kept = to_float(torch.stack(images))
                    batch["plain"] = torch.where(batch["has_plain"][:, None, None, None], kept, batch["image"])
        for name in features[0] if features else ():
            batch[name] = torch.from_numpy(np.stack([one[name] for one in features]))  # type: ignore[literal-required]
        if self._complete is not None:
            batch |= self._complete(batch, [int(rng.integers(2**63 - 1)) for rng in rngs])
        return batch, self.state_dict()

    def _decode(self, samples: list[Sample]) -> list[_Decoded | ImageError | Unwanted]:
        """The row, its uint8 (3, image_size, image_size) and its low-resolution picture, or why there is none."""
        config = self._config

        def decode(sample: Sample) -> _Decoded | ImageError | Unwanted:
            try:
                row, pixels = decode_row(sample.row, config, config.image_size)
                return row, pixels, row.low(config.low_size) if row.low is not None and config.low_size else None
            except (ImageError, Unwanted) as error:
                return error

        # Threads pay off where Pillow works outside Python's lock; what is drawn or cached needs none.
        if self._decoders is None or not any(sample.row.encoded for sample in samples):
            return [decode(sample) for sample in samples]
        return list(self._decoders.map(decode, samples))

    def _finish(
        self, images: list[Tensor], rngs: list[np.random.Generator], sources: Sequence[DataConfig]
    ) -> Tensor:
        """The random changes, then float32 (B, 3, S, S) in [-1, 1]."""
        if self._config.augment:
            images = list(augment_batch(to_float(torch.stack(images)), rngs))
        shares = [one.restyle for one in sources]
        if any(shares):
            stack = torch.stack(images)
            floats = stack if stack.is_floating_point() else to_float(stack)
            images = list(restyle_batch(floats, rngs, shares, self._config.restyle_weights))
        if self._config.crop_size is not None:
            size = self._config.crop_size
            images = [random_crop(image, size, rng) for image, rng in zip(images, rngs, strict=True)]
        if self._config.horizontal_flip:
            images = [random_flip(image, rng) for image, rng in zip(images, rngs, strict=True)]
        stacked = torch.stack(images)
        return stacked if stacked.is_floating_point() else to_float(stacked)

    def _finish_pairs(self, images: list[Tensor], lows: list[Tensor | None], rngs: list[np.random.Generator]) -> Batch:
        """Images and low-resolution pictures under the same changes; crops begin at whole pixels of the latter."""
        assert self._config.low_size is not None
        factor = self._config.image_size // self._config.low_size
        crop = self._config.crop_size or self._config.image_size
        nothing = torch.zeros((3, self._config.low_size, self._config.low_size), dtype=torch.uint8)
        pairs = []
        for image, low, rng in zip(images, lows, rngs, strict=True):
            pair = random_paired_crop(image, nothing if low is None else low, crop, factor, rng)
            if self._config.horizontal_flip and rng.random() < 0.5:
                pair = pair[0].flip(2), pair[1].flip(2)
            pairs.append(pair)
        has_low = torch.tensor([low is not None for low in lows])
        picture = torch.stack([image for image, _ in pairs])
        small = to_float(torch.stack([low for _, low in pairs])) * has_low[:, None, None, None]
        return {"image": to_float(picture), "low": small, "has_low": has_low}

    def _skip(self, sample: Sample, reason: ImageError | Unwanted) -> None:
        if self._skipped_since is None:
            self._skipped_since = sample.epoch
        if isinstance(reason, Unwanted):
            self.tally.leave_out(str(reason), sample.epoch)
        else:
            self._broken_in_a_row += 1
            self.tally.add(sample.key, sample.row.name, str(reason), sample.epoch)
        whole_epoch = sample.epoch >= self._skipped_since + 2  # at least one lies between
        if self._broken_in_a_row >= _MOST_BROKEN_IN_A_ROW or whole_epoch:
            source = self._config.source if not self._config.sources else [one.source for one in self._config.sources]
            raise UnclipError(f"no sample of the data set {source!r} can be used: {self.tally.report()}")


def decode_row(row: Row, config: DataConfig, size: int) -> tuple[Row, Tensor | None]:
    """The row as selected, and its uint8 (3, size, size), None where it has no picture.

    Raises ImageError: broken; Unwanted: left out.
    """
    if row.error is not None:
        raise ImageError(row.error)
    row = select(row, config)
    if not row.captions:
        raise ImageError("has no caption")
    return row, None if row.pixels is None else row.pixels(size)


def open_sources(config: DataConfig, tally: Tally) -> list[Rows | Shards]:
    """The source, or the several of a mixture."""
    if config.sources:
        _check_mixture(config)
    return [open_source(one, tally) for one, _ in config.each()]


def _order_of(config: DataConfig, sources: list[Rows | Shards], part: int, parts: int, seed: int) -> Order:
    orders: list[Order] = []
    for number, ((one, _), source) in enumerate(zip(config.each(), sources, strict=True)):
        own = seed if len(sources) == 1 else seed * 1009 + number + 1  # two sources never draw alike
        if is_sharded(source):
            orders.append(StreamOrder(source, one.source, one.shuffle_buffer, part, parts, own))
        else:
            orders.append(IndexOrder(source, one.cache, part, parts, own))
    if len(orders) == 1:
        return orders[0]
    return MixedOrder(orders, [weight for _, weight in config.each()], part, parts, seed)


def _check_mixture(config: DataConfig) -> None:
    stored = [one.source for one, _ in config.each() if holds_embeddings(one.source)]
    if stored and len(stored) < len(config.sources):
        raise UsageError(
            f"data.sources mixes embeddings ({', '.join(stored)}) with images; embed the others too, with "
            "`unclip embed --dataset`"
        )


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
