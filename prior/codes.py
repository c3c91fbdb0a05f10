"""An embedding as a short sequence of codes: principal components, each cut into buckets (unCLIP §2.2).

Buckets are uniform between the smallest and the largest value measured of a component. With 1,024 of them the rounding
is far below what the dropped components lose, also where a rare value stretches the range, and every value inside the
range comes back within half a bucket. Equally frequent buckets would be coarse in the tails instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unclip.components import decompose
from unclip.errors import UsageError


class CodeStatistics(NamedTuple):
    """What `EmbeddingCodes` needs to know: mean (E,), components (K, E) by falling variance, variances (E,) of all of
    them, low and high (K,): the ends of the measured range.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor
    low: Tensor
    high: Tensor


def measure_codes(embeddings: Tensor, components: int | None, largest_error: float) -> CodeStatistics:
    """Principal component analysis of embeddings (N, E), in float64.

    Keeps `components`, or as few as lose at most `largest_error` of the variance. Raises UsageError: embeddings that do
    not vary, or fewer of them than the components need.
    """
    data = embeddings.double().cpu()
    found = decompose(data)
    mean, basis, variances = found
    if float(variances.sum()) <= 0:
        raise UsageError(f"the {len(data)} embeddings measured are all alike; a prior needs images that differ")
    rank = found.rank  # what is rounding has no range to cut into buckets
    number = components_for(variances, largest_error) if components is None else components
    if number > rank:
        raise UsageError(
            f"components is {number}, but the {len(data)} embeddings measured vary in {rank} directions; lower "
            "model.components, or measure more of them with statistics_batches"
        )
    basis = basis[:number]
    projected = (data - mean) @ basis.T
    return CodeStatistics(*(part.float() for part in (mean, basis, variances, *projected.aminmax(dim=0))))


def components_for(variances: Tensor, largest_error: float) -> int:
    """The smallest number of components whose absence of the rest loses at most `largest_error` of the variance."""
    lost = 1 - variances.cumsum(0) / variances.sum()
    return int((lost > largest_error).sum()) + 1


class EmbeddingCodes(nn.Module):
    """Embeddings (B, E) <-> codes (B, K), int64 in [0, buckets); the statistics are buffers."""

    mean: Tensor
    components: Tensor
    variances: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, embedding_dim: int, components: int, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("components", torch.zeros(components, embedding_dim))
        self.register_buffer("variances", torch.zeros(embedding_dim))
        self.register_buffer("low", torch.zeros(components))
        self.register_buffer("high", torch.ones(components))

    def store(self, statistics: CodeStatistics) -> None:
        """Take what `measure_codes` found."""
        for name, value in statistics._asdict().items():
            getattr(self, name).copy_(value)

    @property
    def bucket_width(self) -> Tensor:
        """(K,)"""
        return (self.high - self.low) / self.buckets

    def project(self, embedding: Tensor) -> Tensor:
        """(B, E) -> coordinates along the components (B, K), float32: bfloat16 would be coarser than the buckets."""
        with torch.autocast(embedding.device.type, enabled=False):
            return (embedding.float() - self.mean) @ self.components.T

    def reconstruct(self, coordinates: Tensor) -> Tensor:
        """(B, K) -> (B, E); fewer than K coordinates leave the rest at the mean."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return self.mean + coordinates @ self.components[: coordinates.shape[1]]

    def quantise(self, coordinates: Tensor) -> Tensor:
        """(B, K) -> codes (B, K); values beyond the measured ends go into the outermost buckets."""
        return ((coordinates - self.low) / self.bucket_width).floor().clamp(0, self.buckets - 1).long()

    def dequantise(self, codes: Tensor) -> Tensor:
        """Codes (B, k) of the first k components -> their buckets' centres (B, k)."""
        count = codes.shape[1]
        return self.low[:count] + (codes + 0.5) * self.bucket_width[:count]

    def encode(self, embedding: Tensor) -> Tensor:
        """(B, E) -> codes (B, K)."""
        return self.quantise(self.project(embedding))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K), or the first of them, -> embeddings (B, E)."""
        return self.reconstruct(self.dequantise(codes))


class DotProducts(nn.Module):
    """z_i·z_t as a token: buckets between quantiles of its measured distribution, and how often each occurs."""

    edges: Tensor
    shares: Tensor

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros(buckets - 1))
        self.register_buffer("shares", torch.full((buckets,), 1 / buckets))

    def measure(self, values: Tensor) -> None:
        """Take the distribution of measured dot products (N,)."""
        values = values.double().cpu()
        buckets = len(self.shares)
        # torch.quantile is limited in size, and interpolates; an order statistic is as good an edge.
        places = (torch.arange(1, buckets, dtype=torch.float64) / buckets * len(values)).long()
        self.edges.copy_(values.sort().values[places])
        counts = torch.bincount(self.quantise(values.to(self.edges)), minlength=buckets)
        self.shares.copy_(counts / len(values))

    def quantise(self, values: Tensor) -> Tensor:
        """Dot products (B,) -> tokens (B,), int64 in [0, buckets), larger for larger dot products."""
        return torch.bucketize(values, self.edges.to(values.dtype), right=True)

    def draw(self, uniform: Tensor, percentile: float) -> Tensor:
        """uniform (B,) in [0, 1) -> tokens (B,) distributed as above the percentile of the measured distribution.

        A token that never occurred is never drawn: nothing was learned of it.
        """
        share = percentile + (1 - percentile) * uniform.double()
        cumulative = self.shares.double().cumsum(0)
        token = torch.searchsorted(cumulative, share.to(cumulative.device) * cumulative[-1], right=True)
        return token.clamp_max(int(self.shares.nonzero().max()))
