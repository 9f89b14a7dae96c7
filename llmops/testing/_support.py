"""What each backend serves of each operator and of each of its arguments, derived from the code:
the operators' signatures, the kit's samples, and what the backends answer to the calls these make.

tools/readme.py prints it; tests/test_support.py holds every cell to behaviour.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.backends import get
from llmops.testing import specs
from llmops.testing._core import DTYPES, Make, OpSpec, Sample

BACKENDS = ("cpu", "triton", "cuda", "reference")

# Calls of the operators that have no OpSpec, because they draw or write in place.
CALLS: dict[str, Callable[[Make], Sample]] = {
    "sample": lambda make: Sample("plain", (make(3, 40, grad=False),)),
    "rope_qk_": lambda make: Sample(
        "plain",
        (
            make(2, 4, 3, 8, grad=False),
            make(2, 2, 3, 8, grad=False),
            *(make(9, 4, grad=False, dtype=torch.float32) for _ in range(2)),
        ),
    ),
}


def _append(make: Make) -> Sample:
    caches, new = (make(2, 2, 9, 8, grad=False) for _ in range(2)), (2, 2, 1, 8)
    return Sample(
        "plain",
        (*caches, *(make(*new, grad=False) for _ in range(2)), torch.tensor([3, 5])),
    )


CALLS["kv_cache_append_"] = _append

# A value for an argument that no sample of the operator's spec passes, by its name; b holds the
# arguments of the plain call.
Bound = dict[str, Any]
VALUES: dict[str, Callable[[Make, Bound], Any]] = {
    "dtype": lambda make, b: torch.float16 if make.dtype != torch.float16 else torch.float32,
    "attn_mask": lambda make, b: make(b["query"].shape[-2], b["key"].shape[-2]),
    "enable_gqa": lambda make, b: True,
    "window": lambda make, b: (2, 1),
    "alibi_slopes": lambda make, b: make(b["q"].shape[1], grad=False, dtype=torch.float32).abs(),
    "softcap": lambda make, b: 5.0,
    "sinks": lambda make, b: make(b["q"].shape[1], dtype=torch.float32),
    "dropout_p": lambda make, b: 0.25,
    "generator": lambda make, b: torch.Generator().manual_seed(0),
    # A contiguous cache of two sequences is a paged one of two blocks.
    "block_table": lambda make, b: torch.tensor([[0], [1]]),
    "temperature": lambda make, b: 0.5,
    "top_k": lambda make, b: 5,
    "top_p": lambda make, b: 0.9,
    "min_p": lambda make, b: 0.05,
    "position_ids": lambda make, b: make.ints(b["q"].shape[2], high=9),
    "interleaved": lambda make, b: True,
    "inverse": lambda make, b: True,
    "approximate": lambda make, b: "tanh",
    "scale": lambda make, b: 0.3,
    "ignore_index": lambda make, b: 0,
    "label_smoothing": lambda make, b: 0.1,
    "reduction": lambda make, b: "sum",
    "eps": lambda make, b: 1e-3,
}


@cache
def spec_of(op: str) -> OpSpec | None:
    return specs.every().get(op)


def arguments(op: str) -> list[str]:
    """The optional arguments of the public function, less `backend`."""
    parameters = inspect.signature(getattr(llmops, op)).parameters.values()
    return [p.name for p in parameters if p.default is not p.empty and p.name != "backend"]


def bound(op: str, sample: Sample) -> Bound:
    signature = inspect.signature(getattr(llmops, op))
    return dict(signature.bind(*sample.args, **sample.kwargs).arguments)


def _given(op: str, sample: Sample) -> set[str]:
    """The optional arguments that the sample sets to something else than their default."""
    parameters = inspect.signature(getattr(llmops, op)).parameters
    found: set[str] = set()
    for name, value in bound(op, sample).items():
        default = parameters[name].default
        plain = value is default if isinstance(value, Tensor) else value == default
        if isinstance(value, torch.dtype):  # the one the inputs have asks for nothing
            plain = any(isinstance(a, Tensor) and a.dtype == value for a in sample.args)
        if default is not inspect.Parameter.empty and not plain:
            found.add(name)
    return found


def calls(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Sample]:
    """A call for each optional argument that passes it, and under "" the plain call.

    Raises LookupError, saying what to declare, where the kit knows of none.
    """
    make = Make(dtype)
    spec = spec_of(op)
    if spec is None and op not in CALLS:
        raise LookupError(
            f"{op}: declare an OpSpec in llmops/testing/specs, or a plain call in CALLS of "
            "llmops/testing/_support.py"
        )
    samples = list(spec.samples(make)) if spec is not None else [CALLS[op](make)]
    # A spec may wrap the function with arguments of its own (a fixed seed): not those.
    known = set(inspect.signature(getattr(llmops, op)).parameters)
    samples = [s for s in samples if set(s.kwargs) <= known]
    full = [s for s in samples if all(t.numel() for t in s.args if isinstance(t, Tensor))]
    plain = min(full, key=lambda s: len(_given(op, s)))  # of several the first
    found = {"": plain}
    for argument in arguments(op):
        passing = [s for s in full if argument in _given(op, s)]
        if passing:
            found[argument] = min(passing, key=lambda s: len(_given(op, s)))
        elif argument in VALUES:
            value = VALUES[argument](make, bound(op, plain))
            # By name: what the plain call passes by place stays.
            found[argument] = Sample(argument, plain.args, {**plain.kwargs, argument: value})
        else:
            raise LookupError(
                f"{op}: no sample of its spec passes {argument}; add one to "
                "llmops/testing/specs, or a value to VALUES of llmops/testing/_support.py"
            )
    return found


def refusal(op: str, sample: Sample, backend: str) -> str | None:
    """None where the backend has code for this call, else why not; asks nothing of this machine."""
    try:
        call = llmops.explain(op, *sample.args, **sample.kwargs).call
    except NotImplementedError as error:
        return str(error)
    module = get(backend)
    call = call._replace(device=getattr(module, "DEVICE", call.device))
    return module.serves(call)  # type: ignore[no-any-return]


def cell(op: str, backend: str) -> str:
    """What the backend serves of the operator, as the table has it."""
    module = get(backend)
    tags = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    served = [d for d in DTYPES if refusal(op, calls(op, d)[""], backend) is None]
    dtypes = [tags[d] for d in served]
    if backend == "reference":
        passes = get("cpu").PASSES.get(op, "forward, backward")
        dtypes.append("fp64")
    else:
        passes = module.PASSES.get(op)
    if not passes or not dtypes:
        return "–"
    asked = calls(op, served[0] if served else DTYPES[0])
    lacking = [a for a, s in asked.items() if a and refusal(op, s, backend) is not None]
    text = f"{passes}: {', '.join(dtypes)}"
    return text + (f"; not {', '.join(f'`{a}`' for a in lacking)}" if lacking else "")


def table() -> str:
    """Markdown: a row per operator, its optional arguments, and a cell per backend."""
    lines = [
        "| op | optional arguments | C++ on CPU | Triton | CUDA C++ | reference |",
        "|---|---|---|---|---|---|",
    ]
    for op in llmops.OPERATORS:
        cells = [cell(op, backend) for backend in BACKENDS]
        named = ", ".join(f"`{a}`" for a in arguments(op)) or "none"
        lines.append(f"| `{op}` | {named} | {' | '.join(cells)} |")
    return "\n".join(lines)
