"""Principal components of CLIP image embeddings: measured on a data set, kept with a model (unCLIP §2.2, §4)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from unclip.bundle import load_part, save_part
from unclip.config import Config
from unclip.errors import UnclipError, UsageError

KIND = "pca"
_ROUNDING = 1e-12
"""Share of the largest variance below which a component is rounding."""


class PCAConfig(Config):
    """What the components of a model folder's part `pca` were measured on."""

    embedding_dim: int = Field(ge=1, description="width E of the embeddings")
    components: int = Field(ge=1, description="directions K in which the measured embeddings vary")
    embedding_length: Literal["unit", "raw"] = Field(
        "unit", description="whether embeddings of unit length were measured, or of the length that the CLIP gives them"
    )
    samples: int = Field(ge=2, description="embeddings measured")
    data: str | None = Field(None, description="the data set's name")


class Decomposition(NamedTuple):
    """Mean (E,), orthonormal components (E, E) as rows by falling variance, and these variances (E,); float64."""

    mean: Tensor
    components: Tensor
    variances: Tensor

    @property
    def rank(self) -> int:
        """Components that are more than rounding."""
        return int((self.variances > self.variances[0] * _ROUNDING).sum())


def decompose(embeddings: Tensor) -> Decomposition:
    """Principal component analysis of embeddings (N, E), in float64 on the CPU.

    An eigenvector's sign is arbitrary; here its largest element is positive, which gives every machine the same ones.
    """
    data = embeddings.double().cpu()
    mean = data.mean(0)
    centred = data - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(data))
    variances, basis = values.flip(0).clamp_min(0), vectors.T.flip(0)  # rows by falling eigenvalue
    signs = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    return Decomposition(mean, basis * signs, variances)


class PrincipalComponents:
    """Mean (E,), components (K, E) and variances (K,) of a CLIP's image embeddings, float32."""

    def __init__(self, config: PCAConfig, mean: Tensor, components: Tensor, variances: Tensor) -> None:
        width, count = config.embedding_dim, config.components
        shapes = {"mean": (width,), "components": (count, width), "variances": (count,)}
        for (name, shape), tensor in zip(shapes.items(), (mean, components, variances), strict=True):
            if tensor.shape != shape:
                raise UnclipError(f"the PCA's {name} has shape {tuple(tensor.shape)}, its config.json says {shape}")
        self.config = config
        self.mean, self.components, self.variances = mean.float(), components.float(), variances.float()

    @property
    def count(self) -> int:
        """K, the components there are."""
        return self.config.components

    def check_dims(self, dims: list[int]) -> None:
        """UsageError unless so many components can be kept, one number of them after the other."""
        if not dims:
            raise UsageError("no number of dimensions given; expected some such as 20 30 40 80")
        for number in dims:
            if number > self.config.embedding_dim:
                raise UsageError(
                    f"{number} dimensions are asked for, and this CLIP's embeddings have {self.config.embedding_dim}"
                )
            if number > self.count and self.config.samples <= self.count + 1:
                raise UsageError(
                    f"{number} dimensions are asked for, and the {self.config.samples} embeddings measured tell "
                    f"{self.count}; fit the PCA on more images"
                )
            if number < 0:
                raise UsageError(f"{number} dimensions are asked for; expected 0 (the mean) or more")

    def reconstruct(self, embeddings: Tensor, dims: int) -> Tensor:
        """mean + Σ_{j ≤ dims} ⟨z − mean, v_j⟩ v_j for embeddings z (B, E) -> (B, E), float32, of whatever length.

        0 dimensions give the mean. Where more embeddings were measured than there are components, nothing varies beyond
        these, and more dimensions are the same as all of them. UsageError: more dimensions than E, or than the
        embeddings measured can tell.
        """
        self.check_dims([dims])
        mean, basis = self.mean.to(embeddings.device), self.components[:dims].to(embeddings.device)
        return mean + (embeddings.float() - mean) @ basis.T @ basis

    def explained(self, dims: int) -> float:
        """Share of the measured variance that lies in the first components."""
        return float(self.variances[:dims].double().sum() / self.variances.double().sum())

    def save(self, folder: Path) -> None:
        """Write a part that a bundle may name as `pca`. Raises UnclipError when it cannot be written."""
        state = {"mean": self.mean, "components": self.components, "variances": self.variances}
        save_part(folder, KIND, self.config, state)

    @classmethod
    def load(cls, folder: Path) -> PrincipalComponents:
        """Read a part written by `save`. Raises UnclipError: incomplete, damaged, of another kind."""
        config, state = load_part(folder, KIND, PCAConfig)
        wanted = {"mean", "components", "variances"}
        if set(state) != wanted:
            raise UnclipError(f"{folder} holds {', '.join(sorted(state))}; a PCA has {', '.join(sorted(wanted))}")
        return cls(config, **state)


def fit_components(
    embeddings: Tensor, *, embedding_length: Literal["unit", "raw"] = "unit", data: str | None = None
) -> PrincipalComponents:
    """All the components in which embeddings (N, E) vary, N − 1 at most. UsageError: fewer than two, or all alike."""
    if len(embeddings) < 2:
        raise UsageError(f"{len(embeddings)} embeddings have no principal components; expected at least 2")
    found = decompose(embeddings)
    # Of unit vectors that are all alike rounding leaves variances of about (1e-7)².
    if float(found.variances.sum()) <= 1e-12 * float(embeddings.double().square().sum(1).mean()):
        raise UsageError(f"the {len(embeddings)} embeddings measured are all alike; a PCA needs images that differ")
    count = min(found.rank, len(embeddings) - 1)
    config = PCAConfig(
        embedding_dim=embeddings.shape[1],
        components=count,
        embedding_length=embedding_length,
        samples=len(embeddings),
        data=data,
    )
    return PrincipalComponents(config, found.mean, found.components[:count], found.variances[:count])
