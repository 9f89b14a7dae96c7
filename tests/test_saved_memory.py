"""What a forward keeps for its backward is no more than what PyTorch's own computation keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from patch_kit import BY_NAME, inputs
from torch import Tensor

import llmops
from llmops.testing import Make, specs

SPECS = specs.every()
SAMPLES = 3


def saved_bytes(run: Callable[[], Any], without: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the memory that autograd keeps after run(), each buffer counted once; `without` is
    what lives on anyway, as a model's tables do."""
    kept: dict[int, int] = {}
    anyway = {x.untyped_storage().data_ptr() for x in without}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in anyway:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()
    del result
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", SPECS)
def test_saved_memory_of_operators(op: str, dtype: torch.dtype) -> None:
    spec = SPECS[op]
    for sample in itertools.islice(spec.samples(Make(dtype)), SAMPLES):
        tensors = [x for x in (*sample.args, *sample.kwargs.values()) if isinstance(x, Tensor)]
        tables = tuple(x for x in tensors if not x.requires_grad)
        args, more = sample.args, sample.kwargs
        ours = saved_bytes(partial(spec.fn, *args, **more, backend="cpu"), tables)
        torchs = saved_bytes(partial(spec.torch_fn, *args, **more), tables)
        # The loss keeps its rows' log-sum-exp in fp64, and torch a number of the logits' dtype.
        allowed = 8 * args[1].numel() if op == "cross_entropy" else 0
        assert ours <= torchs + allowed, f"{sample.id}: {ours} bytes, torch {torchs}"


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(n, marks=pytest.mark.rotating) for n in ("gpt2", "bert", "t5"))],
)
def test_saved_memory_of_patched_models(name: str) -> None:
    family = BY_NAME[name]
    model = family.build().train()
    given = inputs(family)
    before = saved_bytes(lambda: model(**given))
    llmops.patch(model)
    after = saved_bytes(lambda: model(**given))
    print(f"{name}: {before} bytes before, {after} patched")
    assert after <= before
