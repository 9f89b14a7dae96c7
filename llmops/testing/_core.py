"""Samples, targets and tolerances of the conformance kit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmops.backends import get
from llmops.dispatch import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Make:
    """Makes the tensors of samples: seeded, of one dtype, on one device.

    make(3, 5) is a normal tensor that takes a gradient; make(3, 5, grad=False) does not;
    make.bools(3, 5, keep=0.7), make.ints(4, 7, high=100) are masks and indices.
    """

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(
        self,
        *shape: int,
        scale: float = 1.0,
        shift: float = 0.0,
        grad: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64, **self._drawn()) * scale + shift
        return x.to(self.device, dtype or self.dtype).requires_grad_(grad)

    def _drawn(self) -> dict[str, Any]:
        """On the CPU, also where a GPU is the default device: the same numbers everywhere."""
        return {"generator": self.generator, "device": "cpu"}

    def bools(self, *shape: int, keep: float = 0.7) -> Tensor:
        return (torch.rand(shape, **self._drawn()) < keep).to(self.device)

    def ints(self, *shape: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, dtype=dtype, **self._drawn()).to(self.device)


@dataclass
class Sample:
    """One call: fn(*args, **kwargs). Tensors that require a gradient are differentiated.

    `row_dim` is the dimension along which the op's rows run (for OpSpec.rows).
    """

    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    row_dim: int = -1
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.id

    def without_gradients(self) -> Sample:
        """The same call of tensors that ask for none."""
        if "without gradients" not in self.memo:
            plain = lambda v: v.detach() if isinstance(v, Tensor) else v  # noqa: E731
            kwargs = {name: plain(v) for name, v in self.kwargs.items()}
            self.memo["without gradients"] = Sample(
                self.id, tuple(map(plain, self.args)), kwargs, self.row_dim
            )
        found: Sample = self.memo["without gradients"]
        return found


@dataclass(frozen=True)
class OpSpec:
    """An operator, as the kit needs to know it.

    Args:
        name: as in `llmops.<name>`; the tests are called test_<name>_<property>.
        fn: the public function; takes `backend=`.
        reference: plain PyTorch, same arguments less `backend`; run in fp64 it is the oracle.
        torch_fn: PyTorch's own way in the input's dtype, whose error is the yardstick.
        samples: samples(make) yields Sample objects that reach every branch of the kernels.
        schemas: samples for opcheck: name of an operator of torch.ops -> its arguments.
        namespace: of those operators: torch.ops.<namespace>.<name>.
        rows: True where output rows depend on their own input row only (NaN containment is then
            checked on the first argument).
        lowers: True where autocast lowers the inputs though the result may be fp32, as of a loss
            whose logits are a 16-bit product: the result is then only as exact as those.
        result_floor: result_floor(sample) is what approximate functions do to each result; added to
            what is allowed of inputs in fp32.
        gradient_floor: gradient_floor(sample) is what the error of a saved result, within its own
            rule, does to each gradient; added to what is allowed of inputs in fp32, and of 16 bits
            where a backend multiplies in those (tensor cores): the CPU's products are in fp32.
        skip: check name -> reason, for properties the operator does not have.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    torch_fn: Callable[..., Any]
    samples: Callable[[Make], Iterable[Sample]]
    schemas: Callable[[Make], dict[str, tuple[Any, ...]]] | None = None
    namespace: str = "llmops"
    rows: bool = False
    lowers: bool = False
    result_floor: Callable[[Sample], list[Tensor]] | None = None
    gradient_floor: Callable[[Sample], list[Tensor]] | None = None
    skip: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A backend in one of its forms: "cpu[avx2]" is the C++ kernels held to AVX2."""

    backend: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.isa or self.backend

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter, CUDA's simulator: one launch at a time, milliseconds a program."""
        return self.backend in ("triton", "cuda") and self.device == "cpu"

    def serves(self, op: str, dtype: torch.dtype) -> bool:
        """Whether the backend has the plain form of an operator in this dtype."""
        served: str | None = get(self.backend).serves(Call(op, self.device, dtype))
        return served is None

    def forward_only(self, op: str) -> bool:
        """Whether the backend lacks the backward that the operator has."""
        own = get(self.backend).PASSES.get(op, "")
        return "backward" in get("cpu").PASSES.get(op, "") and "backward" not in own

    def whole(self, op: str) -> bool:
        return not self.forward_only(op) and all(self.serves(op, d) for d in DTYPES)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.isa is None:
            yield
            return
        from llmops.backends import _extension

        before = torch.ops.llmops_cpu.isa_active()
        _extension.select_isa(self.isa)
        try:
            yield
        finally:
            _extension.select_isa(before)


_TILED = {
    "attention", "attention_kvcache", "attention_varlen", "linear", "scaled_dot_product_attention",
}  # fmt: skip


def targets(op: str | None = None, *, partial: bool = False) -> list[Target]:
    """Every backend usable here, the CPU kernels once per instruction set of this machine.

    Of an operator of llmops, the backends that have it, in every dtype and direction; with
    `partial`, also those that lack some.

    Raises ImportError where the compiled extension is missing: its tests must fail, not vanish.
    """
    from llmops.backends import _extension

    reason = get("cpu").available()
    if reason is not None:
        raise ImportError(f"llmops.testing: the CPU kernels cannot be tested: {reason}")
    best = _extension.ISA_NAMES.index(torch.ops.llmops_cpu.isa_best())
    isas = _extension.ISA_NAMES[: best + 1]
    # Others' kernels are those of avx512_bf16.
    found = [Target("cpu", "cpu", isa) for isa in isas if isa != "amx" or op in _TILED]
    triton, cuda = get("triton"), get("cuda")
    if triton.INTERPRETED and triton.available() is None:
        found.append(Target("triton", "cpu"))
    if cuda.SIMULATED:
        found.append(Target("cuda", "cpu"))
    if torch.cuda.is_available():
        found += [
            Target(name, "cuda") for name in ("triton", "cuda") if get(name).available() is None
        ]
    if op not in get("cpu").PASSES:
        return found
    assert op is not None
    return [t for t in found if op in get(t.backend).PASSES and (partial or t.whole(op))]


