"""What holds between the parts of a bundle, and what can be had from some of them without the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unclip.bundle import BUNDLED, MANIFEST, PARTS, read_manifest, resolve_model
from unclip.clip import FrozenCLIP
from unclip.components import PrincipalComponents
from unclip.errors import UnclipError, UsageError
from unclip.inputs import check_size, resolve_device

if TYPE_CHECKING:
    from decoder import DecoderStage
    from prior import PriorStage
    from upsamplers import UpsamplerStage


def check_fit(
    clip: FrozenCLIP,
    decoder: DecoderStage,
    prior: PriorStage | None = None,
    upsamplers: Sequence[UpsamplerStage] = (),
    components: PrincipalComponents | None = None,
) -> None:
    """UnclipError unless all parts take the CLIP's widths and lengths, and the upsamplers form one chain of
    sizes.
    """
    problems = []
    configs: list[tuple[str, Any]] = [("decoder", decoder.config)]
    if prior is not None:
        configs.append(("prior", prior.config))
        if prior.config.embedding_length != decoder.config.embedding_length:
            problems.append(
                f"the prior makes embeddings of {prior.config.embedding_length} length, the decoder takes "
                f"{decoder.config.embedding_length} ones"
            )
    for name, config in configs:
        wanted = [("embeddings", "dimensions", clip.embedding_dim, config.embedding_dim)]
        kind = decoder.config.text.kind if name == "decoder" else "clip"
        if kind == "clip":
            wanted.append(("token features", "dimensions", clip.token_dim, config.token_dim))
            wanted.append(("captions", "tokens", clip.context_length, config.text_length))
        if kind == "glide":
            wanted.append(("vocabulary", "tokens", clip.vocab_size, config.text.vocab_size))
        for what, unit, own, taken in wanted:
            if own != taken:
                has = "has" if what == "vocabulary" else "have"
                problems.append(f"the CLIP's {what} {has} {own} {unit}, the {name} takes {taken}")
    if components is not None:
        measured = components.config
        if measured.embedding_dim != clip.embedding_dim:
            problems.append(
                f"the CLIP's embeddings have {clip.embedding_dim} dimensions, the PCA {measured.embedding_dim}"
            )
        if measured.embedding_length != decoder.config.embedding_length:
            problems.append(
                f"the PCA is of embeddings of {measured.embedding_length} length, the decoder takes "
                f"{decoder.config.embedding_length} ones"
            )
    reached = decoder.config.image_size
    for stage in upsamplers:
        problems += _reading(stage, clip, decoder)
        if stage.config.low_size != reached:
            problems.append(
                f"an upsampler takes {stage.config.low_size} px, the stage before it makes {reached} px"
            )
        reached = stage.config.high_size
    if problems:
        raise UnclipError("the parts of this model do not fit together: " + "; ".join(problems))


def _reading(stage: UpsamplerStage, clip: FrozenCLIP, decoder: DecoderStage) -> list[str]:
    """What is wrong with the captions that an upsampler reads; none of the paper's kind reads any."""
    config, made = stage.config, stage.config.high_size
    if config.text_dim is None:
        return []
    if decoder.config.text.kind != "clip":
        return [f"the upsampler to {made} px reads the CLIP's token features, the decoder {decoder.config.text.kind}'s"]
    if config.text_dim != clip.token_dim:
        return [
            f"the CLIP's token features have {clip.token_dim} dimensions, the upsampler to {made} px takes "
            f"{config.text_dim}"
        ]
    return []


def bundle_sizes(folder: Path, parts: dict[str, str]) -> tuple[int, ...]:
    """Edges in pixels that a bundle can make, read from its configurations alone."""
    from decoder import read_decoder_config
    from upsamplers import read_upsampler_config

    sizes = [read_decoder_config(folder / parts["decoder"]).image_size]
    for part in PARTS[3:]:
        if part in parts:
            sizes.append(sizes[-1] * read_upsampler_config(folder / parts[part]).factor)
    return tuple(sizes)


def needed_parts(folder: Path, size: int | None) -> list[str]:
    """The parts of a bundle without which it cannot make pictures of this size; all for None. UsageError: it cannot."""
    parts: dict[str, str] = read_manifest(folder)["parts"]
    if size is None or "decoder" not in parts:
        return list(parts)
    sizes = bundle_sizes(folder, parts)
    check_size(size, sizes)
    upsamplers = [part for part in PARTS[3:] if part in parts]
    idle = [part for part, made in zip(upsamplers, sizes[1:], strict=True) if made > size]
    return [part for part in parts if part not in idle]


def load_clip(name: str | Path = BUNDLED, device: str | torch.device | None = None) -> FrozenCLIP:
    """The CLIP of a bundle alone, for embeddings without pictures. Raises UnclipError as
    UnCLIP.from_pretrained.
    """
    folder = resolve_model(name, parts=lambda _described: ["clip"])
    parts = read_manifest(folder)["parts"]
    if "clip" not in parts:
        raise UnclipError(f"{folder / MANIFEST} names no 'clip'; it has {', '.join(parts)}")
    return FrozenCLIP.load(str(folder / parts["clip"]), device=resolve_device(device))


def image_pixels(images: Any, size: int, device: torch.device | str = "cpu") -> Tensor:
    """A PIL image, a path, an array (H, W, 3) of 8 bits, a list of them, or a tensor (B, 3, H, W) in [-1, 1] or of 8
    bits -> float32 (B, 3, H, W) on `device`.

    Files, PIL images and arrays are brought to (size, size), alpha laid on white. Of what is not square the middle is
    taken, of tensors too.
    """
    from unclip.data.images import checked_pixels, picture_of, to_tensor

    if isinstance(images, Tensor):
        batch = images[None] if images.ndim == 3 else images
        if batch.ndim != 4 or batch.shape[1] != 3 or not len(batch):
            raise UsageError(
                f"an image tensor of shape {tuple(images.shape)}; expected (B, 3, H, W) in [-1, 1]"
            )
        batch = checked_pixels(batch)
        edge = min(batch.shape[2:])
        top, left = ((extent - edge) // 2 for extent in batch.shape[2:])
        return batch[:, :, top : top + edge, left : left + edge].to(device)
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    if not several:
        raise UsageError("no image given")
    return torch.stack([to_tensor(picture_of(item), size) for item in several]).to(device)
