"""The Triton attention whose full blocks come by tensor descriptors: where tensors permit these,
results are those of pointers to the last bit; elsewhere pointers serve."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llmops
from llmops.testing import Target
from llmops.testing._suite import Case, cases
from llmops.testing.specs import attention, attention_varlen

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from llmops.kernels.triton import _config, _launch
from llmops.kernels.triton import attention as module

SPECS = {s.name: s for s in (attention.SPEC, attention_varlen.SPEC)}
# Of these some blocks are full: several, in groups, with odd and unequal dimensions, in packed
# sequences, behind a sink and of a scale that turns the scores.
IN_BLOCKS = (
    "130x140-d64", "70x100-d80x48", "odd-67x103-d33x65", "wide-9x40-d20x300", "packed-24x90",
    "sinks-70x100", "negative-scale-9x20", "window-130x160", "uneven-mha", "uneven-gqa",
)  # fmt: skip
BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _cases() -> Iterator[Any]:
    for op, spec in SPECS.items():
        for case in cases(spec):
            if case.target == Target("triton", "cpu") and case.check == "matches_reference":
                if case.sample.id in IN_BLOCKS:
                    yield pytest.param(op, case, id=f"{op}-{case.id}")


@pytest.mark.rotating
@pytest.mark.parametrize(("op", "case"), [*_cases()])
def test_triton_attention_descriptors_match_reference(op: str, case: Case) -> None:
    with _config.override("attention", DESCRIPTORS=True, **BLOCKS):
        case.run(SPECS[op])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch of the forward, whether it got descriptors."""
    seen: list[bool] = []

    def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        k_tiles, v_tiles = arguments[-2:]
        assert (k_tiles is None) == (v_tiles is None)
        seen.append(k_tiles is not None)
        _launch.launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(module, "launch", launch)
    return seen


def _attention(*qkv: Tensor, **how: Any) -> Any:
    return llmops.attention(*qkv, return_lse=True, backend="triton", **how)


