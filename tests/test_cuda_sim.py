"""The CUDA simulator (tests/cuda_sim): it computes what a GPU would, and tells what it must not let
pass, each shown on a kernel that is wrong on purpose."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch

SEEDS = range(8)


def call(sim: Any, name: str, x: torch.Tensor, y: torch.Tensor, n: int = 0) -> torch.Tensor:
    floats = [t.numel() * t.element_size() // 4 for t in (x, y)]
    sim.selftest(name, x.data_ptr(), y.data_ptr(), n, *floats)
    return y


def run(sim: Any, name: str, *, n: int = 128, **schedule: int) -> torch.Tensor:
    sim.schedule(**schedule)
    x = torch.arange(128, dtype=torch.float32)
    return call(sim, name, x, torch.full((128,), torch.nan), n)


def test_cuda_sim_reductions_and_collectives(sim: Any) -> None:
    for order, seed in ((0, 0), (1, 0), *((2, s) for s in SEEDS)):
        assert run(sim, "sum", order=order, seed=seed).eq(8128).all()
        lane = torch.arange(128) % 32
        swapped = torch.where(lane < 16, lane ^ 1, lane)  # an odd number of exchanges
        want = swapped.view(4, 32).flip(1).flatten()
        assert torch.equal(run(sim, "uneven masks", order=order, seed=seed), want.float())
        assert run(sim, "copy", order=order, seed=seed)[0] == 127
        down, up = torch.where(lane < 29, lane + 3, lane), torch.where(lane < 5, lane, lane - 5)
        want = down + 100 * up + 10000 * (torch.arange(128) | 31)
        assert torch.equal(run(sim, "collectives", order=order, seed=seed), want.float())
    y = call(sim, "atomic", torch.zeros(1), torch.zeros(1))
    assert y.item() == 25600


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_cuda_sim_products_on_tensor_cores(sim: Any, dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(16 * 16 + 16 * 8).to(dtype)
    y = call(sim, f"product {name}", values.view(torch.float32), torch.full((128,), torch.nan))
    a, b = values[:256].view(16, 16).double(), values[256:].view(16, 8).double()
    torch.testing.assert_close(y.view(16, 8).double(), a @ b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bf16 64", "bf16 96", "fp16 128", "fp16 64 narrow"])
def test_cuda_sim_products_of_tiles(sim: Any, name: str) -> None:
    """csrc/cuda/mma.h: tiles by cp.async, with fewer rows and columns than they hold, all forms of
    fragments."""
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    size = int(name.split()[1])
    torch.manual_seed(0)
    for seed, rows in enumerate((32, 27, 8)):
        sim.schedule(seed=seed)
        values = torch.randn(2 * rows * (size - 8)).to(dtype)
        numbers = 32 * 32 + size * size + 32 * size
        y = call(sim, f"tiles {name}", values.view(torch.float32), torch.zeros(numbers), rows)
        a, b = torch.zeros(2, 32, size, dtype=torch.float64)
        a[:rows, :-8], b[:rows, :-8] = values.view(2, rows, size - 8).double()
        wants = (a @ b.T, a.T @ b, a[:, :32] @ b)
        for got, want in zip(y.split([w.numel() for w in wants]), wants, strict=True):
            torch.testing.assert_close(got.view_as(want).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_sim_converts_as_torch_does(sim: Any, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    near = torch.nextafter(every, torch.full_like(every, torch.inf))
    middle = (every + every.roll(1)) / 2
    x = torch.cat(
        [every, near, middle, torch.randn(10000) * 1e-6, torch.tensor([65519.0, 65520.0])]
    )
    bits, back = torch.empty(len(x), dtype=torch.int16), torch.empty_like(x)
    sim.convert(x.data_ptr(), bits.data_ptr(), back.data_ptr(), len(x), dtype == torch.bfloat16)
    want = x.to(dtype)
    torch.testing.assert_close(back, want.float(), rtol=0, atol=0, equal_nan=True)
    number = ~want.isnan()
    assert torch.equal(bits[number], want[number].view(torch.int16))


def test_cuda_division_by_invariants_is_exact(sim: Any) -> None:
    """Divisor of csrc/cuda/rows.h: how every kernel finds its row."""
    most = 2**63 - 1
    draw = random.Random(0)
    divisors = {1, 2, 3, 5, 7, 641, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**62 + 1, most}
    divisors |= {draw.getrandbits(draw.randint(1, 63)) or 1 for _ in range(300)}
    for by in divisors:
        near = {by - 1, by, by + 1, most // by * by, most // by * by - 1, most, 0}
        for x in near | {draw.getrandbits(draw.randint(1, 63)) for _ in range(20)}:
            if 0 <= x <= most:
                assert sim.quotient(x, by) == x // by, (x, by)


FAULTS = {
    "divergent barrier": r"divergent barrier: others wait at .*selftest\.cu:\d+",
    "barrier and collective": r"divergent: lanes of its mask never come to __shfl_sync",
    "partial mask": r"(divergent: lanes of its mask never|bad mask: lane \d+ of mask ffffffff has)",
    "foreign lane": r"bad mask: __shfl_sync reads lane 20, not in mask 0000ffff",
    "lane not in its mask": r"bad mask: __shfl_sync with mask 0000ffff by lane (1[6-9]|[23]\d)",
    "misaligned": r"misaligned: 16 bytes at an address that is \d+ past",
    "misaligned matrix": r"misaligned: the row of lane (1[6-9]|[23]\d); at ldmatrix",
    "shared out of range": r"out of range: byte 508 of shared memory of 508 bytes",
    "copy not waited for": r"exits with cp.async copies it did not wait for",
    "copy to a misaligned place": r"misaligned: cp.async of 16 bytes",
    "copy from a misaligned place": r"misaligned: 16 bytes at an address that is 4 past.*cp.async",
    "copy from out of range": r"out of range: 16 bytes at byte 512 of a tensor of 512; at cp.async",
    "copy to out of range": r"out of range: byte 512 of shared memory of 512 bytes",
    "too much static shared": r"52000 bytes of static and 0 of dynamic shared memory",
    "no dynamic shared": r"launched without dynamic shared memory",
    "too much dynamic shared": r"49153 bytes of dynamic.*cudaFuncSetAttribute did not allow",
    "too many threads": r"2048 threads in a block",
    "too many blocks": r"a grid of no or too many blocks",
    "no blocks": r"a grid of no or too many blocks",
}


@pytest.mark.parametrize("name", FAULTS)
def test_cuda_sim_tells_faults(sim: Any, name: str) -> None:
    for seed in SEEDS:
        with pytest.raises(sim.Fault, match=FAULTS[name]):
            run(sim, name, seed=seed)
    assert run(sim, "sum").eq(8128).all()  # and goes on


def test_cuda_sim_tells_where_and_who(sim: Any) -> None:
    with pytest.raises(sim.Fault) as caught:
        run(sim, "out of range", n=7)
    text = str(caught.value)
    assert "out of range: 4 bytes at byte 536 of a tensor of 512" in text
    assert re.search(r"kernel out_of_range_kernel, block \(0, 0, 0\), thread 127, seed 1", text)


@pytest.mark.parametrize(
    "name", ["missing barrier", "missing warp barrier", "copy waited for late", "stale shared"]
)
def test_cuda_sim_shows_missing_waits(sim: Any, name: str) -> None:
    """Wrong results in most schedules, and poison where nothing was written: never luck alone."""
    x = torch.arange(128, dtype=torch.float32)
    right = {
        "missing barrier": x.flip(0),
        "missing warp barrier": x.view(-1, 2).flip(1).flatten(),
        "copy waited for late": x.flip(0),
        "stale shared": torch.ones(128),
    }[name]
    wrong = sum(not torch.equal(run(sim, name, seed=seed), right) for seed in SEEDS)
    assert wrong >= len(SEEDS) - 1, wrong


def test_cuda_sim_shows_reads_past_shared_memory(sim: Any) -> None:
    """They are no fault without AddressSanitizer, and must not look like a small number."""
    for seed in SEEDS:
        y = run(sim, "shared read past its end", seed=seed)
        assert torch.equal(y[:-1], torch.arange(127) + 0.5)
        assert not abs(y[-1].item()) < 1e30, y[-1].item()


def test_cuda_sim_schedules_differ_and_repeat(sim: Any) -> None:
    found = [run(sim, "missing barrier", seed=s).isnan().tolist() for s in (*SEEDS, 0)]
    assert found[0] == found[-1]
    assert any(f != found[0] for f in found)
