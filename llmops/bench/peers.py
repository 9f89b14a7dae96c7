"""Other libraries as providers of a case: one maker each, Case -> Call, for the ops they have.

onnxruntime and zentorch run on CPU; Liger, flash-attn and quack need a GPU, and their makers have
not been run on one yet. xllamacpp and ctranslate2 generate with whole models: engines.py makes them
for cases/model.py, which names them in its `peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from llmops.bench.harness import Call, Case, Parts, parts_of, with_backward


class Absent(Exception):
    """A library cannot take part in a case; the text says why, or how to get it."""


COVERS = {
    "onnxruntime": ("softmax", "gelu", "layer_norm", "rms_norm"),
    "zentorch": ("softmax", "gelu", "layer_norm", "rms_norm", "swiglu", "linear", "attention"),
    "Liger": ("softmax", "layer_norm", "rms_norm", "swiglu", "cross_entropy"),
    "flash-attn": ("attention",),
    "quack": ("softmax", "rms_norm", "cross_entropy"),
}


CPU_ONLY = ("onnxruntime", "zentorch")


def covers(name: str, case: Case) -> bool:
    """Whether this library has the case's op in the form that the case uses."""
    if name in CPU_ONLY and case.device != "cpu":
        return False
    if case.op not in COVERS[name] or case.in_place or parts_of(case.torch) is None:
        return False
    if name == "onnxruntime":  # inference, and hardly any bf16 kernels on CPU
        return case.passes == "fwd" and case.dtype == torch.float32 and "causal" not in case.shape
    return case.op != "softmax" or "causal" not in case.shape


def makers(case: Case) -> dict[str, Callable[[], Call | None]]:
    """The libraries that have this case: name -> what makes the call, None for a form they lack."""
    own = {n: partial(make, case) for n, make in MAKERS.items() if covers(n, case)}
    return {**own, **(case.peers if case.device == "cpu" else {})}  # engines run on CPU


def _parts(case: Case) -> Parts:
    parts = parts_of(case.torch)
    assert parts is not None
    return parts


def _onnxruntime(case: Case) -> Call | None:
    """A graph of one node; its output is allocated by each run, as ours and torch's are."""
    import numpy

    onnxruntime = importlib.import_module("onnxruntime")
    onnx = importlib.import_module("onnx")
    helper: Any = onnx.helper
    tensors = [t.detach() for t in _parts(case).inputs if isinstance(t, Tensor)]
    names = [f"x{i}" for i in range(len(tensors))]
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "softmax": ("Softmax", {"axis": -1}),
        "gelu": ("Gelu", {"approximate": "tanh" if "tanh" in case.shape else "none"}),
        "layer_norm": ("LayerNormalization", {"axis": -1, "epsilon": 1e-5}),
        "rms_norm": ("SimplifiedLayerNormalization", {"axis": -1, "epsilon": 1e-6}),
    }
    kind, attributes = nodes[case.op]
    node = helper.make_node(kind, names, ["y"], **attributes)

    def info(name: str, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))

    inputs = [info(n, t.shape) for n, t in zip(names, tensors, strict=True)]
    graph = helper.make_graph([node], case.op, inputs, [info("y", tensors[0].shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    feed = {n: make(numpy.ascontiguousarray(t)) for n, t in zip(names, tensors, strict=True)}

    def call() -> Tensor:
        y = session.run_with_ort_values(["y"], feed)[0]
        # Neither copies; versions without DLPack copy in numpy().
        return from_dlpack(y) if hasattr(y, "__dlpack__") else torch.from_numpy(y.numpy())

    return call


def _zentorch(case: Case) -> Call | None:
    importlib.import_module("zentorch")  # registers its torch.compile backend
    parts = _parts(case)
    compiled = torch.compile(parts.function, dynamic=False, backend="zentorch")
    return with_backward(parts.passes, compiled, parts.inputs)


def _liger(case: Case) -> Call | None:
    functions = importlib.import_module("liger_kernel.transformers.functional")
    call: dict[str, Callable[..., Any]] = {
        "softmax": lambda x: functions.liger_softmax(x),
        "layer_norm": lambda x, shape, w, b: functions.liger_layer_norm(x, w, b, 1e-5),
        "rms_norm": lambda x, w: functions.liger_rms_norm(x, w, 1e-6),
        "swiglu": lambda gate, up: functions.liger_swiglu(gate, up),
        "cross_entropy": lambda x, target: functions.liger_cross_entropy(x, target),
    }
    parts = _parts(case)
    if case.op == "swiglu" and len(parts.inputs) == 1:
        return None  # it takes gate and up apart
    return with_backward(parts.passes, call[case.op], parts.inputs)


def _flash_attn(case: Case) -> Call | None:
    function = importlib.import_module("flash_attn").flash_attn_func
    parts = _parts(case)
    if case.dtype == torch.float32:
        return None

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # it takes [B, T, H, D]
        return function(q, k, v, causal=causal).transpose(1, 2)

    return with_backward(parts.passes, attention, parts.inputs)


def _quack(case: Case) -> Call | None:
    quack = importlib.import_module("quack")
    call: dict[str, Callable[..., Any]] = {
        "softmax": lambda x: quack.softmax(x),
        "rms_norm": lambda x, w: quack.rmsnorm(x, w, eps=1e-6),
        "cross_entropy": lambda x, target: quack.cross_entropy(x, target),
    }
    parts = _parts(case)
    return with_backward(parts.passes, call[case.op], parts.inputs)


MAKERS: dict[str, Callable[[Case], Call | None]] = {
    "onnxruntime": _onnxruntime,
    "zentorch": _zentorch,
    "Liger": _liger,
    "flash-attn": _flash_attn,
    "quack": _quack,
}