# ---- calling and comparing -----------------------------------------------------------------------


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A detached copy; floating-point tensors in `dtype` (None keeps theirs), leaves as before."""
    if isinstance(value, Tensor):
        copy = value.detach().clone(memory_format=torch.preserve_format)
        if dtype is not None and copy.is_floating_point():
            copy = copy.to(dtype)
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(cast(v, dtype) for v in value)
    if isinstance(value, torch.dtype) and dtype is not None:
        return dtype
    return value


def leaves(sample_args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors to differentiate, in the order of the call."""
    values = [*sample_args, *kwargs.values()]
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def outputs(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def call(
    fn: Callable[..., Any], sample: Sample, dtype: torch.dtype | None = None, **extra: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of fn on a copy of the sample, for fixed pseudo-random cotangents."""
    args = cast(sample.args, dtype)
    kwargs = {k: cast(v, dtype) for k, v in sample.kwargs.items()}
    results = outputs(fn(*args, **kwargs, **extra))
    differentiable = [r for r in results if r.requires_grad]
    wanted = leaves(args, kwargs)
    if not differentiable or not wanted:
        return results, []
    cotangents = [_cotangent(r) for r in differentiable]
    grads = torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True)
    zeros = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
    return [r.detach() for r in results], zeros


Results = tuple[list[Tensor], list[Tensor]]


def expected(spec: OpSpec, sample: Sample) -> tuple[Results, Results]:
    """The fp64 oracle's results and gradients, and those of PyTorch's own computation.

    Computed once per sample: every target and several checks are held to them.
    """
    if spec.name not in sample.memo:
        oracle = call(spec.reference, sample, torch.float64)
        sample.memo[spec.name] = oracle, call(spec.torch_fn, sample)
    found: tuple[Results, Results] = sample.memo[spec.name]
    return found


def result_floors(spec: OpSpec, sample: Sample, count: int) -> list[Any]:
    """What `assert_close` adds for each of `count` results; computed once per sample, as above."""
    if spec.result_floor is None or sample.args[0].dtype != torch.float32:
        return [0.0] * count
    return _memo(sample, f"result floors of {spec.name}", spec.result_floor)


def gradient_floors(spec: OpSpec, sample: Sample, target: Target) -> list[Any]:
    """The same for each gradient."""
    inputs = leaves(sample.args, sample.kwargs)
    narrow = all(x.element_size() == 2 for x in inputs)
    if spec.gradient_floor is None or (narrow and target.backend == "cpu"):
        return [0.0] * len(inputs)
    return _memo(sample, f"gradient floors of {spec.name}", spec.gradient_floor)


def _memo(sample: Sample, name: str, make: Callable[[Sample], list[Tensor]]) -> list[Any]:
    if name not in sample.memo:
        sample.memo[name] = make(sample)
    found: list[Any] = sample.memo[name]
    return found


def _cotangent(result: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(result.numel())
    # Rounded to bf16, so that every dtype gets the same values.
    values = torch.randn(result.shape, generator=generator, device="cpu").bfloat16()
    # -inf results (the log-sum-exp of an empty row) carry no gradient.
    return values.to(result.device, result.dtype).masked_fill(result.detach().isinf(), 0.0)


def assert_close(
    got: Tensor,
    oracle: Tensor,
    yardstick: Tensor,
    *,
    factor: float,
    what: str,
    eps: float | None = None,
    floor: float | Tensor = 0.0,
) -> None:
    """|got - oracle| <= factor * PyTorch's own error + floor, row by row (the last dimension).

    PyTorch's error in a row is its worst relative to the row's largest value over the whole tensor:
    in one row alone it may be nothing by luck. The floor's eps is that of got's dtype, or `eps`;
    `floor` adds to it, of got's shape or one for all: for differences of larger numbers.
    """
    assert got.shape == oracle.shape, f"{what}: shape {got.shape}, expected {oracle.shape}"
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps if eps is None else eps
    if isinstance(floor, Tensor):
        floor = floor.cpu().reshape(*got.shape or (1,))
    g, o, y = (t.detach().double().cpu() for t in (got, oracle, yardstick))
    special = ~o.isfinite()
    same = (g == o) | (g.isnan() & o.isnan())
    assert bool(same[special].all()), f"{what}: NaN or infinity differs from the oracle"
    assert bool(g[~special].isfinite().all()), f"{what}: NaN or infinity where there should be none"
    g, o, y = (t.masked_fill(special, 0.0).reshape(*got.shape or (1,)) for t in (g, o, y))
    error = (g - o).abs()
    row_error = (y - o).abs().nan_to_num(0.0).amax(-1, keepdim=True)
    row_scale = o.abs().amax(-1, keepdim=True)
    relative = (row_error / row_scale).nan_to_num(0.0, posinf=0.0).amax()
    allowed = factor * torch.maximum(row_error, relative * row_scale) + 2 * eps * row_scale + floor
    excess = error - allowed
    worst = int(excess.argmax())
    assert bool((excess <= 0).all()), (
        f"{what}: error {error.flatten()[worst]:.3e}, allowed "
        f"{allowed.expand_as(error).flatten()[worst]:.3e} (got {g.flatten()[worst]:.6g}, oracle "
        f"{o.flatten()[worst]:.6g}) at flat index {worst} of shape {tuple(got.shape)}"
    )
