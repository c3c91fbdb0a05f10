"""An endless, exactly resumable iterator of training batches.

Every random choice about a sample (caption, crop, flip, augmentation) comes from a generator made from the
seed, the epoch and the sample's position, never from a running one: a resumed run makes the same choices, and
so does one on another number of processes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from unclip.config import DataConfig
from unclip.data.augment import augment_batch, random_crop, random_flip
from unclip.data.images import ImageError, to_float
from unclip.data.order import IndexOrder, Order, Sample, StreamOrder
from unclip.data.sources import StreamRows, Tally, open_source
from unclip.errors import UnclipError, UsageError

_MOST_BROKEN_IN_A_ROW = 10_000
_DECODING_THREADS = 8


class Batch(TypedDict):
    """What a stage's loss function receives: image (B, 3, S, S) in [-1, 1], and B captions."""

    image: Tensor
    caption: list[str]


def build_batches(
    config: DataConfig, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0
) -> Batches:
    """Open the source of `config` and return this process's share of it, `batch_size` samples at a time.

    Raises UnclipError: no such source, an empty one, a missing column, nothing in it that can be decoded.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise UsageError(
            f"expected batch_size ≥ 1 and 0 ≤ rank < world_size, got {batch_size}, {rank}, {world_size}"
        )
    if config.streaming and config.cache:
        raise UsageError(
            "data.cache keeps a small set in memory and data.streaming reads a large one; set one of them"
        )
    source = open_source(config, rank, world_size, seed)
    order: Order
    if isinstance(source, StreamRows):
        order = StreamOrder(source, config, rank, world_size, seed)
    else:
        order = IndexOrder(source, config.cache, rank, world_size, seed)
    return Batches(order, config, batch_size=batch_size, seed=seed)


class Batches:
    """Infinite iterator of `Batch`. The next batch is prepared in the background while the last one is used.

    `state_dict` describes the point after the last batch that was returned; each rank saves its own.
    """

    def __init__(self, order: Order, config: DataConfig, *, batch_size: int, seed: int) -> None:
        self.tally = Tally()
        self._order = order
        self._config = config
        self._batch_size = batch_size
        self._seed = seed
        self._broken_in_a_row = 0
        self._broken_since_epoch = 0
        threads = min(_DECODING_THREADS, _cores())
        self._decoders = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._background = ThreadPoolExecutor(1, "batches")
        self._pending: Future[tuple[Batch, dict[str, Any]]] | None = None
        self._state = order.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        pending = self._pending or self._background.submit(self._make)
        self._pending = None  # a failure must not be met again at the next call
        batch, self._state = pending.result()
        self._pending = self._background.submit(self._make)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, from which `load_state_dict` continues with the next batch."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called, with the batch that came next there.

        The batch size may differ. So may the world size, but a stream then goes on with its next epoch.
        Raises UnclipError: the state is of the other kind (data.streaming changed), or a stream got shorter.
        """
        if self._pending is not None:
            self._pending.exception()  # wait for it: its batch, or failure, belongs to the place that is left
            self._pending = None
        self._order.load_state_dict(copy.deepcopy(state))
        self._state = self._order.state_dict()
        self._broken_in_a_row = 0

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        images: list[Tensor] = []
        captions: list[str] = []
        rngs: list[np.random.Generator] = []
        while len(images) < self._batch_size:
            samples = self._order.take(self._batch_size - len(images))
            for sample, pixels in zip(samples, self._decode(samples), strict=True):
                if isinstance(pixels, ImageError) or not sample.row.captions:
                    self._skip(sample, str(pixels) if isinstance(pixels, ImageError) else "has no caption")
                    continue
                self._broken_in_a_row = 0
                rng = np.random.default_rng((self._seed, sample.epoch, sample.position))
                images.append(pixels)
                captions.append(sample.row.captions[rng.integers(len(sample.row.captions))])
                rngs.append(rng)
        return {"image": self._finish(images, rngs), "caption": captions}, self._order.state_dict()

    def _decode(self, samples: list[Sample]) -> list[Tensor | ImageError]:
        """uint8 (3, image_size, image_size) of each sample, or what is wrong with it."""

        def decode(sample: Sample) -> Tensor | ImageError:
            try:
                return sample.row.pixels(self._config.image_size)
            except ImageError as error:
                return error

        # Threads pay off where Pillow works outside Python's lock; what is drawn or cached needs none.
        if self._decoders is None or not any(sample.row.encoded for sample in samples):
            return [decode(sample) for sample in samples]
        return list(self._decoders.map(decode, samples))

    def _finish(self, images: list[Tensor], rngs: list[np.random.Generator]) -> Tensor:
        """The random changes, then float32 (B, 3, S, S) in [-1, 1]."""
        if self._config.augment:
            images = list(augment_batch(to_float(torch.stack(images)), rngs))
        if self._config.crop_size is not None:
            size = self._config.crop_size
            images = [random_crop(image, size, rng) for image, rng in zip(images, rngs, strict=True)]
        if self._config.horizontal_flip:
            images = [random_flip(image, rng) for image, rng in zip(images, rngs, strict=True)]
        stacked = torch.stack(images)
        return stacked if stacked.is_floating_point() else to_float(stacked)

    def _skip(self, sample: Sample, reason: str) -> None:
        if self._broken_in_a_row == 0:
            self._broken_since_epoch = sample.epoch
        self._broken_in_a_row += 1
        self.tally.add(sample.key, sample.row.name, reason)
        if self._broken_in_a_row >= _MOST_BROKEN_IN_A_ROW or self._order.all_broken(
            self.tally, self._broken_since_epoch, sample.epoch
        ):
            raise UnclipError(
                f"no sample of the data set {self._config.source!r} can be used: {self.tally.report()}"
            )


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
