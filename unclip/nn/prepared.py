"""Work on the conditioning alone, done once for all steps of a sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class PreparedNetwork:
    """`(x_t, t, **conditioning) -> tensor` in two halves: `prepare(**conditioning)`, and `run(x_t, t, prepared)`.

    A sampler asks the same conditioning at every step; while the very same tensors come, they are prepared once. What
    is prepared takes no gradient (guidance's gradients are by x_t alone) and the result is that of the whole network.
    """

    def __init__(self, prepare: Callable[..., Any], run: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        self._prepare, self._run = prepare, run
        self._seen: dict[str, Any] | None = None
        self._inference = False
        self._prepared: Any = None

    def __call__(self, x_t: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        if not self._is_prepared(conditioning):
            with torch.no_grad():
                self._prepared = self._prepare(**conditioning)
            # The tensors themselves are kept, so that no other can come to have their identity.
            self._seen, self._inference = conditioning, torch.is_inference_mode_enabled()
        return self._run(x_t, t, self._prepared)

    def _is_prepared(self, conditioning: dict[str, Any]) -> bool:
        if self._seen is None or self._seen.keys() != conditioning.keys():
            return False
        # What was made in inference mode cannot take part in a gradient later.
        same = self._inference == torch.is_inference_mode_enabled()
        return same and all(self._seen[name] is value for name, value in conditioning.items())
