"""How every kernel of this package is started: on its tensors' device, or, without a GPU, recorded
for ahead-of-time compilation or interpreted.

A launcher calls `launch(kernel, grid, *arguments, **constants)` and nothing else of Triton's
runtime. The tables and the launch are those of the current device: `on_its_device` makes that the
tensors'. Inside `recording(architecture)` launchers may be called with meta tensors: each launch is
then kept with what Triton would specialize on, and nothing runs. The ahead-of-time gate compiles
what the launchers really ask for in this way, at real shapes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from llmops.kernels.triton import _interpreter  # noqa: F401  (repairs it)
# The interpreter keeps its state in module globals.
_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the arguments by name, tensors as meta tensors; constexprs apart."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]  # constexprs, and the options num_warps, num_stages, ...


_recorded: list[Launch] | None = None
_architecture: str | None = None


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Launches inside are kept and do not run; tables answer as for "sm90", "gfx942", ..."""
    global _recorded, _architecture
    before = _recorded, _architecture
    _recorded, _architecture = [], architecture
    try:
        yield _recorded
    finally:
        _recorded, _architecture = before


_of_device: dict[int, str] = {}


def architecture() -> str:
    """ "sm80", "sm90", "sm100", "sm120", "gfx942", ... of the current device; "interpreter"."""
    if _architecture is not None:
        return _architecture
    if INTERPRETED:
        return "interpreter"
    device = torch.cuda.current_device()
    found = _of_device.get(device)
    if found is None:
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            found = str(properties.gcnArchName).split(":")[0]
        else:
            found = f"sm{properties.major}{properties.minor}"
        _of_device[device] = found
    return found


def processors() -> int:
    """Streaming multiprocessors (compute units) of the current device: the size of a persistent
    grid. Small in the interpreter, so that its programs loop."""
    if _architecture is not None:
        return 132
    if INTERPRETED:
        return 4
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def all_registers(num_warps: int) -> dict[str, int]:
    """A launch option: the bound on registers that NVIDIA's processors set themselves. Told none,
    ptxas may spill a few to fit one more program on a processor."""
    if not architecture().startswith("sm"):
        return {}
    return {"maxnreg": min(65536 // (32 * num_warps), 255)}


def is_recording() -> bool:
    return _recorded is not None


def current_device() -> int | None:
    """None where no GPU has been used yet."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, with the device of its first argument, a tensor, as the current one."""

    @functools.wraps(launcher)
    def run(first: Any, *rest: Any, **named: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launcher(first, *rest, **named)
        return launcher(first, *rest, **named)

    return run


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` over `grid`, on the current device and its current stream."""
    if 0 in grid:
        return
    if _recorded is not None:
        names = kernel.arg_names
        given = dict(zip(names, arguments, strict=False))
        _recorded.append(Launch(kernel, grid, given, constants))
        return
    if INTERPRETED:
        with _one_at_a_time:
            kernel[grid](*arguments, **constants)
        return
    kernel[grid](*arguments, **constants)
