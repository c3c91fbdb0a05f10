"""The pictures that are measured: drawn by a model from a data set's captions, or read from another data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.data.fingerprint import fingerprint
from unclip.data.images import to_float
from unclip.digest import digest
from unclip.evaluation.dataset import EvaluationData, Sample
from unclip.evaluation.features import Arrays, Extractor, Lpips
from unclip.evaluation.metrics import clip_diversity, structural_similarity
from unclip.evaluation.pieces import Pieces, Share
from unclip.geometry import peak_signal_to_noise
from unclip.inputs import check_seeds
from unclip.probing import Conditioning

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

THUMBNAIL = 64
RECONSTRUCTION_PIECE = 8
RECONSTRUCTION_STEPS = 50


class Source(Protocol):
    """What gives the pictures of samples: uint8 (B·K, 3, S, S), K of each sample side by side, of those samples."""

    @property
    def num_images(self) -> int: ...

    def __call__(self, samples: list[Sample]) -> tuple[list[Sample], Tensor]: ...

    @property
    def identity(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Drawn:
    """Pictures that a model draws: picture k of sample i with the seed `seed` + i·K + k.

    `options` are fields of SampleOptions.
    """

    system: UnCLIP
    options: Mapping[str, Any] = field(default_factory=dict)
    num_images: int = 1
    seed: int = 0
    batch_size: int = 8
    conditioning: Conditioning = "prior"

    def __call__(self, samples: list[Sample]) -> tuple[list[Sample], Tensor]:
        texts = [sample.caption for sample in samples for _ in range(self.num_images)]
        wanted = [self.seed + s.number * self.num_images + k for s in samples for k in range(self.num_images)]
        seeds = check_seeds(wanted, len(texts))
        parts = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = self.system.draw_conditioned(texts[part], self.conditioning, seed=seeds[part], **self.options)
            parts.append(to_bytes(images))
        return samples, torch.cat(parts)

    @property
    def identity(self) -> dict[str, Any]:
        options = {name: getattr(value, "__name__", value) for name, value in sorted(self.options.items())}
        return {
            "model": model_identity(self.system),
            "options": options,
            "num_images": self.num_images,
            "seed": self.seed,
            "conditioning": self.conditioning,
            "dtype": str(self.system.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Read:
    """Pictures of a data set, whoever made them."""

    data: EvaluationData
    size: int
    num_images: int = 1

    def __call__(self, samples: list[Sample]) -> tuple[list[Sample], Tensor]:
        return self.data.pixels(samples, self.size)

    @property
    def identity(self) -> dict[str, Any]:
        return {"pictures": fingerprint(self.data.config), "size": self.size}


class SampleFeatures:
    """Features of the pictures of `source` for each sample of `data`, in pieces below `folder`."""

    def __init__(
        self, data: EvaluationData, source: Source, extractor: Extractor, folder: Path, lpips: Lpips | None = None
    ) -> None:
        self.data, self.source, self.extractor, self.lpips = data, source, extractor, lpips
        self.pieces = Pieces(folder, "samples")
        self.count: int | None = None

    def make(self, share: Share, told: Callable[[int], None] = lambda _: None) -> None:
        """This process's share of what is not there yet."""
        number = -1

        def own(piece: int) -> bool:
            return share.owns(piece) and not self.pieces.has(piece)

        for number, samples in self.data.pieces(own):
            if own(number):
                self.pieces.write(number, self._piece(samples))
                told(number)
        self.count = number + 1

    @property
    def complete(self) -> bool:
        return self.count is not None and self.pieces.complete(self.count)

    def load(self) -> Arrays:
        """"number", "caption", "texts" and "diversity" of N samples; "clip", "picture" (uint8, at most 64 px) and what
        else the extractor makes of their N·K pictures, those of a sample side by side.
        """
        assert self.count is not None
        return self.pieces.load(self.count)

    def _piece(self, samples: list[Sample]) -> Arrays:
        kept, pixels = self.source(samples) if samples else ([], torch.zeros(0, 3, 1, 1, dtype=torch.uint8))
        if not kept:
            return {"number": np.zeros(0, np.int64)}
        captions = [sample.caption for sample in kept]
        arrays = self.extractor(pixels)
        return {
            "number": np.array([sample.number for sample in kept], np.int64),
            "caption": np.array(captions),
            "texts": self.extractor.texts(captions),
            "picture": thumbnails(pixels),
            "diversity": np.array(self._diversity(pixels, arrays["clip"])),
            **arrays,
        }

    def _diversity(self, pixels: Tensor, clip: np.ndarray) -> list[float]:
        """Of each sample's pictures among themselves; none where there is one of each."""
        each = self.source.num_images
        if each < 2:
            return []
        groups = range(0, len(pixels), each)
        if self.lpips is not None:
            return [self.lpips.diversity(to_float(pixels[start : start + each])) for start in groups]
        return [clip_diversity(torch.from_numpy(clip[start : start + each])) for start in groups]


def reconstruct_pieces(
    system: UnCLIP, data: EvaluationData, count: int, pieces: Pieces, share: Share, *, steps: int, seed: int
) -> int:
    """Real pictures encoded to (z_i, x_T) and drawn again, in pieces: "psnr" and "ssim" (N,) at the decoder's size,
    "truth" and "again" uint8. Returns the number of pieces.
    """
    size = system.decoder.config.image_size
    number_of = -(-count // RECONSTRUCTION_PIECE)
    missing = [n for n in range(number_of) if share.owns(n) and not pieces.has(n)]
    if not missing:
        return number_of
    first = data.first(count)
    for number in range(number_of):
        if number not in missing:
            continue
        start = number * RECONSTRUCTION_PIECE
        kept, pixels = data.pixels(first[start : start + RECONSTRUCTION_PIECE], size)
        if not kept:
            pieces.write(number, {"psnr": np.zeros(0), "ssim": np.zeros(0)})
            continue
        truth = to_float(pixels).to(system.device)
        latents = system.encode(truth, steps=steps)
        again = system.reconstruct(latents, seed=seed, size=size, output="tensor")
        assert isinstance(again, Tensor)
        arrays = {
            "psnr": peak_signal_to_noise(again, truth).cpu().numpy(),
            "ssim": structural_similarity(again.cpu(), truth.cpu()).numpy(),
            "truth": thumbnails(pixels),
            "again": thumbnails(to_bytes(again)),
        }
        pieces.write(number, arrays)
    return number_of


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> uint8, as a picture is written."""
    return images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def thumbnails(pixels: Tensor) -> np.ndarray:
    """uint8 (B, 3, S, S) -> at most 64 px."""
    if pixels.shape[-1] <= THUMBNAIL:
        return pixels.numpy()
    small = F.interpolate(
        to_float(pixels), (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True, align_corners=False
    )
    return to_bytes(small).numpy()


def model_identity(system: UnCLIP) -> dict[str, Any]:
    """What tells a model from another: digests of its networks and their configurations."""
    stages: dict[str, Any] = {"decoder": system.decoder}
    if system.prior is not None:
        stages["prior"] = system.prior
    stages |= {f"upsampler_{stage.config.high_size}": stage for stage in system.upsamplers}
    digests = {name: digest(stage.network, stage.config) for name, stage in stages.items()}
    return {"name": system.name, "clip": digest(system.clip.model), **digests}
