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
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

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
    return _processors_of(torch.cuda.current_device())


@functools.lru_cache(None)
def _processors_of(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def all_registers(num_warps: int) -> dict[str, int]:
    """A launch option: the bound on registers that NVIDIA's processors set themselves. Told none,
    ptxas may spill a few to fit one more program on a processor."""
    if not architecture().startswith("sm"):
        return {}
    return {"maxnreg": min(65536 // (32 * num_warps), 255)}


def has_tma() -> bool:
    """Whether the copy engine for tiles is there, which tensor descriptors are for: Hopper and
    later. The interpreter runs them too."""
    where = architecture()
    return where == "interpreter" or (where.startswith("sm") and int(where[2:]) >= 90)


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


def cdiv(a: int, b: int) -> int:
    """How many blocks of b hold a. Triton's own takes ten microseconds where no kernel calls it."""
    return -(-a // b)


# ---- a launch ------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """A compiled kernel, as Triton's own run calls it, and the constexprs that follow the
    arguments."""

    compiled: Any  # what keeps the function loaded
    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


# What Triton has compiled, by the arguments as they are, and by what it specializes on. The first
# is the shorter way where a call's sizes come back, and is forgotten where they never do.
_by_value: dict[Any, _Known] = {}
_by_kind: dict[Any, _Known] = {}
MOST_VALUES = 4096
# Of the versions whose run() was read: what it makes its key of, and how it calls a kernel.
_READ = ("3.6.", "3.7.")


def _kind(argument: Any) -> Any:
    """What Triton tells an integer from others by: 1 becomes a constant, multiples of 16 vectorize
    an access, the size decides the type."""
    if argument.__class__ is not int:
        return argument
    return (argument == 1, argument & 15 == 0, -(2**31) <= argument < 2**31, argument < 2**63)


def _value(argument: Any) -> Any:
    """Of an integer itself, which is finer than its kind; of a tensor what its pointer's type and
    alignment are; of a tensor descriptor its type, which has the tile; of all else, which is not
    specialized on, the class."""
    if argument is None:
        return None
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    if isinstance(argument, TensorDescriptor):
        return TensorDescriptor, argument.base.dtype, *argument.block_shape
    return argument.__class__


@functools.lru_cache(None)
def _direct() -> Any:
    """Triton's runtime knobs and its function for the current stream; None where every launch goes
    through Triton's run(): of another version, and on AMD, where it specializes on more."""
    import triton

    if torch.version.hip is not None or not triton.__version__.startswith(_READ):
        return None
    stream = triton.runtime.driver.active.get_current_stream
    return triton.knobs.runtime, stream, torch.cuda.current_device


def _launch(kernel: Any, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
    """kernel[grid](*arguments, **constants), but by its own key where Triton has done it before:
    Triton's way from a call to the driver takes thirty to fifty microseconds, this one a fifth.

    A tensor descriptor is passed as it is: the compiled kernel's run() encodes it, at each launch,
    from where its tensor then lies. Profilers' hooks are Triton's: with one in place its run()
    serves. Its other settings count as they were when a kind of call was first launched."""
    direct = _direct()
    if direct is None or kernel.pre_run_hooks:
        kernel[grid](*arguments, **constants)
        return
    knobs, current_stream, current_device = direct
    if knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls:
        kernel[grid](*arguments, **constants)
        return
    device = current_device()
    values = [a if a.__class__ is int else _value(a) for a in arguments]
    key = (id(kernel), device, *constants.items(), *values)
    known = _by_value.get(key)
    if known is None:
        kinds = (id(kernel), device, *constants.items(), *map(_kind, values))
        known = _by_kind.get(kinds)
        if known is None:
            compiled = kernel[grid](*arguments, **constants)
            rest = kernel.params[len(arguments) :]
            if all(p.is_constexpr and p.name in constants for p in rest):
                _by_kind[kinds] = _Known(
                    compiled,
                    compiled.run,
                    compiled.function,
                    compiled.packed_metadata,
                    tuple(constants[p.name] for p in rest),
                )
            return
        if len(_by_value) >= MOST_VALUES:
            _by_value.clear()
        _by_value[key] = known
    x, y, z = (*grid, 1, 1)[:3]
    stream = current_stream(device)
    known.run(
        x, y, z, stream, known.function, known.metadata, None, None, None, *arguments,
        *known.constants,
    )  # fmt: skip


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` over `grid`, on the current device and its current stream. Constexprs and
    options are named, all other arguments are not."""
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
    _launch(kernel, grid, arguments, constants)
