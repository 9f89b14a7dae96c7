"""torch's own OpInfo samples: each is computed as torch computes it, results and gradients, or
refused by an error that says so. None is left out.

    pytest tests/test_opinfo.py -rP     prints the counts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmops
from llmops.testing import Sample, assert_close, call

torch_opinfos = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="torch's OpInfo needs expecttest: pip install expecttest",
    exc_type=ImportError,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Entry(NamedTuple):
    opinfo: str  # its name in torch's op_db
    variant: str
    ours: Callable[..., Any]  # takes torch's arguments
    torch_fn: Callable[..., Any]
    refused: dict[str, type[Exception]]  # what a refusal says -> its type
    # Size of the terms whose difference a gradient is, where it may be nothing but their rounding.
    terms: Callable[[Sample], float] = lambda sample: 0.0
    # The same of a result: what a relative rounding of eps within the computation is worth there.
    result_terms: Callable[[Sample], float] = lambda sample: 0.0


def _softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return llmops.softmax(input, dim, dtype=dtype)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return llmops.gelu(input, approximate=approximate)


def _silu(input: Tensor) -> Tensor:
    """silu(x) = swiglu(x, 1): torch's op has no gate's partner."""
    return llmops.swiglu(input, torch.ones_like(input))


def _embedding(weight: Tensor, tokens: Tensor, **kwargs: Any) -> Tensor:
    """OpInfo passes the table first."""
    for name in ("max_norm", "scale_grad_by_freq", "sparse"):
        if kwargs.pop(name, None):
            raise TypeError(f"llmops.embedding has no argument {name}")
    kwargs.pop("norm_type", None)  # of max_norm
    return llmops.embedding(tokens, weight, **kwargs)


def _torch_embedding(weight: Tensor, tokens: Tensor, **kwargs: Any) -> Tensor:
    return F.embedding(tokens, weight, **kwargs)


_COTANGENT = 4.0  # no value of the incoming gradients is larger


def _largest(*tensors: Tensor) -> float:
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)


def _layer_norm_terms(sample: Sample) -> float:
    """dx = rstd (w g - mean(w g) - x^ mean(w g x^)): nothing for one value per row, and little for
    few, beside rstd w g."""
    x, shape, *parameters = sample.args
    if not x.numel():
        return 0.0
    variance = x.detach().double().flatten(x.dim() - len(shape)).var(-1, correction=0)
    rstd = (variance + sample.kwargs.get("eps", 1e-5)).clamp_min(0.0).rsqrt()
    return _largest(rstd.nan_to_num(0.0)) * _COTANGENT * max(_largest(*parameters[:1]), 1.0)


def _attention_terms(sample: Sample) -> float:
    """dq = scale sum_j p_j (g.v_j - g.out) k_j, where the two products, of D terms each, are equal
    in a row that sees one key. (torch's formula on the whole matrix cancels exactly there.)"""
    q, k, v = sample.args[:3]
    scale = sample.kwargs.get("scale") or q.shape[-1] ** -0.5
    return 2 * abs(scale) * _COTANGENT * v.shape[-1] * _largest(v) * _largest(q, k)


def _attention_result_terms(sample: Sample) -> float:
    """out = sum_j p_j v_j: a score s rounded by eps |s| moves its p by that share, and out by
    eps |s| |v_j - out|. OpInfo's values reach 9, and its scores hundreds."""
    q, k, v = sample.args[:3]
    scale = sample.kwargs.get("scale") or q.shape[-1] ** -0.5
    return _largest((q.double() @ k.double().transpose(-1, -2)) * scale) * _largest(v)


ENTRIES = [
    Entry("softmax", "", _softmax, torch.softmax, {}),
    Entry("softmax", "with_dtype", _softmax, torch.softmax, {}),
    Entry("nn.functional.layer_norm", "", llmops.layer_norm, F.layer_norm, {}, _layer_norm_terms),
    Entry("nn.functional.rms_norm", "", llmops.rms_norm, F.rms_norm, {}),
    Entry("nn.functional.cross_entropy", "", llmops.cross_entropy, F.cross_entropy, {}),
    Entry("nn.functional.linear", "", llmops.linear, F.linear, {}),
    Entry("nn.functional.gelu", "", _gelu, F.gelu, {}),
    Entry("nn.functional.silu", "", _silu, F.silu, {}),
    Entry("nn.functional.embedding", "", _embedding, _torch_embedding, {
        "has no argument": TypeError,
    }),
    Entry(
        "nn.functional.scaled_dot_product_attention", "", llmops.scaled_dot_product_attention,
        F.scaled_dot_product_attention, {}, _attention_terms, _attention_result_terms,
    ),
]  # fmt: skip


def samples(entry: Entry, dtype: torch.dtype) -> list[Sample]:
    found = [
        o
        for o in torch_opinfos.op_db
        if o.name == entry.opinfo and o.variant_test_name == entry.variant
    ]
    assert len(found) == 1, f"torch's op_db has no {entry.opinfo} {entry.variant!r}"
    torch.manual_seed(0)
    return [
        Sample(f"{entry.opinfo}-{i}", (s.input, *s.args), s.kwargs)
        for i, s in enumerate(found[0].sample_inputs("cpu", dtype, requires_grad=True))
    ]


def _refusal(entry: Entry, sample: Sample) -> str | None:
    """The documented words that refuse the sample; None where it is computed."""
    try:
        call(entry.ours, sample)
    except tuple(entry.refused.values()) as error:
        for words, kind in entry.refused.items():
            if type(error) is kind and words in str(error) and "llmops." in str(error):
                return words
        raise
    return None


def _check_random(entry: Entry, sample: Sample) -> None:
    """The same seed gives the same bits, another one others."""
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(call(entry.ours, sample)[0][0])
    assert torch.equal(drawn[0], drawn[1]), f"{sample.id}: the same seed gives other bits"
    assert not torch.equal(drawn[0], drawn[2]), f"{sample.id}: dropout ignores the seed"


@pytest.mark.filterwarnings("ignore::llmops.FallbackWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "entry", ENTRIES, ids=lambda e: f"{e.opinfo}{'-' * bool(e.variant)}{e.variant}"
)
def test_opinfo(entry: Entry, dtype: torch.dtype) -> None:
    counts: Counter[str] = Counter()
    every = samples(entry, dtype)
    for sample in every:
        refusal = _refusal(entry, sample)
        if refusal is not None:
            counts[f"refused ({refusal})"] += 1
            continue
        if sample.kwargs.get("dropout_p"):
            _check_random(entry, sample)
            sample.kwargs["dropout_p"] = 0.0
            counts["random, equal without dropout"] += 1
        else:
            counts["equal"] += 1
        got, grads = call(entry.ours, sample)
        want, want_grads = call(entry.torch_fn, sample)
        oracle, oracle_grads = call(entry.torch_fn, sample, torch.float64)
        for g, w, o in zip(got, want, oracle, strict=True):
            assert g.dtype == w.dtype, f"{sample.id}: {g.dtype}, torch gives {w.dtype}"
            floor = 2 * torch.finfo(dtype).eps * entry.result_terms(sample)
            what = f"{sample.id} {sample.kwargs}"
            assert_close(g, o, w, factor=2.0, what=what, floor=floor)
        assert len(grads) == len(want_grads), f"{sample.id}: a gradient is missing"
        for i, (g, w, o) in enumerate(zip(grads, want_grads, oracle_grads, strict=True)):
            what = f"{sample.id} gradient {i} {sample.kwargs}"
            terms = entry.terms(sample)
            if dtype == torch.float64:  # torch's own is the oracle here, with no error to measure
                terms = max(terms, _COTANGENT)
            floor = 2 * torch.finfo(dtype).eps * terms
            assert_close(g, o, w, factor=3.0, what=what, floor=floor)
    assert sum(counts.values()) == len(every) > 0
    assert counts["equal"], f"every sample refused: {counts}"
    print(f"{entry.opinfo} {entry.variant} {dtype}: {len(every)} samples, {dict(counts)}")
