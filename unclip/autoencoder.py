"""A frozen autoencoder of diffusers, whose latents a decoder or an upsampler works in (Latent Diffusion, Rombach et al.
2022). The only importer of diffusers, which loads when one is used.
"""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unclip.bundle import read_json, write_json
from unclip.config_latent import LatentConfig
from unclip.errors import UnclipError, contents
from unclip.hub import answer_of

KINDS = ("AutoencoderKL", "VQModel")
CARRIED = "autoencoder"
"""The sub-folder of a bundle's part with the autoencoder in it, and the name that such a part gives it."""


class AutoencoderFacts(NamedTuple):
    """What a network must know of an autoencoder: its latents' channels, pixels a latent's side, and how they are
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
            raise UnclipError(f"the autoencoder {name!r} cannot be loaded: {answer_of(error)}") from error
        return cls(model.float(), _facts(config), name).to(device)

    def in_tiles(self, edge: int) -> None:
        """Read and make pictures larger than `edge` pixels in tiles of it, which overlap by a quarter and are blended
        there: memory grows with the tile and no more with the picture. Each tile has norms' statistics and attention of
        its own, so that a tiled picture is near the whole one and not the same.

        Raises UnclipError: diffusers has no tiles for this model (VQModel).
        """
        if not hasattr(self.model, "use_tiling"):  # every model has `enable_tiling`, which may only raise
            raise UnclipError(
                f"the autoencoder {self.source!r} is a {type(self.model).__name__}, which takes pictures whole; leave "
                "model.latent.tile out"
            )
        self.model.enable_tiling()
        self.model.tile_sample_min_size = edge
        self.model.tile_latent_min_size = edge // self.facts.factor

    @classmethod
    def without_weights(cls, name: str) -> FrozenAutoencoder:
        """Of its shape, with whatever a new one has, for planning. Raises as `load`."""
        config = _config(name)
        return cls(getattr(_diffusers(), config["_class_name"]).from_config(config), _facts(config), name)

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


def open_autoencoder(latent: LatentConfig, device: torch.device | str = "cpu") -> FrozenAutoencoder:
    """The autoencoder of a network in latents. While one of the same files, or of the same Hub id, is in use on the
    device, it is that one, and not another copy in memory. UnclipError: it cannot be loaded, or has other latents.
    """
    key = (torch.device(device), latent.tile)
    there = [(one, stamps) for one, (where, stamps) in _open.items() if where == key]
    found = next((one for one, stamps in there if _same(one, stamps, latent.name)), None)
    if found is None:
        stamps = _stamps(latent.name)
        found = FrozenAutoencoder.load(latent.name, device)
        if latent.tile is not None:
            found.in_tiles(latent.tile)
        _open[found] = (key, stamps)
    own = (latent.channels, latent.factor, latent.scale, latent.shift)
    if tuple(found.facts) != own:
        raise UnclipError(
            f"the autoencoder {latent.name!r} has latents of {tuple(found.facts)} (channels, factor, scale, shift), "
            f"and this network was trained on {own}; name the one that it was trained with"
        )
    return found


def with_facts(latent: LatentConfig) -> LatentConfig:
    """The same with what its autoencoder decides. Raises UnclipError as `FrozenAutoencoder.load`."""
    return LatentConfig(name=latent.name, tile=latent.tile, **FrozenAutoencoder.facts_of(latent.name)._asdict())


def located(latent: LatentConfig | None, folder: Path) -> LatentConfig | None:
    """With the place of the autoencoder that a part's folder carries inside itself, where it does. UnclipError: it
    should, and does not.
    """
    if latent is None or latent.name != CARRIED or (Path(CARRIED).is_dir() and not (folder / CARRIED).is_dir()):
        return latent  # the last is a folder of that name where the command runs, as any other name may be
    if not (folder / CARRIED).is_dir():
        raise UnclipError(f"{folder} is incomplete: the folder {CARRIED!r} with its autoencoder is missing")
    return latent.model_copy(update={"name": str(folder / CARRIED)})


def carry(body: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """Copy the autoencoder of a part, whose config.json is `body` and lies in `source`, into the part's folder
    `target`, and return its config.json with the new name. An autoencoder of the Hub stays a name; for a part in pixels
    there is nothing to do. Raises UnclipError: the autoencoder is not whole, or not the one that was trained with.
    """
    named = body["config"].get("latent") if isinstance(body.get("config"), dict) else None
    if named is None:
        return body
    latent = LatentConfig(**named)
    own = latent.name == CARRIED and (source / CARRIED).is_dir()
    folder = source / CARRIED if own else Path(latent.name).expanduser()
    if not folder.is_dir():
        return body
    open_autoencoder(latent.model_copy(update={"name": str(folder)}))
    (target / CARRIED).mkdir()
    told = {key: value for key, value in read_json(folder / "config.json").items() if key != "_name_or_path"}
    write_json(target / CARRIED / "config.json", told)
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"))):
        shutil.copyfile(file, target / CARRIED / file.name)
    return {**body, "config": {**body["config"], "latent": {**named, "name": CARRIED}}}


Stamps = dict[Path, tuple[int, int]]
_open: WeakKeyDictionary[FrozenAutoencoder, tuple[tuple[torch.device, int | None], Stamps]] = WeakKeyDictionary()
"""Those in use: device and tile, and the files that each was read from with their sizes and times."""


def _stamps(name: str) -> Stamps:
    """Of an autoencoder's files in a folder; none for a Hub id."""
    folder = Path(name).expanduser()
    kinds = ("config.json", "*.safetensors", "*.safetensors.index.json")
    files = sorted(file for kind in kinds for file in folder.glob(kind))
    return {file.resolve(): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def _same(one: FrozenAutoencoder, read: Stamps, name: str) -> bool:
    """Whether a loaded autoencoder is what `name` means now: the same Hub id, the same files, or copies of them, such
    as the parts of a bundle carry.
    """
    asked = _stamps(name)
    if not asked or not read:
        return one.source == name and not asked and not read
    if asked == read:
        return True
    if _stamps(one.source) != read:  # its files were changed since; the copy in memory is of the old ones
        return False
    sizes = [[(file.name, size) for file, (size, _) in some.items()] for some in (asked, read)]
    return sizes[0] == sizes[1] and all(filecmp.cmp(a, b, shallow=False) for a, b in zip(asked, read, strict=True))


def _config(name: str) -> dict[str, Any]:
    diffusers = _diffusers()
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UnclipError(f"{folder} is no autoencoder: config.json is missing (found: {contents(folder)})")
    try:
        config: dict[str, Any] = diffusers.AutoencoderKL.load_config(name)
    except Exception as error:  # as above
        raise UnclipError(
            f"no autoencoder {name!r}: it is no folder here, and the Hub gave none of that name: {answer_of(error)}"
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
            "networks in latents need the package diffusers; install it with: pip install 'unclip[latent]'"
        ) from error
    return diffusers
