"""Block sizes, warps and stages of the kernels, by table: no search at the first call.

Each op's file has its table, a function of what matters (row length or head dimension, dtype,
architecture) that gives a configuration: a dict of constexprs with num_warps and num_stages.
`choose` takes, in this order: what `override` says (tests, tuning), what `llmops tune` found on
this device, and the table's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]
# op -> key -> configuration: what tuning found on this device.
tuned: dict[str, dict[tuple[Any, ...], Config]] = {}
_overrides: dict[str, Config] = {}


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


def choose(op: str, key: tuple[Any, ...], table: Config) -> Config:
    """The configuration of a call of `op`; `table` is the op's own answer for `key`."""
    found = tuned.get(op)
    config = table if found is None else found.get(key, table)
    forced = _overrides.get(op)
    return config if forced is None else {**config, **forced}
