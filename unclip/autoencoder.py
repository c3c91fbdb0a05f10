"""A frozen autoencoder of diffusers, whose latents a decoder works in (Latent Diffusion, Rombach et al. 2022). The only
importer of diffusers, which loads when one is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unclip.errors import UnclipError

KINDS = ("AutoencoderKL", "VQModel")


class AutoencoderFacts(NamedTuple):
    """What a decoder must know of an autoencoder: its latents' channels, pixels a latent's side, and how they are
    brought to about unit variance.
    """

    channels: int
    factor: int
    scale: float
    shift: float


class FrozenAutoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> scaled latents (B, C, H/f, W/f). It never learns; use `load`."""

    def __init__(self, model: nn.Module, facts: AutoencoderFacts, source: str) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.facts, self.source = facts, source

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> FrozenAutoencoder:
        """A folder or Hub id of an `AutoencoderKL` or `VQModel` in diffusers' layout, safetensors alone. Raises
        UnclipError: diffusers is not installed, nothing of that name, or a model of another class.
        """
        diffusers, config = _diffusers(), _config(name)
        kind = getattr(diffusers, config["_class_name"])
        try:
            model = kind.from_pretrained(name, use_safetensors=True)
        except Exception as error:  # diffusers raises whatever its loaders raise
            raise UnclipError(f"the autoencoder {name!r} cannot be loaded: {_reason(error)}") from error
        return cls(model.float(), _facts(config), name).to(device)

    @staticmethod
    def facts_of(name: str) -> AutoencoderFacts:
        """From its configuration alone. Raises as `load`."""
        return _facts(_config(name))

    def train(self, mode: bool = True) -> FrozenAutoencoder:
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The mean of the latents' distribution, or the latents before quantisation."""
        found = self.model.encode(images)
        latents = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents
        return (latents - self.facts.shift) * self.facts.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, clamped to [-1, 1]."""
        plain = latents / self.facts.scale + self.facts.shift
        return self.model.decode(plain).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]


def _config(name: str) -> dict[str, Any]:
    diffusers = _diffusers()
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise UnclipError(f"{folder} is no autoencoder: config.json is missing (found: {found})")
    try:
        config: dict[str, Any] = diffusers.AutoencoderKL.load_config(name)
    except Exception as error:  # as above
        raise UnclipError(
            f"no autoencoder {name!r}: it is no folder here, and the Hub gave none of that name: {_reason(error)}"
        ) from error
    if config.get("_class_name") not in KINDS:
        raise UnclipError(f"{name!r} is a {config.get('_class_name')!r}, expected an {' or a '.join(KINDS)}")
    return config


def _facts(config: dict[str, Any]) -> AutoencoderFacts:
    levels = len(config.get("block_out_channels") or (64,))
    scale = config.get("scaling_factor")
    return AutoencoderFacts(
        config.get("latent_channels") or (4 if config["_class_name"] == "AutoencoderKL" else 3),
        2 ** (levels - 1),
        0.18215 if scale is None else float(scale),
        float(config.get("shift_factor") or 0.0),
    )


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UnclipError(
            "a decoder in latents needs the package diffusers; install it with: pip install 'unclip[latent]'"
        ) from error
    return diffusers


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