def _both(given: list[bool], call: Callable[..., Any], *args: Any, **how: Any) -> bool:
    """Whether descriptors serve the call, whose results are in any case the same."""
    with _config.override("attention", DESCRIPTORS=False, **BLOCKS):
        want = call(*args, **how)
    with _config.override("attention", DESCRIPTORS=True, **BLOCKS):
        got = call(*args, **how)
    assert all(map(torch.equal, got, want))
    assert all(x[x > -torch.inf].isfinite().all() for x in got)
    before, after = given
    given.clear()
    assert not before
    return after


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _beside_nan(x: Tensor, before: int = 0, rows: int = 7, columns: int = 8) -> Tensor:
    """In a tensor that is NaN beyond x's rows and columns, and before its columns."""
    b, h, t, d = x.shape
    all_of_it = x.new_full((b, h, t + rows, before + d + columns), float("nan"))
    inside = all_of_it[:, :, :t, before : before + d]
    return inside.copy_(x)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "contiguous": (lambda x: x, True),
    "tokens-first": (_tokens_first, True),
    "beside-nan": (_beside_nan, True),
    "stepped": (lambda x: x.repeat_interleave(2, 3)[..., ::2], True),  # copied, for any kernel
    "odd-rows": (lambda x: _beside_nan(x, columns=3), False),
    "odd-base": (lambda x: _beside_nan(x, before=1, columns=7), False),
    "one-head-expanded": (lambda x: x[:, :1].expand(x.shape), False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_attention_descriptors_by_layout(layout: str, dtype: str, given: list[bool]) -> None:
    """Two heads a group, keys that are no multiple of a block."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 40).to(DTYPES[dtype]) for h, t in ((4, 37), (2, 71), (2, 71)))
    move, permitted = LAYOUTS[layout]
    k, v = move(k), move(v)
    for causal in (False, True):
        assert _both(given, _attention, q, k, v, causal=causal) == permitted


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128), (72, 24), (24, 264)], ids=str)
def test_triton_attention_descriptors_by_dimensions(
    dims: tuple[int, int], given: list[bool]
) -> None:
    torch.manual_seed(0)
    shapes = (33, dims[0]), (50, dims[0]), (50, dims[1])
    qkv = [torch.randn(1, 2, *shape).bfloat16() for shape in shapes]
    assert _both(given, _attention, *qkv) and _both(given, _attention, *qkv, causal=True)
    # One loop that compares everything has no full blocks.
    assert not _both(given, _attention, *qkv, window=(20, 0))
    assert not _both(given, _attention, *qkv, mask=torch.ones(33, 50, dtype=torch.bool))


def test_triton_attention_descriptors_of_both_or_neither(given: list[bool]) -> None:
    q, k = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 40, 16)
    odd, nothing = _beside_nan(k, columns=3), k[:, :, :0]
    assert _both(given, _attention, q, k, k)
    for keys, values in ((odd, k), (k, odd), (nothing, nothing)):
        assert not _both(given, _attention, q, keys, values)


def test_triton_attention_descriptors_of_packed_sequences(given: list[bool]) -> None:
    """One tensor of all sequences, of which a block begins at any row; NaN in rows of none."""
    torch.manual_seed(0)
    ends, own = torch.tensor([5, 19, 70, 71, 133]), slice(5, 133)
    q, k, v = (torch.randn(140, h, 16) for h in (4, 2, 2))
    for x in (k, v):
        x[:5] = x[133:] = float("nan")

    def call() -> Any:
        out, lse = llmops.attention_varlen(
            q, k, v, ends, ends, 62, 62, causal=True, return_lse=True, backend="triton"
        )
        return out[own], lse[:, own]

    assert _both(given, call)


def _asked(where: str, shape: tuple[int, ...], **how: Any) -> bool:
    """Whether a call on such an architecture launches with descriptors."""
    x = torch.zeros(shape, dtype=torch.bfloat16)
    with _launch.recording(where) as launches, _config.override("attention", **how):
        llmops.attention(x, x, x, backend="triton")
    (launch,) = launches
    return launch.arguments["k_tiles"] is not None


def test_triton_attention_descriptors_are_asked_for() -> None:
    """By tuning, never by the tables; on Hopper and later, of heads that are one tile."""
    one, two = (1, 1, 300, 128), (1, 1, 300, 192)
    for where in ("sm90", "sm100", "sm103", "sm120"):
        assert _asked(where, one, DESCRIPTORS=True)
        assert not _asked(where, two, DESCRIPTORS=True)
        assert not _asked(where, one, DESCRIPTORS=False) and not _asked(where, one)
    for where in ("sm80", "sm89", "gfx942"):
        assert not _asked(where, one, DESCRIPTORS=True)


def test_triton_attention_descriptors_are_candidates() -> None:
    """Of `llmops tune`, where they can serve; few enough for the search either way."""

    def found(where: str, op: str, dim: int, dtype: torch.dtype, general: bool) -> int:
        with _launch.recording(where):
            options = list(module.candidates(op, (dim, dtype, general)))
        assert len({str(o) for o in options}) == len(options) < 64
        return sum(o.get("DESCRIPTORS", False) for o in options)

    half, single = torch.bfloat16, torch.float32
    assert found("sm90", "attention", 128, half, False) == 24
    assert found("sm120", "attention", 64, single, False) == 8
    for refused in (
        ("sm80", "attention", 128, half, False), ("gfx942", "attention", 128, half, False),
        ("sm90", "attention", 256, half, False), ("sm90", "attention", 128, single, False),
        ("sm90", "attention", 128, half, True), ("sm90", "attention_bwd", 128, half, False),
    ):  # fmt: skip
        assert found(*refused) == 0


# Triton's own launcher of an NVIDIA GPU, whose driver encodes nothing and launches nothing.
LAUNCHES = """
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

launched = []

def keep(*given):  # of Triton 3.7, and of 3.6, which compiles a launcher for each kernel
    launched.append(list(given[-1] if isinstance(given[-1], list) else given[13:]))

nvidia.compile_module_from_src = lambda **source: SimpleNamespace(launch=keep)
nvidia.library_dirs, nvidia.PyKernelArg = list, SimpleNamespace

class Utils:
    launch = staticmethod(keep)
    build_signature_metadata = tuple
    def fill_tma_descriptor(self, address, *rest):
        return "encoded", address
    fill_tma_descriptor_tiled = fill_tma_descriptor
    def get_device_properties(self, device):
        return dict(max_shared_mem=232448, multiprocessor_count=132, max_num_regs=65536,
                    warpSize=32)
    def load_binary(self, *arguments):
        return 1, 2, 32, 0, 1024
    def unload_module(self, module):
        pass

class Driver:
    utils, launcher_cls = Utils(), nvidia.CudaLauncher
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 7
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    map_python_to_cpp_type = lambda self, kind: nvidia.ty_to_cpp(kind)

driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
from llmops.kernels.triton import _config, _launch, attention
_launch._architecture = "sm90"

for turn in range(3):
    q, k, v = (torch.zeros(2, 300, 4, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    with _config.override("attention", DESCRIPTORS=True):
        attention.attention(q, k, v, None, True, 0.125)
    attention.attention_fwd_kernel.run = None  # from now on by the key of kind, then of values
    at = [i for i, x in enumerate(launched[-1]) if isinstance(x, tuple)]
    assert len(launched) == turn + 1 and len(at) == 2, at
    for i, x in zip(at, (k, v)):
        assert launched[-1][i] == ("encoded", x.data_ptr())
        assert launched[-1][i + 1 : i + 9] == [*x.shape, *x.stride()]
    assert launched[-1][1] is k and launched[-1][2] is v
assert len(_launch._by_kind) == len(_launch._by_value) == 1

# A kernel is compiled for its tiles.
half, single = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 64, 64)
tiles = [TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, rows, 64])
         for x in (half, single) for rows in (32, 64)]
assert len({_launch._kind(_launch._value(x)) for x in tiles}) == 4
print("fine")
"""


def test_triton_attention_descriptors_are_encoded_at_each_launch() -> None:
    """Of where K and V lie then, by Triton's launcher though by our own key."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "fine\n", done.stdout + done.stderr
