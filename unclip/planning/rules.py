"""What a GPU does otherwise than a CPU with the same network, told to tensors that claim to be on the CPU.

Plans are made on tensors without memory that carry the CPU's name, because PyTorch's backward pass refuses those of a
GPU where there is none. A CPU and a GPU differ in three things that decide how much memory a training step needs:

- under autocast a GPU computes norms, softmax and some others in float32, a CPU does not;
- a GPU's fused attention takes dropout, a CPU's falls back to one that keeps the whole attention matrix;
- a GPU keeps dropout's mask in one byte an element, a CPU a factor in the type of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# PyTorch's list of what CUDA's autocast runs in float32; a CPU's is shorter.
_FLOAT32 = {
    "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist",
    "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv",
    "exp", "expm1", "group_norm", "hinge_embedding_loss", "interpolate", "kl_div", "l1_loss", "layer_norm", "log",
    "log10", "log1p", "log2", "log_softmax", "margin_ranking_loss", "mse_loss", "multi_margin_loss",
    "multilabel_margin_loss", "nll_loss", "norm", "normalize", "pdist", "poisson_nll_loss", "pow", "prod",
    "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softmax", "softmin", "softplus",
    "sum", "tan", "triplet_margin_loss",
}


class GpuRules(TorchFunctionMode):
    """Inside, functions of PyTorch treat types, attention and dropout as on a GPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            # Fused kernels draw dropout anew in the backward pass and keep nothing of it.
            return func(*_without_dropout(args, named), **named)
        if func is F.dropout:
            return _dropout(*args, **named)
        if name in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_float32(value) for value in args]
            named = {key: _float32(value) for key, value in named.items()}
        return func(*args, **named)


def _float32(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


def _without_dropout(args: Sequence[Any], named: dict[str, Any]) -> list[Any]:
    named.pop("dropout_p", None)
    positional = list(args)
    if len(positional) > 4:
        positional[4] = 0.0
    return positional


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    result: Tensor = torch.native_dropout(input, p, True)[0]
    return result
