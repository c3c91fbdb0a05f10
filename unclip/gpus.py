"""GPUs as their makers' data sheets describe them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from unclip.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB as the driver reports it, and peak TFLOP/s of dense matrix products.

    `bfloat16` is the tensor cores' rate with float32 accumulation and without sparsity, None where the GPU has no
    bfloat16; `float32` is the rate outside the tensor cores, which PyTorch's matrix products use by default.
    """

    name: str
    memory_gib: float
    bfloat16: float | None
    float32: float

    def teraflops(self, precision: str) -> float:
        """Peak for `train.precision`. UsageError: bfloat16 on a GPU that has none."""
        if precision == "float32":
            return self.float32
        if self.bfloat16 is None:
            raise UsageError(
                f"{self.name} has no bfloat16, and the configuration trains with it; "
                "add train.precision=float32 or choose a newer GPU"
            )
        return self.bfloat16


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 178.4, 2250.0, 75.0),
        Gpu("h200", 139.8, 989.4, 66.9),
        Gpu("h100", 79.1, 989.4, 66.9),
        Gpu("h100-pcie", 79.1, 756.0, 51.2),
        Gpu("a100-80", 79.2, 312.0, 19.5),
        Gpu("a100-40", 39.4, 312.0, 19.5),
        Gpu("l40s", 44.4, 362.0, 91.6),
        Gpu("a6000", 47.5, 154.8, 38.7),
        Gpu("a10", 22.0, 125.0, 31.2),
        Gpu("l4", 22.0, 121.0, 30.3),
        Gpu("rtx5090", 31.4, 209.5, 104.8),
        Gpu("rtx4090", 23.5, 165.2, 82.6),
        Gpu("rtx3090", 23.6, 71.0, 35.6),
        Gpu("v100", 31.7, None, 15.7),
        Gpu("v100-16", 15.8, None, 15.7),
        Gpu("t4", 14.6, None, 8.1),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, in any case. UsageError: an unknown one, with the nearest names."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    if key in GPUS:
        return GPUS[key]
    begun = [known for known in GPUS if key and known.startswith(key)]
    near = begun or difflib.get_close_matches(key, GPUS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? Known" if near else "known"
    raise UsageError(f"no GPU called {name!r}; {hint}: {', '.join(GPUS)}")


# The driver's names of those GPUs. A part of a GPU (MIG), a laptop's or a variant of another rate is none of them.
_DRIVER_NAMES = (
    (r"\bB200\b", "b200"),
    (r"\bH200\b", "h200"),
    (r"\bH100 PCIe\b", "h100-pcie"),
    (r"\bH100\b(?!.*\bNVL\b)", "h100"),
    (r"\bA100\b.*\b80GB\b", "a100-80"),
    (r"\bA100\b.*\b40GB\b", "a100-40"),
    (r"\bL40S\b", "l40s"),
    (r"\bRTX A6000\b", "a6000"),
    (r"\bA10\b", "a10"),
    (r"\bL4\b", "l4"),
    (r"\bRTX (\d090)\b(?! (D|Laptop))", r"rtx\1"),
    (r"\bV100\b.*\b16GB\b", "v100-16"),
    (r"\bV100\b", "v100"),
    (r"\bT4\b", "t4"),
)


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that the driver calls by this name ('NVIDIA H100 80GB HBM3'); None for one that is not listed."""
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, name in _DRIVER_NAMES:
        found = re.search(pattern, device_name, re.IGNORECASE)
        if found:
            return GPUS.get(found.expand(name))
    return None
