"""Measures cases: ours beside PyTorch's, interleaved in one process, correct before timed.

A case counts the bytes that must move or the flops that must be done, whichever bounds it; a row
gives the rate and its share of the machine's limit, measured in the same run: memory copy for
bytes, a large matrix product for flops.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# A provider's call: takes nothing, returns the results to compare.
Call = Callable[[], Any]


@dataclass
class Case:
    """One row: an op, a pass, a dtype, a shape; `ours` and `torch` compute the same thing.

    Args:
        op, passes, dtype, shape: what the row is called; passes is "fwd", "bwd" or "fwd+bwd".
        ours, torch: the calls. Neither changes its inputs, unless `in_place` says that both do.
        bytes: that must be read and written at least; 0 where flops bound the op.
        flops: that must be computed.
        tolerance: relative to the largest value; None takes 20 eps of the dtype.
    """

    op: str
    passes: str
    dtype: torch.dtype
    shape: str
    ours: Call
    torch: Call
    bytes: int = 0
    flops: int = 0
    tolerance: float | None = None
    torch_name: str = "eager"
    in_place: bool = False


@dataclass
class Row:
    """A measured case. Times in microseconds, rates in GB/s or GFLOP/s."""

    op: str
    passes: str
    dtype: str
    shape: str
    ours_us: float
    torch_us: float
    torch_name: str
    ratio: float
    spread: float
    rate: float
    rate_unit: str
    of_limit: float
    threads: int


def _flat(result: Any) -> list[Tensor]:
    return [
        t for t in (result if isinstance(result, (tuple, list)) else (result,)) if t is not None
    ]


def check(case: Case) -> None:
    """Raises ValueError where the two do not compute the same."""
    if case.in_place:
        return
    eps = torch.finfo(case.dtype).eps
    tolerance = 20 * eps if case.tolerance is None else case.tolerance
    for a, b in zip(_flat(case.ours()), _flat(case.torch()), strict=True):
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        limit = tolerance * max(b.double().abs().max().item(), 1e-30) if b.numel() else 1.0
        if not error <= limit:
            raise ValueError(
                f"llmops bench: {case.op} {case.passes} {case.shape}: results differ by "
                f"{error:.3g}, allowed {limit:.3g}; a wrong provider gets no number"
            )


def _time(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def measure(case: Case, limits: Limits, seconds: float = 0.6) -> Row:
    """Checks, warms up, then times both in turn, A B B A A B ..., for about `seconds`."""
    check(case)
    once = max(_time(case.ours, 1) + _time(case.torch, 1), 1e-6)
    once = max(_time(case.ours, 1) + _time(case.torch, 1), 1e-6)
    number = max(1, int(0.02 / once))
    rounds = max(5, min(31, int(seconds / (once * number))))
    ours: list[float] = []
    theirs: list[float] = []
    for i in range(rounds):
        order = [(ours, case.ours), (theirs, case.torch)]
        for times, call in order if i % 2 == 0 else reversed(order):
            times.append(_time(call, number))
    mine, torchs = statistics.median(ours), statistics.median(theirs)
    ratios = sorted(t / o for o, t in zip(ours, theirs, strict=True))
    memory = case.bytes > 0
    rate = (case.bytes if memory else case.flops) / mine / 1e9
    limit = limits.copy_gbs if memory else limits.matmul(case.dtype)
    return Row(
        op=case.op,
        passes=case.passes,
        dtype=str(case.dtype).removeprefix("torch."),
        shape=case.shape,
        ours_us=mine * 1e6,
        torch_us=torchs * 1e6,
        torch_name=case.torch_name,
        ratio=torchs / mine,
        spread=ratios[-len(ratios) // 4] - ratios[len(ratios) // 4],
        rate=rate,
        rate_unit="GB/s" if memory else "GFLOP/s",
        of_limit=rate / limit,
        threads=torch.get_num_threads(),
    )


class Limits:
    """What this machine can do, measured now: copy bandwidth and matrix-product rate per dtype."""

    def __init__(self) -> None:
        source = torch.randn(64 << 20)  # 256 MiB, beyond any cache
        target = torch.empty_like(source)
        target.copy_(source)
        seconds = min(_time(lambda: target.copy_(source), 1) for _ in range(5))
        self.copy_gbs = 2 * source.numel() * 4 / seconds / 1e9
        self._matmul: dict[torch.dtype, float] = {}

    def matmul(self, dtype: torch.dtype) -> float:
        """GFLOP/s of a 1024^3 product."""
        if dtype not in self._matmul:
            a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
            a @ b
            seconds = min(_time(lambda: a @ b, 1) for _ in range(7))
            self._matmul[dtype] = 2 * 1024**3 / seconds / 1e9
        return self._matmul[dtype]


def with_backward(passes: str, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Call:
    """The call for a pass: "fwd" under no_grad, "bwd" from a saved graph, "fwd+bwd" both."""
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    if passes == "fwd":
        return forward
    results = [r for r in _flat(function(*inputs)) if r.requires_grad]
    grads = [
        torch.randn(r.shape, generator=torch.Generator().manual_seed(1)).to(r) for r in results
    ]
    if passes == "bwd":
        return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(
        [r for r in _flat(function(*inputs)) if r.requires_grad], leaves, grads
    )


def passes_of(rows: int, forward: int, backward: int) -> tuple[tuple[str, int], ...]:
    """(pass, factor) pairs of a row op on `rows` rows. A decode step, of few rows, has no backward:
    nobody trains on one token."""
    return (("fwd", forward),) if rows <= 8 else (("fwd", forward), ("bwd", backward))


def run(cases: Iterable[Case], seconds: float = 0.6) -> Iterator[Row]:
    limits = Limits()
    for case in cases:
        yield measure(case, limits, seconds)


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a terminal table, one per row as it comes."""
    yield (
        f"{'op':16} {'pass':7} {'dtype':9} {'shape':26} {'ours us':>10} {'torch us':>10} "
        f"{'ratio':>6} {'rate':>15} {'limit':>6}"
    )
    for r in rows:
        yield (
            f"{r.op:16} {r.passes:7} {r.dtype:9} {r.shape:26} {r.ours_us:10.1f} "
            f"{r.torch_us:10.1f} {r.ratio:5.2f}x {r.rate:8.1f} {r.rate_unit:7}{r.of_limit:5.0%}"
        )


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(r) for r in rows]
