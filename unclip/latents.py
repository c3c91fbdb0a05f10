"""Bipartite latents (z_i, x_T): what an unCLIP decoder makes of an image, and the file they are kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unclip.errors import UnclipError, UsageError

FORMAT = "unclip-latents-1"


@dataclass(frozen=True)
class Origin:
    """The model that latents belong to: its name, what its decoder predicts, and digests of decoder and CLIP."""

    model: str
    prediction: str
    decoder: str
    clip: str


@dataclass(frozen=True)
class Latents:
    """Bipartite latents of B pictures (unCLIP, §3): z_i holds what CLIP recognises, x_T everything else.

    embedding: z_i, (B, E), as the decoder takes it. noise: x_T, (B, C, S, S) of the decoder's own channels and edge,
    found by DDIM inversion; None: still to be drawn, from a seed. timesteps: those of the inversion, ascending; the
    first is the level at which the picture is taken to lie (unclip.diffusion.latents).
    """

    embedding: Tensor
    noise: Tensor | None
    timesteps: tuple[int, ...]
    origin: Origin

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, rows: slice) -> Latents:
        noise = None if self.noise is None else self.noise[rows]
        return replace(self, embedding=self.embedding[rows], noise=noise)

    def repeated(self, count: int) -> Latents:
        """Every picture `count` times in a row."""
        noise = None if self.noise is None else self.noise.repeat_interleave(count, 0)
        return replace(self, embedding=self.embedding.repeat_interleave(count, 0), noise=noise)

    def check(self, own: Origin, source: str = "these latents") -> None:
        """UnclipError unless they belong to the model `own` is of."""
        for part in ("decoder", "clip"):
            theirs, wanted = getattr(self.origin, part), getattr(own, part)
            if theirs != wanted:
                name = "CLIP" if part == "clip" else part
                raise UnclipError(
                    f"{source} belong to the model {self.origin.model!r} ({name} {theirs[:8]}), and this is "
                    f"{own.model!r} ({name} {wanted[:8]}); encode the picture again with this model"
                )

    def to_bytes(self) -> bytes:
        """As a safetensors file. UsageError: there is no noise to keep."""
        from safetensors.torch import save

        if self.noise is None:
            raise UsageError("latents without noise are embeddings alone; keep them as such")
        tensors = {"embedding": self.embedding, "noise": self.noise}
        metadata = {"format": FORMAT, "timesteps": json.dumps(list(self.timesteps)), **asdict(self.origin)}
        return save({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, metadata)

    def save(self, file: str | Path) -> None:
        """Write them to a safetensors file, whole or not at all. UnclipError: it cannot be written."""
        path = Path(file).expanduser()
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            temporary.write_bytes(self.to_bytes())
            temporary.replace(path)
        except OSError as error:
            raise UnclipError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, file: str | Path) -> Latents:
        """Read what `save` wrote. UnclipError: no such file, no latents, damaged."""
        from safetensors import SafetensorError, safe_open

        path = Path(file).expanduser()
        if not path.is_file():
            raise UnclipError(f"there is no file of latents at {path}")
        try:
            with safe_open(path, "pt") as stored:
                metadata: dict[str, str] = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UnclipError(f"{path} is damaged or not a safetensors file: {error}") from error
        if metadata.get("format") != FORMAT or set(tensors) != {"embedding", "noise"}:
            raise UnclipError(f"{path} holds no latents; expected what `unclip reconstruct` wrote with --latents")
        try:
            timesteps = tuple(int(t) for t in json.loads(metadata["timesteps"]))
            origin = Origin(**{name: metadata[name] for name in Origin.__dataclass_fields__})
        except (KeyError, ValueError, TypeError) as error:
            raise UnclipError(f"{path} is damaged: its metadata lacks or garbles {error}") from error
        embedding, noise = tensors["embedding"].float(), tensors["noise"].float()
        if embedding.ndim != 2 or noise.ndim != 4 or len(embedding) != len(noise) or len(timesteps) < 2:
            raise UnclipError(
                f"{path} is damaged: embeddings {tuple(embedding.shape)}, noise {tuple(noise.shape)} and "
                f"{len(timesteps)} timesteps do not belong together"
            )
        if not bool(torch.isfinite(embedding).all() and torch.isfinite(noise).all()):
            raise UnclipError(f"{path} is damaged: it holds NaN or infinity")
        return cls(embedding, noise, timesteps, origin)
