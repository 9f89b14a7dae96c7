"""Autocast on GPUs: the front doors under fake CUDA tensors, beside torch's own functions. (On CPU
the conformance kit's check `autocast` compares values too.)"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import llmops

PAIRS = {
    "softmax": (lambda x, w: llmops.softmax(x), lambda x, w: torch.softmax(x, -1)),
    "softmax-dtype": (
        lambda x, w: llmops.softmax(x, dtype=torch.float16),
        lambda x, w: torch.softmax(x, -1, dtype=torch.float16),
    ),
    "layer_norm": (
        lambda x, w: llmops.layer_norm(x, 8, w, w),
        lambda x, w: F.layer_norm(x, (8,), w, w),
    ),
    "rms_norm": (lambda x, w: llmops.rms_norm(x, 8, w), lambda x, w: F.rms_norm(x, (8,), w)),
    "add_layer_norm": (
        lambda x, w: llmops.add_layer_norm(x, x, 8, w, w),
        lambda x, w: (F.layer_norm(x + x, (8,), w, w), x + x),
    ),
    "add_rms_norm": (
        lambda x, w: llmops.add_rms_norm(x, x, 8, w),
        lambda x, w: (F.rms_norm(x + x, (8,), w), x + x),
    ),
    "gelu": (lambda x, w: llmops.gelu(x), lambda x, w: F.gelu(x)),
    "swiglu": (lambda x, w: llmops.swiglu(x, x), lambda x, w: F.silu(x) * x),
}


@pytest.fixture
def cuda_autocast() -> Iterator[None]:
    """torch.autocast("cuda") turns itself off where there is no GPU; its switch does not."""
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.filterwarnings("ignore::llmops.FallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_autocast_gives_torch_dtypes_on_cuda(
    name: str, dtype: torch.dtype, cuda_autocast: None
) -> None:
    ours, theirs = PAIRS[name]
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda", dtype=dtype)
        weight = torch.empty(8, device="cuda", dtype=dtype)
        got, want = ours(x, weight), theirs(x, weight)
    as_tuple = [r if isinstance(r, tuple) else (r,) for r in (got, want)]
    assert [r.dtype for r in as_tuple[0]] == [r.dtype for r in as_tuple[1]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_under_compile(backend: str) -> None:
    """A compiler traces the switch: the graph has autocast's dtype, or not, as eager."""

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        return llmops.attention(q, q, q, backend=backend), llmops.softmax(q, backend=backend)  # type: ignore[return-value]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 2, 5, 8)
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            for got, want in zip(compiled(q), step(q), strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got, want)
