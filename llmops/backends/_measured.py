"""Which of the two kernels for CUDA tensors is faster, as measured: what the order under "auto" is
read from.

Large tensors: Triton's, in most shapes. Small ones are all launch, and CUDA C++'s takes half of the
time: 25 to 45 us for 45 to 90 on an H100. A compiled graph asks once for any size, and gets
Triton's.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of an op's first tensor up to which CUDA C++ was faster in every row measured, forward
# and backward: benchmarks/results/cuda-nvidia-h100-80gb-hbm3.json, to which tests/test_measured.py
# holds this table. The RMS norms' kernels are the layer norms' less the mean.
UP_TO = {
    "add_layer_norm": 1 << 23,
    "add_rms_norm": 1 << 23,
    "cross_entropy": 1 << 25,
    "layer_norm": 1 << 23,
    "rms_norm": 1 << 23,
    "rope": 1 << 24,
    "rope_qk": 1 << 24,
}
# Cross-entropy of rows that do not begin at 16 bytes was slower there, up to three times.
ALIGNED = {"cross_entropy"}
SMALL = "small"

_is_compiling = torch.compiler.is_compiling


def size_of(op: str, x: Tensor) -> tuple[str, ...]:
    """The feature of a call that says so where x is small in the sense of the table."""
    if not x.is_cuda or _is_compiling() or x.numel() > UP_TO.get(op, -1):
        return ()
    if op in ALIGNED and x.shape[-1] * x.element_size() % 16:
        return ()
    return (SMALL,)
