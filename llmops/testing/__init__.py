"""The conformance kit: what an operator must satisfy, checked on every backend, ISA and dtype.

An operator is described once, by an `OpSpec`: its function, its plain PyTorch form, PyTorch's own
computation in the same dtype, and a generator of samples. Everything else follows from that: each
check runs over every usable target. Another library can hold its own op to the same standard:

    # test_my_op.py, run by pytest
    from llmops.testing import OpSpec, Sample, suite
    SPEC = OpSpec("my_op", fn=my_op, reference=my_op_plain, torch_fn=my_op_plain, samples=samples)
    globals().update(suite(SPEC))

or without pytest, as a command with a report and an exit code (0: conforms, 1: does not):

    python -m llmops.testing my_package.my_specs:SPEC       (or: llmops conform ...)

The oracle is the plain form in fp64. Allowed error, row by row (last dimension): twice the error of
PyTorch's own same-dtype computation for results, three times for gradients, plus a floor of
2 eps(dtype) max|oracle| in that row.
"""

from llmops.testing._checks import CHECKS
from llmops.testing._core import (
    Make,
    OpSpec,
    Sample,
    Target,
    assert_close,
    call,
    cast,
    targets,
)
from llmops.testing._suite import suite

__all__ = [
    "CHECKS",
    "Make",
    "OpSpec",
    "Sample",
    "Target",
    "assert_close",
    "call",
    "cast",
    "suite",
    "targets",
]
