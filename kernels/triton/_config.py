"""Block sizes, warps and stages of the kernels, by table: no search at the first call.

Each op's file has its table, a function of what matters (row length or head dimension, dtype,
architecture) that gives a configuration: a dict of constexprs with num_warps and num_stages.
`choose` takes, in this order: what `override` says (tests, tuning), what `llmops tune` found on
this device, and the table's. Where a file has `candidates(op, key)`, `llmops tune` tries
those; what they do not name is the table's. `entries(op, dtype)` are the table's answers, each
with a key that asks for it: the ahead-of-time gate wants a call for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from llmops.kernels.triton import _launch

try:
    import fcntl
except ImportError:  # Windows: two processes that tune at a time may lose what one of them found
    fcntl = None  # type: ignore[assignment]

Config = dict[str, Any]
Key = tuple[Any, ...]
# device -> op -> key -> configuration: what tuning found there, of devices that were asked for.
_tuned: dict[int | None, dict[str, dict[Key, Config]]] = {}
_overrides: dict[str, Config] = {}
_watchers: list[list[tuple[str, Key, Config]]] = []


@contextlib.contextmanager
def override(op: str, **values: Any) -> Iterator[None]:
    """Within, these entries replace those of the op's configurations."""
    before = _overrides.get(op)
    _overrides[op] = {**(before or {}), **values}
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[str, Key, Config]]]:
    """The (op, key, configuration) of the choices made within."""
    seen: list[tuple[str, Key, Config]] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.pop()


def choose(op: str, key: Key, table: Config) -> Config:
    """The configuration of a call of `op`; `table` is the op's own answer for `key`."""
    config = table
    if not _launch.INTERPRETED and not _launch.is_recording():
        here = _tuned.get(_launch.current_device())
        found = (load() if here is None else here).get(op)
        config = table if found is None else {**table, **found.get(key, {})}
    forced = _overrides.get(op)
    if forced is not None:
        config = {**config, **forced}
    for seen in _watchers:
        seen.append((op, key, config))
    return config


# ---- what tuning found, kept in a file -----------------------------------------------------------


def file() -> Path:
    path = os.environ.get("LLMOPS_TUNED")
    return Path(path) if path else Path.home() / ".cache" / "llmops" / "tuned.json"


def _where() -> str:
    """Results are good for this device, this compiler and these kernels only."""
    import llmops

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}, triton {triton.__version__}, llmops {llmops.__version__}"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(file().read_text())
        if isinstance(found, dict):
            return found
        raise ValueError("it holds no table by device")
    except FileNotFoundError:
        return {}
    except RuntimeError:  # a user without a home, who has tuned nothing
        return {}
    except (OSError, ValueError) as error:
        _unreadable(error)
        return {}


def _unreadable(error: Exception) -> None:
    warnings.warn(f"llmops: {file()} cannot be read ({error}); tables serve", stacklevel=5)


def load() -> dict[str, dict[Key, Config]]:
    """Of the current device, from the file, once; one that is not in it has its tables."""
    found: dict[str, dict[Key, Config]] = {}
    try:
        for op, key, config in _read().get(_where(), []):
            found.setdefault(op, {})[tuple(map(_decoded, key))] = {**config}
    except (TypeError, ValueError, AttributeError) as error:  # JSON, but of another form
        _unreadable(error)
        found = {}
    _tuned[_launch.current_device()] = found
    return found


def save(found: dict[str, dict[Key, Config]]) -> None:
    """Adds to the file, and uses it from now on."""
    try:
        path = file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            # Until it is closed, or what another process finds meanwhile would be lost.
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            _write(path, found)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise ValueError(
            f"llmops tune: what it found cannot be kept ({error}); set the environment variable "
            f"LLMOPS_TUNED to a file that can be written"
        ) from error
    _tuned.clear()


def _write(path: Path, found: dict[str, dict[Key, Config]]) -> None:
    everything = _read()
    merged = {op: dict(configs) for op, configs in load().items()}
    for op, configs in found.items():
        merged.setdefault(op, {}).update(configs)
    everything[_where()] = [
        [op, [_encoded(part) for part in key], config]
        for op, configs in merged.items()
        for key, config in configs.items()
    ]
    part = path.with_suffix(f".{os.getpid()}")  # whole or not at all, for other processes' reads
    part.write_text(json.dumps(everything, indent=1) + "\n")
    part.replace(path)


def _encoded(part: Any) -> Any:
    return str(part) if isinstance(part, torch.dtype) else part


def _decoded(part: Any) -> Any:
    if isinstance(part, str) and part.startswith("torch."):
        return getattr(torch, part.removeprefix("torch."))
    return part
