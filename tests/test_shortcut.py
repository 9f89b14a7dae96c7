"""What the front doors ask before they call a raw kernel: llmops/ops/_op.py and csrc/module.cpp."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llmops
from llmops import dispatch
from llmops.ops._op import is_last, shortcut


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


@contextmanager
def _no_context() -> Iterator[None]:
    yield


X, W = torch.randn(3, 8), torch.randn(8)


@pytest.mark.parametrize("grad", [True, False])
def test_shortcut_gives_the_raw_operator(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        raw = shortcut("layer_norm")(X, W, None, torch.nn.Parameter(W, requires_grad=False))
    assert torch.equal(raw(X, W), llmops.layer_norm(X, 8, W))


def test_shortcut_is_of_the_dtype() -> None:
    raw = shortcut("layer_norm")
    assert raw(X.double()) is None  # the reference's
    assert raw(X.bfloat16()) is not None
    assert raw(X.int()) is None


@pytest.mark.parametrize(
    ("context", "arguments"),
    [
        (_no_context, lambda: (X.clone().requires_grad_(), W)),
        (_no_context, lambda: (X, torch.nn.Parameter(W))),
        (_no_context, lambda: (X, None, W.clone().requires_grad_())),
        (_no_context, lambda: (X.as_subclass(_Subclass), W)),
        (_no_context, lambda: (X, W.as_subclass(_Subclass))),
        (_no_context, lambda: (X.to("meta"), W)),
        (_no_context, lambda: ([1.0, 2.0], W)),
        (_no_context, lambda: (None,)),
        (_Mode, lambda: (X, W)),
        (torch.autograd.forward_ad.dual_level, lambda: (X, W)),
        (lambda: llmops.use_backend("reference"), lambda: (X, W)),
    ],
)
def test_shortcut_refuses(
    context: Callable[[], AbstractContextManager[Any]], arguments: Callable[[], tuple[Any, ...]]
) -> None:
    raw = shortcut("layer_norm")
    given = arguments()
    with context():
        assert raw(*given) is None
    assert raw(X, W) is not None


def test_shortcut_and_autocast() -> None:
    q = torch.randn(1, 1, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shortcut("attention", autocast=True)(q, q, q) is None
        assert shortcut("layer_norm")(X, W) is not None
    assert shortcut("attention", autocast=True)(q, q, q) is not None


def test_shortcut_asks_for_the_request_of_its_own_thread() -> None:
    raw = shortcut("layer_norm")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with llmops.use_backend("reference"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert inside.wait(10)
        assert dispatch.opened
        assert raw(X, W) is not None
        with llmops.use_backend("reference"):
            assert raw(X, W) is None
    finally:
        leave.set()
        thread.join()
    assert not dispatch.opened


def test_shortcut_forgets_with_the_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = shortcut("layer_norm")
    assert raw(X, W) is not None
    monkeypatch.setenv("LLMOPS_BACKEND", "reference")
    dispatch.clear()
    assert raw(X, W) is None
    monkeypatch.undo()
    dispatch.clear()
    assert raw(X, W) is not None


@pytest.mark.parametrize(
    ("shape", "weight", "sizes", "expected"),
    [
        ((3, 8), W, 8, True),
        ((3, 8), W, (8,), True),
        ((3, 8), W, torch.Size([8]), True),
        ((3, 8), None, 8, True),
        ((3, 8), None, (8,), True),
        ((3, 8), None, (3, 8), False),
        ((3, 8), W, 7, False),
        ((3, 8), W, True, False),
        ((1,), None, True, False),
        ((3, 8), W, [8], False),  # the long way takes a list
        ((3, 8), W, "8", False),
        ((3, 8), W.reshape(2, 4), 8, False),
        ((3, 8), [1.0], 8, False),
        ((), None, 8, False),
    ],
)
def test_is_last(shape: tuple[int, ...], weight: Any, sizes: Any, expected: bool) -> None:
    assert is_last(torch.zeros(shape), weight, sizes) is expected


def test_native_functions_refuse_wrong_arguments() -> None:
    native = sys.modules["llmops._C"]
    with pytest.raises(TypeError, match="module.cpp"):
        native.shortcut({}, 1)
    with pytest.raises(TypeError, match="module.cpp"):
        native.shortcut(*range(10))
    with pytest.raises(TypeError, match="expects x, weight and sizes"):
        is_last(X)
    with pytest.raises(TypeError, match="first tensor"):
        shortcut("layer_norm")()


def test_shortcut_passes_errors_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(*_: Any) -> Any:
        raise LookupError("undecided")

    raw = shortcut("layer_norm")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "decide", decide)
        with pytest.raises(LookupError, match="undecided"):
            raw(X)
    assert raw(X) is not None


def test_native_functions_keep_no_references() -> None:
    raw = shortcut("layer_norm")
    watched = (X, W, raw(X, W), None, True, False, torch.float32, "auto", (8,))

    def counts() -> list[int]:
        return [sys.getrefcount(w) for w in watched]

    before = counts()
    for _ in range(500):
        raw(X, W)
        raw(X.double())
        is_last(X, W, watched[-1])
        is_last(X, None, 8)
        is_last(X, [], 8)
        with llmops.use_backend("cpu"):
            raw(X, W)
    assert all(abs(a - b) < 100 for a, b in zip(counts(), before, strict=True))


def test_shortcut_stays_open_under_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """use_backend("auto") asks for what is chosen anyway, unless the environment asks otherwise."""
    raw = shortcut("layer_norm")
    with llmops.use_backend("auto"):
        assert raw(X, W) is not None
    with llmops.use_backend("reference"):
        assert raw(X, W) is None
        with llmops.use_backend("auto"):
            assert raw(X, W) is not None
            assert llmops.explain("layer_norm", X, 8).backend == "cpu"
    monkeypatch.setenv("LLMOPS_BACKEND", "reference")
    with llmops.use_backend("auto"):
        assert raw(X, W) is None
        assert llmops.explain("layer_norm", X, 8).backend == "cpu"
