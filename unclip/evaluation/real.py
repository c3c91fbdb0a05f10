"""Features of real pictures, kept from one evaluation to the next."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unclip.bundle import write_json
from unclip.data.fingerprint import fingerprint
from unclip.errors import UnclipError
from unclip.evaluation.dataset import PIECE, EvaluationData, describe
from unclip.evaluation.features import Arrays, Extractor
from unclip.evaluation.metrics import gaussian
from unclip.evaluation.pieces import Pieces, Share

_STATISTICS = "gaussian"


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/unclip/evaluation`, or that below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "unclip" / "evaluation"


class RealFeatures:
    """Features of a data set's pictures at `size`, in `cache` under a name made of the data set's fingerprint, the
    network, the size and the number of samples. `out` may lie in the data's folder, as `cache` may.
    """

    def __init__(
        self, data: EvaluationData, extractor: Extractor, size: int, cache: Path, out: Path | None = None
    ) -> None:
        self.data, self.extractor, self.size = data, extractor, size
        key = {
            "data": fingerprint(data.config, (cache,) if out is None else (cache, out)),
            "network": extractor.identity,
            "size": size,
            "limit": data.limit,
            "piece": PIECE,
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.key: dict[str, Any] = key
        self.pieces = Pieces(cache / name, "real")
        self.found = self.made = self.unreadable = 0
        self.count: int | None = None

    def make(self, share: Share, told: Callable[[int], None] = lambda _: None) -> None:
        """This process's share of what is not there yet."""
        about = self.pieces.folder / "about.json"
        number = -1

        def own(piece: int) -> bool:
            return share.owns(piece) and not self.pieces.has(piece)

        for number, samples in self.data.pieces(own):
            if not own(number):
                self.found += 1
                continue
            self.pieces.write(number, self._piece(samples))
            self.made += 1
            told(number)
        self.count = number + 1
        if not about.is_file():
            try:
                write_json(about, {**self.key, "source": describe(self.data.config)})
            except OSError as error:
                raise UnclipError(f"cannot write to {about.parent}: {error.strerror or error}") from error

    @property
    def complete(self) -> bool:
        return self.count is not None and self.pieces.complete(self.count)

    def load(self) -> Arrays:
        """"number" and "caption" (N,), "clip", "texts" and what else the extractor makes; `unreadable` counts the
        pictures that could not be. UnclipError: all of them.
        """
        assert self.count is not None
        arrays = self.pieces.load(self.count)
        self.unreadable = int(arrays.pop("unreadable").sum())
        if not len(arrays.get("number", ())):
            source = self.data.config.source
            raise UnclipError(f"no sample of the data set {source!r} can be used: {self.data.tally.report()}")
        return arrays

    def gaussian(self, features: Tensor) -> dict[str, Tensor]:
        """Mean and covariance of the real features; kept too, since of large sets they take a while."""
        kept = Pieces(self.pieces.folder, _STATISTICS)
        if kept.has(0):
            return {name: torch.from_numpy(value) for name, value in kept.load(1).items()}
        found = gaussian(features)
        kept.write(0, {name: value.numpy() for name, value in found.items()})
        return found

    def _piece(self, samples: list[Any]) -> Arrays:
        kept, arrays = self.extractor.real(self.data, samples, self.size) if samples else ([], {})
        unreadable = np.array([len(samples) - len(kept)])
        if not kept:
            return {"number": np.zeros(0, np.int64), "unreadable": unreadable}
        captions = [sample.caption for sample in kept]
        numbers = np.array([sample.number for sample in kept], np.int64)
        texts = self.extractor.texts(captions)
        about = {"number": numbers, "caption": np.array(captions), "unreadable": unreadable}
        return {**about, "texts": texts, **arrays}
