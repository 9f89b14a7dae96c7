"""The repairs of Triton's interpreter (kernels/triton/_interpreter.py), each shown to work, and its
checks of addresses, each shown to fail. In a process of its own: the variable is read on import.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

KERNELS = """
import numpy as np
import torch
import triton
import triton.language as tl
from llmops.kernels.triton._launch import launch


@triton.jit
def arithmetic(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + n + i, a * b)
    tl.store(out + 2 * n + i, (a > b).to(tl.bfloat16))
    tl.store(out + 3 * n + i, tl.exp(a.to(tl.float32)).to(tl.bfloat16))
    tl.store(out + 4 * n + i, tl.where(a > b, a, b))


@triton.jit
def cast(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def sums(x, out, n: tl.constexpr):
    v = tl.load(x + tl.arange(0, n))
    tl.store(out, tl.sum(v, 0))
    tl.store(out + 1 + tl.arange(0, n), tl.cumsum(v, 0))


@triton.jit
def extremes(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.maximum(tl.load(x + i), tl.load(y + i)))
    tl.store(out + n + i, tl.minimum(tl.load(x + i), tl.load(y + i)))


@triton.jit
def product(a, b, out, n: tl.constexpr):
    i, j = tl.arange(0, n)[:, None], tl.arange(0, n)[None, :]
    c = tl.dot(tl.load(a + i * n + j), tl.load(b + i * n + j))
    tl.store(out + i * n + j, c)


@triton.jit
def copy(x, y, begin, n, FORCE: tl.constexpr, n_block: tl.constexpr):
    i = begin + tl.arange(0, n_block)
    keep = (i < n) | FORCE
    tl.store(y + tl.arange(0, n_block), tl.load(x + i, mask=keep, other=0.0), mask=keep)


@triton.jit
def integers(out, a, b):
    tl.store(out, a * b + b)


@triton.jit
def add_one(x, at):
    tl.atomic_add(x + at, 1.0)


torch.manual_seed(0)
N = 64
x, y = torch.randn(2, N)
"""


def interpreted(code: str, **environment: str) -> None:
    assert importlib.util.find_spec("triton"), "pip install triton"
    file = ROOT / "build" / "interpreter_kernels.py"  # triton.jit reads a kernel's source file
    file.parent.mkdir(exist_ok=True)
    if not file.exists() or file.read_text() != KERNELS:
        file.write_text(KERNELS)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'build')\n{IMPORTS}{code}"],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


IMPORTS = "from interpreter_kernels import *\n"


def test_interpreter_bf16_arithmetic() -> None:
    interpreted("""
a, b, out = x.bfloat16(), y.bfloat16(), torch.empty(5 * N, dtype=torch.bfloat16)
launch(arithmetic, (1,), a, b, out, n=N)
want = [a + b, a * b, (a > b).bfloat16(), a.float().exp().bfloat16(), torch.maximum(a, b)]
assert torch.equal(out, torch.cat(want)), (out - torch.cat(want)).abs().max()
""")


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("of", ["bfloat16", "float16", "float32"])
def test_interpreter_casts_round_to_nearest_even(of: str, to: str) -> None:
    interpreted(f"""
ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, float("inf"), float("nan"), 0.0, -0.0,
                     1e-30])
source = torch.cat([x[:56], ties]).to(torch.{of})
out = torch.empty(N, dtype=torch.{to})
launch(cast, (1,), source, out, n=N)
assert torch.equal(out.nan_to_num(7.0), source.to(torch.{to}).nan_to_num(7.0)), (out, source)
assert out.isnan().sum() == 1
""")


def test_interpreter_sums_of_bf16() -> None:
    interpreted("""
source, out = x.bfloat16(), torch.empty(1 + N)
launch(sums, (1,), source, out, n=N)
torch.testing.assert_close(out[0], source.float().sum(), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(out[1:], source.float().cumsum(0), rtol=1e-2, atol=1e-2)
""")


def test_interpreter_maximum_gives_the_number_beside_nan() -> None:
    interpreted("""
for dtype in (torch.float32, torch.bfloat16):
    a, b = x.to(dtype), y.to(dtype)
    a[3], b[5] = float("nan"), float("nan")
    out = torch.empty(2 * N, dtype=dtype)
    launch(extremes, (1,), a, b, out, n=N)
    assert torch.equal(out, torch.cat([torch.fmax(a, b), torch.fmin(a, b)]))
""")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_interpreter_products_of_16_bit_values_are_exact(dtype: str) -> None:
    interpreted(f"""
a, b = torch.randn(2, 16, 16).to(torch.{dtype})
out = torch.empty(16, 16)
launch(product, (1,), a, b, out, n=16)
torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
""")


RAISES = """
from llmops.kernels.triton._interpreter import OutOfBoundsError
memory = torch.zeros(4 * N)  # the tensors lie inside: what is beyond them could be read
a, b = memory[:N], memory[2 * N : 3 * N]

def raises(kernel, *arguments, **constants):
    try:
        launch(kernel, (1,), *arguments, **constants)
    except Exception as error:
        while error is not None and not isinstance(error, OutOfBoundsError):
            error = error.__cause__ or error.__context__
        return str(error) if error else ""
    return ""
"""


def test_interpreter_addresses_out_of_bounds_raise() -> None:
    interpreted(
        RAISES
        + """
assert not raises(copy, a, b, 0, N, FORCE=False, n_block=N)
assert not raises(copy, a, b, 8, N, FORCE=False, n_block=N)  # masked beyond the end
found = raises(copy, a, b, 8, N, FORCE=True, n_block=N)
assert "a load at byte 256 of a tensor that spans 256" in found, found
assert "a load at byte -4" in raises(copy, a, b, -1, N, FORCE=False, n_block=N)
assert "a store" in raises(copy, a, b[:32], 0, N, FORCE=False, n_block=N)
assert not raises(add_one, a, 3) and a[3] == 1
assert "an atomic" in raises(add_one, a, N) or "a atomic" in raises(add_one, a, N)
assert memory[N : 2 * N].eq(0).all() and memory[3 * N :].eq(0).all()
"""
    )


def test_interpreter_integers_that_overflow_raise() -> None:
    interpreted("""
out = torch.zeros(1, dtype=torch.int64)
for a, b, fits in ((2**16, 2**14, True), (2**16, 2**15, False), (2**31 - 2, 1, True),
                   (2**31 - 1, 1, False), (-(2**16), 2**15 + 1, False), (2**40, 2**10, True)):
    try:
        launch(integers, (1,), out, a, b)
    except Exception as error:
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__
        assert isinstance(error, OverflowError) and not fits, (a, b, error)
    else:
        assert fits and out == a * b + b, (a, b, out)
""")


def test_interpreter_finds_a_kernel_that_forgets_its_mask() -> None:
    """Broken on purpose: softmax told that its rows are longer than they are."""
    interpreted(
        RAISES
        + """
from llmops.kernels.triton import softmax
options = dict(MASK=0, CAUSAL=False, ROWS=1, BLOCK=64)
rows = lambda n: (a[:60], b[:60], None, 1, n, 60, 1.0, 1, 1, 1, 0, 0, 0, 0)
assert not raises(softmax.softmax_fwd_kernel, *rows(60), **options)
assert "a load at byte 240" in raises(softmax.softmax_fwd_kernel, *rows(61), **options)
"""
    )
