"""Memory a GPU needs for training, as `unclip.training` really lays it out.

Weights, their gradients, AdamW's moments and the moving average are float32; bfloat16 means autocast, whose copies are
among the activations. The figures by ZeRO stage were measured on the engine, also with two and four processes: from
stage 1 on DeepSpeed keeps a flat copy of the partition of weights that its optimizer updates, and a bucket in which
gradients wait to be reduced; of the moving average every GPU has its own part at every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

_FLOAT32 = 4
_MOMENTS = 2
# DeepSpeed's defaults, in elements: what one reduction takes together, and in stage 3 how many gathered weights may
# live at once and are fetched ahead.
_REDUCE_BUCKET = 500_000_000
_MAX_LIVE = 1_000_000_000
_PREFETCH = 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `gradients`, `activations` and `buffers` are at their own worst moments, which need not be the
    same one; `total` is the worst moment of the whole.
    """

    weights: int
    optimizer: int
    ema: int
    frozen: int
    gradients: int
    buffers: int
    activations: int
    total: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class States:
    """What a training step holds beside activations: bytes on one GPU of `gpus`."""

    weights: int
    optimizer: int
    ema: int
    gradients: int
    buffers: int

    @property
    def lasting(self) -> int:
        """What stays from step to step."""
        return self.weights + self.optimizer + self.ema


def model_states(parameters: int, trainable: int, zero_stage: int, gpus: int, accumulation: int = 1) -> States:
    """States of a network by ZeRO stage (Rajbhandari et al. 2020, §5, with float32 throughout)."""
    moments = _MOMENTS * _FLOAT32 * trainable
    whole, own = _FLOAT32 * trainable, _share(_FLOAT32 * trainable, gpus)
    ema = own  # frozen weights are their own average
    if zero_stage == 0:
        # All gradients are reduced at the end of the backward pass, a bucket's worth of copies at a time.
        copies = min(whole, _FLOAT32 * _REDUCE_BUCKET)
        return States(_FLOAT32 * parameters, moments, ema, whole, copies)
    optimizer = own + _share(moments, gpus)  # with the partition's copy of the weights
    bucket = _FLOAT32 * _REDUCE_BUCKET
    if zero_stage == 1:
        reduced = own if gpus > 1 else 0
        return States(_FLOAT32 * parameters, optimizer, ema, whole + reduced, bucket)
    # The gradients of this micro-batch and, where several are accumulated, of those before it.
    gradients = own * (2 if accumulation > 1 else 1)
    if zero_stage == 2:
        return States(_FLOAT32 * parameters, optimizer, ema, gradients, bucket)
    gathered = _FLOAT32 * (min(parameters, _MAX_LIVE) + min(parameters, _PREFETCH))
    partition = _share(_FLOAT32 * parameters, gpus)
    return States(partition, optimizer, ema, gradients, bucket + gathered)


def memory(
    parameters: int,
    trainable: int,
    *,
    zero_stage: int,
    gpus: int,
    accumulation: int,
    frozen: int,
    peak: Callable[[float], float],
) -> Memory:
    """Memory of one GPU. `frozen` is the frozen encoders' bytes; `peak(share)` the most that activations and that share
    of the gradients need at once.
    """
    states = model_states(parameters, trainable, zero_stage, gpus, accumulation)
    whole = _FLOAT32 * trainable
    share = 1.0 if zero_stage < 2 else 1 / gpus
    buffers = 0 if zero_stage == 0 else states.buffers  # stage 0 copies when the activations are gone
    during = peak(share if accumulation == 1 else 0.0) + (0.0 if accumulation == 1 else share * whole) + buffers
    if accumulation > 1 and zero_stage >= 2:
        during += share * whole
    after = states.gradients + states.buffers
    return Memory(
        states.weights,
        states.optimizer,
        states.ema,
        frozen,
        states.gradients,
        states.buffers,
        round(peak(0.0)),
        states.lasting + frozen + round(max(during, after)),
    )


def _share(whole: int, gpus: int) -> int:
    return -(-whole // gpus)
