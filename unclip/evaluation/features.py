"""Networks that pictures are compared by: the Inception of 2015, from a local file, or a CLIP; and LPIPS.

Weights are never downloaded here. What a figure is called follows from the network: FID and KID are Inception's alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip.clip import FrozenCLIP
from unclip.clip_identity import identify, same_clip
from unclip.data.images import to_float
from unclip.errors import UnclipError
from unclip.evaluation.dataset import EvaluationData, Sample

Arrays = dict[str, np.ndarray]
LpipsNet = Literal["alex", "vgg", "squeeze"]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The file of torch-fidelity's release v0.2.0, which torchmetrics takes too."""
_SMALL = 32
_LPIPS_EDGE = 64
# By net, a tensor that it alone has, the classes of torchvision that make it and name its weights.
_LPIPS_NETS: dict[LpipsNet, tuple[str, str, str]] = {
    "vgg": ("features.28.weight", "vgg16", "VGG16_Weights"),
    "squeeze": ("features.3.squeeze.weight", "squeezenet1_1", "SqueezeNet1_1_Weights"),
    "alex": ("features.10.weight", "alexnet", "AlexNet_Weights"),
}


def checkpoints() -> Path:
    """Where torch keeps weights that other programs have downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


class Inception:
    """The Inception-v3 of 2015 that FID, KID and the Inception Score are defined by, through torch-fidelity.

    `file` are its weights (default: torch's cache). Raises UnclipError: no such file, or not these weights.
    """

    def __init__(self, file: Path | None = None, device: torch.device | str = "cpu") -> None:
        from torch_fidelity import FeatureExtractorInceptionV3

        path = checkpoints() / INCEPTION_FILE if file is None else file.expanduser()
        if not path.is_file():
            raise UnclipError(
                f"there are no Inception weights at {path}; name the file {INCEPTION_FILE} of torch-fidelity's "
                "release v0.2.0 with --inception FILE, or measure with --features clip"
            )
        _read_safely(path, "Inception")
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            ).to(device)
        except (RuntimeError, KeyError, TypeError) as error:
            raise UnclipError(f"{path} does not hold the weights of {INCEPTION_FILE}: {_line(error)}") from error
        self.device = torch.device(device)
        self.identity = {"network": "inception-v3-compat", "weights": _hash(path)}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Arrays:
        """uint8 (B, 3, S, S) -> "features" (B, 2048) and "logits" (B, 1008), float32."""
        features, logits = self.network(pixels.to(self.device))
        return {"features": features.float().cpu().numpy(), "logits": logits.float().cpu().numpy()}


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018), through torchmetrics; its backbone's weights are a file of
    torchvision's AlexNet, VGG16 or SqueezeNet 1.1 (default: the AlexNet in torch's cache).

    Raises UnclipError: no such file, or weights of something else.
    """

    def __init__(self, file: Path, device: torch.device | str = "cpu") -> None:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        path = file.expanduser()
        if not path.is_file():
            raise UnclipError(
                f"there are no weights for LPIPS at {path}; name torchvision's file of AlexNet, such as "
                f"{lpips_file('alex').name}, or leave --lpips out for a diversity by CLIP's features"
            )
        state = _read_safely(path, "torchvision")
        nets = [net for net, (key, _, _) in _LPIPS_NETS.items() if key in state]
        if not nets:
            raise UnclipError(f"{path} holds no weights of torchvision's AlexNet, VGG16 or SqueezeNet 1.1")
        self.net: LpipsNet = nets[0]
        self.device = torch.device(device)
        self.identity = {"network": f"lpips-{self.net}", "weights": _hash(path)}
        with _hub_with(path, lpips_file(self.net).name):
            try:
                self.metric: Any = LearnedPerceptualImagePatchSimilarity(self.net).to(self.device)
            except RuntimeError as error:
                raise UnclipError(f"{path} does not fit LPIPS's backbone: {_line(error)}") from error

    @classmethod
    def find(cls, file: Path | None, device: torch.device | str = "cpu") -> Lpips | None:
        """That of a file, or of the AlexNet in torch's cache; None where neither is there."""
        if file is None and not lpips_file("alex").is_file():
            return None
        return cls(lpips_file("alex") if file is None else file, device)

    @torch.inference_mode()
    def diversity(self, images: Tensor) -> float:
        """Mean distance over all pairs of one caption's pictures, (K, 3, S, S) in [-1, 1]; smaller than 64 px they are
        enlarged.
        """
        pictures = images.to(self.device)
        if pictures.shape[-1] < _LPIPS_EDGE:
            pictures = F.interpolate(pictures, (_LPIPS_EDGE, _LPIPS_EDGE), mode="bilinear", align_corners=False)
        first, second = zip(*combinations(range(len(pictures)), 2), strict=True)
        self.metric.reset()
        return float(self.metric(pictures[list(first)], pictures[list(second)]))


def lpips_file(net: LpipsNet) -> Path:
    """Where torchvision keeps a backbone's weights."""
    import torchvision

    weights = getattr(torchvision.models, _LPIPS_NETS[net][2])
    return checkpoints() / str(weights.DEFAULT.url).rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Names:
    """What figures of a feature network are called."""

    frechet: str
    kernel: str
    network: str

    def note(self) -> str:
        if self.frechet == "FID":
            return "of torch-fidelity's Inception-v3"
        return f"of {self.network}'s image embeddings; not comparable with FIDs"


class Extractor:
    """Pictures -> what figures are made of: a CLIP's embeddings always, Inception's features where there is one.

    `clip_name` is what FrozenCLIP.load took. Of captions that the CLIP cuts it tells the first alone from here on. With
    `small` come pictures of 32×32 too, for distances in pixels.
    """

    def __init__(
        self, clip: FrozenCLIP, clip_name: str, inception: Inception | None = None, *, small: bool = False
    ) -> None:
        self.clip, self.inception, self.small = clip, inception, small
        clip.cuts.first_only = True
        self._clip_name = clip_name
        path = Path(clip_name)
        self.clip_label = path.parent.name + "'s CLIP" if path.is_dir() and path.name == "clip" else clip_name

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these features from others."""
        found: dict[str, Any] = {"clip": identify(self._clip_name)}
        if self.inception is not None:
            found["inception"] = self.inception.identity
        return {**found, "small": _SMALL} if self.small else found

    @property
    def names(self) -> Names:
        if self.inception is not None:
            return Names("FID", "KID", "Inception-v3")
        return Names("FD-CLIP", "KD-CLIP", self.clip_label)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Arrays:
        """uint8 (B, 3, S, S) -> "clip" (B, E) of unit length, "features" and "logits" of Inception's, "small" uint8
        (B, 3, 32, 32).
        """
        images = to_float(pixels)
        found: Arrays = {"clip": self.clip.encode_image(images.to(self.clip.device)).cpu().numpy()}
        if self.inception is not None:
            found |= self.inception(pixels)
        if self.small:
            small = F.interpolate(images, (_SMALL, _SMALL), mode="bilinear", antialias=True, align_corners=False)
            found["small"] = ((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        return found

    def real(self, data: EvaluationData, samples: list[Sample], size: int) -> tuple[list[Sample], Arrays]:
        """Of samples that can be read, their pictures' features; of stored embeddings of the same CLIP, these.

        UnclipError: the embeddings are of another CLIP.
        """
        stored = data.info
        if stored is not None and stored.clip is not None:
            other = same_clip(identify(self._clip_name), stored.clip)
            if other is not None:
                raise UnclipError(f"the embeddings in {data.config.source} are not of {self.clip_label}: {other}")
        if stored is None or self.inception is not None or self.small:
            kept, pixels = data.pixels(samples, size)
            return kept, self(pixels) if kept else {}
        features = [sample.row.features(0) for sample in samples if sample.row.features is not None]
        image = torch.from_numpy(np.stack([one["image_embedding"] for one in features])).float()
        return samples, {"clip": F.normalize(image, dim=-1).numpy()}

    @torch.inference_mode()
    def texts(self, captions: list[str]) -> np.ndarray:
        """CLIP's embeddings (B, E) of captions, of unit length."""
        return self.clip.encode_text(captions).embedding.cpu().numpy()

    def compared(self, arrays: Arrays) -> Tensor:
        """The features (N, D) that distances are measured in: Inception's, or CLIP's of unit length times √E, so that
        the kernel of KD-CLIP is (cosine + 1)³.
        """
        if self.inception is not None:
            return torch.from_numpy(arrays["features"])
        clip = torch.from_numpy(arrays["clip"])
        return clip * clip.shape[1] ** 0.5


def _read_safely(path: Path, what: str) -> dict[str, Any]:
    """The tensors of a .pth file, without running what may be pickled into it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise UnclipError(f"{path} cannot be read as {what} weights: {_line(error)}") from error
    if not isinstance(state, dict):
        raise UnclipError(f"{path} holds a {type(state).__name__}, expected {what} weights by name")
    return state


@contextmanager
def _hub_with(path: Path, name: str) -> Iterator[None]:
    """torch's cache, for the while, with this file under the name that torchvision looks for, so that it downloads
    nothing.
    """
    import tempfile

    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoints"
        place.mkdir()
        (place / name).symlink_to(path.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


def _hash(path: Path) -> str:
    known = hashlib.sha256()
    with path.open("rb") as stream:  # Python 3.10 has no hashlib.file_digest
        while block := stream.read(1 << 20):
            known.update(block)
    return known.hexdigest()[:16]


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
