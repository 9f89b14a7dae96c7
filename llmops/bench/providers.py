"""Who computes a case: ours, torch, and what `--with` adds, each with its install line where it is
not there.

    isa       ours on every instruction set this processor has
    backends  ours on the other backends that can serve
    sdpa      on a GPU: torch's attention by its flash and by its cuDNN kernel
    compile   torch.compile of torch's side (minutes: it runs a compiler per row)
    peers     other libraries that have this op, where their packages are installed
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import llmops
from llmops.backends import _extension
from llmops.bench.harness import Call, Case, Parts, parts_of, with_backward

OURS, TORCH = "llmops", "torch"
GROUPS = ("isa", "backends", "sdpa", "compile", "peers")


@dataclass
class Provider:
    """`setting` is entered around every use of the call, outside what is timed."""

    name: str
    call: Call | None
    note: str = ""
    setting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def of(case: Case, groups: Iterable[str] = ()) -> list[Provider]:
    """Ours, torch, the case's own others, and these groups'."""
    found = [Provider(OURS, case.ours), Provider(TORCH, case.torch)]
    found += [Provider(name, call) for name, call in case.others.items()]
    for group in groups:
        found += _GROUPS[group](case)
    return found


def _isas(case: Case) -> Iterator[Provider]:
    if _extension.REASON is not None or case.device != "cpu":
        return
    active, best = (getattr(torch.ops.llmops_cpu, f"isa_{x}")() for x in ("active", "best"))
    usable = _extension.ISA_NAMES[: _extension.ISA_NAMES.index(best) + 1]
    for name in usable:
        if name != active:
            yield Provider(f"llmops {name}", case.ours, setting=functools.partial(_on_isa, name))


@contextlib.contextmanager
def _on_isa(name: str) -> Iterator[None]:
    active = torch.ops.llmops_cpu.isa_active()
    _extension.select_isa(name)
    try:
        yield
    finally:
        _extension.select_isa(active)


def _backends(case: Case) -> Iterator[Provider]:
    parts = parts_of(case.ours)
    if parts is None or case.in_place:
        return
    for name, reason in llmops.backends().items():
        if name == "cpu" or (name, case.device) == ("triton", "cuda"):
            continue  # what ours is already, or cannot serve
        if reason is not None:
            yield Provider(f"llmops {name}", None, note=reason)
            continue

        def on_backend(*inputs: Any, name: str = name) -> Any:
            with llmops.use_backend(name):
                return parts.function(*inputs)

        yield _derived(f"llmops {name}", parts, on_backend)


def _derived(name: str, parts: Parts, function: Callable[..., Any]) -> Provider:
    """The same pass over another function."""
    return Provider(name, with_backward(parts.passes, function, parts.inputs))


def _compiled(case: Case, backend: str = "inductor", name: str = "torch.compile") -> Iterator[Any]:
    parts = parts_of(case.torch)
    if parts is None or case.in_place:
        return
    import torch._dynamo

    torch._dynamo.reset()  # each row is compiled for its own shape
    yield _derived(name, parts, torch.compile(parts.function, dynamic=False, backend=backend))


def _sdpa(case: Case) -> Iterator[Provider]:
    """torch's kernels one by one: its own choice is only one of them. They are for 16-bit types."""
    parts = parts_of(case.torch)
    if case.device != "cuda" or case.op != "attention" or parts is None:
        return
    if case.dtype == torch.float32:
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    for name, kernel in kernels.items():
        setting = functools.partial(sdpa_kernel, kernel)
        with setting():  # a backward's graph is made here
            provider = _derived(f"SDPA {name}", parts, parts.function)
        provider.setting = setting
        yield provider


# Package -> (import name, what to install it with, what it needs beyond, what it brings).
PEERS: dict[str, tuple[str, str, str]] = {
    "onnxruntime": ("onnxruntime", "pip install onnxruntime onnx", ""),
    "zentorch": ("zentorch", "pip install zentorch", ""),
    "Liger": ("liger_kernel", "pip install liger-kernel", "a GPU"),
    "flash-attn": ("flash_attn", "pip install flash-attn --no-build-isolation", "a CUDA GPU"),
    "quack": ("quack", "pip install quack-kernels", "a Hopper or newer GPU"),
    "xllamacpp": ("xllamacpp", "pip install xllamacpp", ""),
    "ctranslate2": ("ctranslate2", "pip install ctranslate2", ""),
    "transformers": ("transformers", "pip install transformers", ""),
}


def availability() -> dict[str, str]:
    """Each peer: "" where it can take part, else how to get it or what it lacks here."""
    states = {}
    for name, (module, install, needs) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            states[name] = f"not installed: {install}"
        elif needs and not torch.cuda.is_available():
            states[name] = f"needs {needs}"
        else:
            states[name] = ""
    if not states["onnxruntime"] and importlib.util.find_spec("onnx") is None:
        states["onnxruntime"] = "its models are made with onnx: pip install onnx"
    return states


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name, (_, install, _) in PEERS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(install.split()[2])
    return found


def _peers(case: Case) -> Iterator[Provider]:
    from llmops.bench import peers

    states = availability()
    for name, make in peers.makers(case).items():
        needs = PEERS[name][2]
        here = f"needs {needs}" if needs and case.device == "cpu" else ""
        if note := states[name] or here:
            yield Provider(name, None, note=note)
            continue
        try:
            call = make()
        except peers.Absent as absent:
            yield Provider(name, None, note=str(absent))
            continue
        except Exception as error:  # another project's code may fail in any way; it is shown
            yield Provider(name, None, note=f"fails: {type(error).__name__}: {str(error)[:120]}")
            continue
        if call is not None:
            yield Provider(name, call)


_GROUPS: dict[str, Callable[[Case], Iterable[Provider]]] = {
    "isa": _isas,
    "backends": _backends,
    "sdpa": _sdpa,
    "compile": _compiled,
    "peers": _peers,
}


class _SdpaChoice(TorchFunctionMode):
    """Notes which kernel torch chooses for its scaled_dot_product_attention."""

    NAMES = ("math", "flash", "efficient", "cuDNN", "overrideable")

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            choice = int(torch._fused_sdp_choice(*args, **(kwargs or {})))
            self.name = f"SDPA {self.NAMES[choice] if 0 <= choice < 5 else choice}"
        return function(*args, **(kwargs or {}))


def torch_name(case: Case) -> str:
    """What torch's side is: the case's own word, or the SDPA kernel that it calls."""
    parts = parts_of(case.torch)
    if case.torch_name != "eager" or parts is None or case.in_place:
        return case.torch_name
    choice = _SdpaChoice()
    if "attention" in case.op:  # elsewhere a call more would only cost time
        with torch.set_grad_enabled(parts.passes != "fwd"), choice:
            parts.function(*parts.inputs)
    return choice.name or case.torch_name
