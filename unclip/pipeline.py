"""UnCLIP: the stages of a bundle as one object. Text -> image embedding -> 64 px -> 256 px -> 1024 px."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from unclip.bundle import MANIFEST, PARTS, read_manifest
from unclip.clip import FrozenCLIP, TextFeatures
from unclip.errors import UnclipError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from decoder import DecoderStage
    from prior import PriorStage
    from upsamplers import UpsamplerStage

BUNDLED = "emoji"
_MODELS = Path(__file__).parent / "models"

Progress = Callable[[str, int, int], None]
"""Hears (stage, steps done, steps in all)."""


@dataclass(frozen=True)
class SampleOptions:
    """How the stages sample; None means the model's own default."""

    size: int | None = None
    guidance: float | None = None
    prior_guidance: float | None = None
    prior_steps: int | None = None
    decoder_steps: int | None = None
    upsampler_steps: int | None = None
    sampler: str | None = None
    eta: float | None = None


@dataclass
class Timings:
    """Seconds spent in each stage by the last call."""

    seconds: dict[str, float] = field(default_factory=dict)


class UnCLIP:
    """A whole unCLIP system. `UnCLIP.from_pretrained()` loads the model that comes with the package.

    >>> from unclip import UnCLIP
    >>> model = UnCLIP.from_pretrained()
    >>> model.sizes
    (64, 256, 1024)
    >>> images = model.sample("pizza", size=64, seed=0)
    >>> images[0].size
    (64, 64)
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        decoder: DecoderStage,
        prior: PriorStage | None = None,
        upsamplers: Sequence[UpsamplerStage] = (),
        manifest: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, list(upsamplers)
        self.manifest = manifest or {}
        self.device = torch.device(device)
        self.timings = Timings()
        self._check_fit()

    # ---- loading -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = BUNDLED,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        size: int | None = None,
        revision: str | None = None,
    ) -> UnCLIP:
        """Load a bundle: the bundled model by default, a folder with `unclip.json`, or a Hub id 'user/name'.

        `size` leaves out the upsamplers that are not needed for it. Raises UnclipError: no such folder, a part missing,
        parts that do not fit together, weights damaged.
        """
        from decoder import DecoderStage
        from prior import PriorStage
        from upsamplers import UpsamplerStage

        folder = resolve_model(name, revision=revision)
        manifest = read_manifest(folder)
        parts: dict[str, str] = manifest["parts"]
        for needed in ("clip", "decoder"):
            if needed not in parts:
                raise UnclipError(f"{folder / MANIFEST} names no {needed!r}; it has {', '.join(parts)}")
        place = torch.device(device or default_device())
        clip = FrozenCLIP.load(str(folder / parts["clip"]), device=place)
        decoder = DecoderStage.load(folder / parts["decoder"], place, dtype)
        prior = PriorStage.load(folder / parts["prior"], place, dtype) if "prior" in parts else None
        upsamplers = []
        reached = decoder.config.unet.image_size
        for part in PARTS[3:]:
            if part in parts and (size is None or reached < size):
                stage = UpsamplerStage.load(folder / parts[part], place, dtype)
                upsamplers.append(stage)
                reached *= stage.config.factor
        return cls(clip, decoder, prior, upsamplers, manifest, place)

    def _check_fit(self) -> None:
        """The embeddings of all parts must have one width, the upsamplers one chain of sizes."""
        dim, config = self.clip.embedding_dim, self.decoder.config
        problems = []
        if config.embedding_dim != dim:
            problems.append(f"the CLIP's image embeddings have {dim} dimensions, the decoder was trained on {config.embedding_dim}")
        if config.token_dim != self.clip.token_dim:
            problems.append(f"the CLIP's token features have {self.clip.token_dim} dimensions, the decoder takes {config.token_dim}")
        if self.prior is not None and self.prior.config.embedding_dim != dim:
            problems.append(f"the CLIP's embeddings have {dim} dimensions, the prior was trained on {self.prior.config.embedding_dim}")
        if self.prior is not None and self.prior.config.token_dim != self.clip.token_dim:
            problems.append(
                f"the CLIP's token features have {self.clip.token_dim} dimensions, the prior takes {self.prior.config.token_dim}"
            )
        reached = config.unet.image_size
        for stage in self.upsamplers:
            if stage.config.low_size != reached:
                problems.append(f"an upsampler takes {stage.config.low_size} px, the stage before it makes {reached} px")
            reached = stage.config.high_size
        if problems:
            raise UnclipError("the parts of this model do not fit together: " + "; ".join(problems))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edges of the pictures this model can make, in pixels."""
        sizes = [self.decoder.config.unet.image_size]
        for stage in self.upsamplers:
            sizes.append(sizes[-1] * stage.config.factor)
        return tuple(sizes)

    # ---- embeddings ----------------------------------------------------------------------------------------------

    def embed_text(self, prompts: str | Sequence[str]) -> TextFeatures:
        """CLIP's features of prompts: token features, mask, and embeddings (B, E) of unit length."""
        return self.clip.encode_text(_prompts(prompts))

    def embed_image(self, images: Any) -> Tensor:
        """CLIP image embeddings (B, E) of unit length for a PIL image, a path, a tensor (B, 3, H, W) in [-1, 1], or a
        list of images and paths.
        """
        return self.clip.encode_image(self._pixels(images))

    def predict_embedding(
        self, prompts: str | Sequence[str], *, seed: int | Sequence[int] = 0, options: SampleOptions | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """The prior's image embeddings (B, E) for prompts."""
        text = self.embed_text(prompts)
        return self._prior(text, _seeds(seed, len(text)), options or SampleOptions(), progress)

    # ---- pictures ------------------------------------------------------------------------------------------------

    @overload
    def sample(
        self, prompts: str | Sequence[str], *, num_images: int = ..., seed: int = ..., output: Literal["pil"] = ...,
        progress: Progress | None = ..., **options: Any,
    ) -> list[Image]: ...
    @overload
    def sample(
        self, prompts: str | Sequence[str], *, num_images: int = ..., seed: int = ..., output: Literal["tensor"],
        progress: Progress | None = ..., **options: Any,
    ) -> Tensor: ...
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """Pictures for prompts: `num_images` of each, in the order of the prompts.

        Image i of a prompt is drawn with seed + i, so the same seed gives the same picture whatever else is in the batch.
        `options` are the fields of SampleOptions (size, guidance, decoder_steps, …). Returns PIL images, or with
        output="tensor" a tensor (B, 3, S, S) in [-1, 1]. Raises UsageError for an empty prompt or an impossible size.
        """
        if num_images < 1:
            raise UsageError(f"num_images is {num_images}, expected 1 or more")
        chosen = _options(options)
        self.check_size(chosen.size)
        texts = [prompt for prompt in _prompts(prompts) for _ in range(num_images)]
        seeds = [seed + i for _ in _prompts(prompts) for i in range(num_images)]
        self.timings = Timings()
        text = self._timed("clip", lambda: self.embed_text(texts))
        embedding = self._prior(text, seeds, chosen, progress)
        return self._finish(self._render(embedding, text, seeds, chosen, progress), output)

    @overload
    def variations(
        self, image: Any, *, num_images: int = ..., seed: int = ..., output: Literal["pil"] = ...,
        progress: Progress | None = ..., **options: Any,
    ) -> list[Image]: ...
    @overload
    def variations(
        self, image: Any, *, num_images: int = ..., seed: int = ..., output: Literal["tensor"],
        progress: Progress | None = ..., **options: Any,
    ) -> Tensor: ...
    def variations(
        self,
        image: Any,
        *,
        num_images: int = 1,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """Pictures that share an image's CLIP embedding (unCLIP §3.1), from fresh noise."""
        chosen = _options(options)
        self.check_size(chosen.size)
        self.timings = Timings()
        embedding = self._timed("clip", lambda: self.embed_image(image))
        if len(embedding) != 1:
            raise UsageError(f"variations takes one image, got {len(embedding)}")
        seeds = [seed + i for i in range(num_images)]
        images = self._render(embedding.expand(num_images, -1), None, seeds, chosen, progress)
        return self._finish(images, output)

    @overload
    def decode(
        self, embeddings: Any, *, seed: int = ..., output: Literal["pil"] = ..., progress: Progress | None = ..., **options: Any
    ) -> list[Image]: ...
    @overload
    def decode(
        self, embeddings: Any, *, seed: int = ..., output: Literal["tensor"], progress: Progress | None = ..., **options: Any
    ) -> Tensor: ...
    def decode(
        self,
        embeddings: Any,
        *,
        seed: int = 0,
        output: Literal["pil", "tensor"] = "pil",
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Image] | Tensor:
        """Pictures straight from CLIP image embeddings, (E,) or (B, E), tensor or numpy array of floats; any length is
        brought to 1. All are drawn with the same seed. Raises UsageError: wrong width, dtype, NaN, a vector of zeros.
        """
        chosen = _options(options)
        self.check_size(chosen.size)
        self.timings = Timings()
        embedding = check_embeddings(embeddings, self.clip.embedding_dim)
        images = self._render(embedding, None, [seed] * len(embedding), chosen, progress)
        return self._finish(images, output)

    # ---- inside --------------------------------------------------------------------------------------------------

    def check_size(self, size: int | None) -> int:
        """The size to make; UsageError when the model cannot make it."""
        if size is None:
            return self.sizes[-1]
        if size not in self.sizes:
            raise UsageError(f"size {size} cannot be made by this model; it makes {', '.join(map(str, self.sizes))}")
        return size

    def _prior(self, text: TextFeatures, seeds: list[int], options: SampleOptions, progress: Progress | None) -> Tensor:
        if self.prior is None:
            raise UnclipError("this model has no prior, so it cannot start from a prompt; use variations or decode")
        stage = self.prior
        return self._timed(
            "prior",
            lambda: stage.sample(
                text, seeds, steps=options.prior_steps, guidance=options.prior_guidance, callback=_heard("prior", progress)
            ),
        )

    def _render(
        self, embedding: Tensor, text: TextFeatures | None, seeds: list[int], options: SampleOptions, progress: Progress | None
    ) -> Tensor:
        """Embeddings (B, E) -> images (B, 3, S, S) in [-1, 1] at the wanted size."""
        size = self.check_size(options.size)
        images = self._timed(
            "decoder",
            lambda: self.decoder.sample(
                embedding,
                seeds,
                text=text,
                steps=options.decoder_steps,
                guidance=options.guidance,
                sampler=options.sampler,
                eta=options.eta,
                callback=_heard("decoder", progress),
            ),
        )
        for stage in self.upsamplers:
            if images.shape[-1] >= size:
                break
            name = f"upsampler_{stage.config.high_size}"
            images = self._timed(
                name, lambda s=stage, i=images, n=name: s.sample(i, seeds, options.upsampler_steps, _heard(n, progress))
            )
        return images

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timings.seconds[name] = time.perf_counter() - start
        return result

    def _pixels(self, images: Any) -> Tensor:
        from unclip.data import load_image, to_tensor

        if isinstance(images, Tensor):
            batch = images[None] if images.ndim == 3 else images
            if batch.ndim != 4 or batch.shape[1] != 3:
                raise UsageError(f"an image tensor of shape {tuple(images.shape)}; expected (B, 3, H, W) in [-1, 1]")
            return batch.to(self.device).float()
        several = images if isinstance(images, (list, tuple)) else [images]
        loaded = [load_image(item) if isinstance(item, (str, Path)) else item for item in several]
        size = self.clip.image_size
        return torch.stack([to_tensor(image.convert("RGB"), size) for image in loaded]).to(self.device)

    @staticmethod
    def _finish(images: Tensor, output: str) -> Any:
        from unclip.data import to_pil

        return images if output == "tensor" else [to_pil(image) for image in images.cpu()]


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a bundled name, an existing folder, or a Hub id, which is downloaded into the Hub's cache."""
    if str(name) == BUNDLED and not Path(name).is_dir():
        return _MODELS / BUNDLED
    folder = Path(name)
    text = str(name)
    looks_like_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_hub_id:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(text, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt.gz", "*.md"])
        )
    except Exception as error:  # the Hub's client raises many kinds
        raise UnclipError(
            f"no folder {text!r} here, and the Hub gave no model of that name: {str(error).splitlines()[0]}"
        ) from error


def check_embeddings(embeddings: Any, dim: int) -> Tensor:
    """Embeddings as unit-length float32 (B, E). UsageError: wrong width, not floats, NaN or infinity, zero length."""
    tensor = embeddings if isinstance(embeddings, Tensor) else None
    if tensor is None:
        import numpy as np

        array = np.asarray(embeddings)
        if array.dtype.kind != "f":
            raise UsageError(f"embeddings of type {array.dtype}; expected floating point numbers")
        tensor = torch.from_numpy(array.astype(np.float32))
    if not tensor.is_floating_point():
        raise UsageError(f"embeddings of type {tensor.dtype}; expected floating point numbers")
    tensor = tensor.float()
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2 or tensor.shape[1] != dim or not len(tensor):
        raise UsageError(f"embeddings of shape {tuple(tensor.shape)}; this model takes (count, {dim})")
    bad = ~torch.isfinite(tensor).all(dim=1)
    if bad.any():
        raise UsageError(f"embedding {int(bad.nonzero()[0])} holds NaN or infinity ({int(bad.sum())} of {len(tensor)} do)")
    norm = tensor.norm(dim=1, keepdim=True)
    if (norm == 0).any():
        raise UsageError(f"embedding {int((norm[:, 0] == 0).nonzero()[0])} is all zeros, which has no direction")
    return tensor / norm


def _prompts(prompts: str | Sequence[str]) -> list[str]:
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    if not several:
        raise UsageError("no prompt given")
    for number, prompt in enumerate(several):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"prompt {number + 1} is empty; say what the picture shows, such as 'pizza'")
    return several


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    return [seed + i for i in range(count)] if isinstance(seed, int) else [int(s) for s in seed]


def _options(given: dict[str, Any]) -> SampleOptions:
    known = SampleOptions.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UsageError(f"unknown option {name!r}; known: {', '.join(known)}")
    return SampleOptions(**given)


def _heard(stage: str, progress: Progress | None) -> Any:
    return None if progress is None else lambda number, total, _x: progress(stage, number, total)
