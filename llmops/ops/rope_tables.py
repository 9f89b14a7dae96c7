"""rope_tables: cos and sin of every position, with the context extensions that models use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmops.ops import _check

DEFAULT_BASE = 10000.0


def rope_tables(
    length: int,
    dim: int,
    *,
    base: float = DEFAULT_BASE,
    scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos(p f_i) and sin(p f_i) for positions p in [0, length), frequencies f_i = base^(-2i/dim).

    Args:
        length: number of positions N.
        dim: number of elements R that are rotated (even; the head dim, or less for partial
            rotary); gives R/2 columns.
        base: rope_theta.
        scaling: None, or transformers' rope_scaling / rope_parameters dictionary, with "rope_type"
            (or "type"): "default", "linear", "dynamic", "yarn" or "llama3", and that type's keys:
              linear: factor
              dynamic: factor, original_max_position_embeddings (or max_position_embeddings); the
                  base grows with `length`
              yarn: factor (or max_position_embeddings), original_max_position_embeddings,
                  beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate
              llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
            "rope_theta" in it stands for `base`.
        dtype, device: of the result.

    Returns:
        (cos, sin), each [length, dim/2], computed in fp64 and rounded once; YaRN's attention factor
        is multiplied into both, as transformers does.

    Raises:
        ValueError: naming the argument; an unknown scaling type or key names what is supported.

    Source: Su et al. 2021; Peng et al., "YaRN", 2023; Llama 3.1's model card for llama3.
    """
    if not isinstance(length, int) or length < 0:
        raise ValueError(f"llmops.rope_tables: length must be an int >= 0; got {length!r}")
    if not isinstance(dim, int) or dim < 0 or dim % 2:
        raise ValueError(f"llmops.rope_tables: dim must be an even int >= 0; got {dim!r}")
    if dtype not in _check.FLOATS:
        raise TypeError(f"llmops.rope_tables: dtype must be a floating-point dtype; got {dtype}")
    kind, options = _options(scaling)
    base = _base(base, options)
    frequencies, factor = _TYPES[kind][0](dim, base, length, options)
    positions = torch.arange(length, dtype=torch.float64)
    angles = positions[:, None] * frequencies  # [N, R/2]
    return (
        (angles.cos() * factor).to(device=device, dtype=dtype),
        (angles.sin() * factor).to(device=device, dtype=dtype),
    )


def _options(scaling: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    if scaling is None:
        return "default", {}
    if not isinstance(scaling, Mapping):
        _check.fail_type("rope_tables", "scaling", "a dictionary or None", scaling)
    options = dict(scaling)
    kind = options.pop("rope_type", None)
    old = options.pop("type", None)
    kind = kind if kind is not None else (old if old is not None else "default")
    if kind not in _TYPES:
        raise ValueError(
            f"llmops.rope_tables: scaling type {kind!r} is not supported; there are "
            f"{', '.join(_TYPES)}"
        )
    known = {"rope_theta", "partial_rotary_factor", *_TYPES[kind][1]}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"llmops.rope_tables: scaling type {kind!r} does not know {', '.join(unknown)}; it "
            f"takes {', '.join(sorted(known))}"
        )
    if options.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ValueError(
            "llmops.rope_tables: partial_rotary_factor in scaling has no meaning here; pass "
            "dim=int(head_dim * partial_rotary_factor)"
        )
    return kind, options


def _base(base: float, options: dict[str, Any]) -> float:
    given = options.pop("rope_theta", None)
    if given is None or given == base:
        return float(base)
    if base != DEFAULT_BASE:
        raise ValueError(
            f"llmops.rope_tables: base is {base}, but scaling has rope_theta {given}; pass one"
        )
    return float(given)


def _need(kind: str, options: dict[str, Any], *names: str) -> float:
    """The first of `names` that is there."""
    for name in names:
        if options.get(name) is not None:
            return float(options[name])
    raise ValueError(
        f"llmops.rope_tables: scaling type {kind!r} needs {' or '.join(names)}; got "
        f"{', '.join(sorted(options)) or 'nothing'}"
    )


def _plain(dim: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))


def _default(dim: int, base: float, length: int, options: dict[str, Any]) -> tuple[Tensor, float]:
    return _plain(dim, base), 1.0


def _linear(dim: int, base: float, length: int, options: dict[str, Any]) -> tuple[Tensor, float]:
    return _plain(dim, base) / _need("linear", options, "factor"), 1.0


def _dynamic(dim: int, base: float, length: int, options: dict[str, Any]) -> tuple[Tensor, float]:
    """NTK-aware: beyond the trained context the base grows, so that low frequencies stretch by
    about `factor` per context length and high ones stay."""
    factor = _need("dynamic", options, "factor")
    trained = _need("dynamic", options, *_TRAINED)
    stretch = factor * max(length, trained) / trained - (factor - 1)
    # The exponent makes the lowest frequency, (dim - 2) / dim, stretch exactly by `stretch`.
    exponent = dim / (dim - 2) if dim > 2 else 1.0
    return _plain(dim, base * stretch**exponent), 1.0


def _yarn(dim: int, base: float, length: int, options: dict[str, Any]) -> tuple[Tensor, float]:
    """Frequencies with many turns over the trained context stay, those with few are divided by
    `factor`, a ramp between; the logits' temperature is folded into cos and sin."""
    trained = _need("yarn", options, "original_max_position_embeddings")
    if options.get("factor") is not None:
        factor = float(options["factor"])
    else:
        factor = _need("yarn", options, "max_position_embeddings") / trained

    def column(turns: float) -> float:
        """Where a frequency makes `turns` turns over the trained context."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = column(options.get("beta_fast") or 32.0)
    high = column(options.get("beta_slow") or 1.0)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    plain = _plain(dim, base)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = options.get("attention_factor")
    if attention is None:
        some, every = options.get("mscale"), options.get("mscale_all_dim")
        attention = magnitude(some) / magnitude(every) if some and every else magnitude(1.0)
    return plain / factor * ramp + plain * (1 - ramp), float(attention)


def _llama3(dim: int, base: float, length: int, options: dict[str, Any]) -> tuple[Tensor, float]:
    """Wavelengths above the trained context / low_freq_factor are stretched by `factor`, those
    below context / high_freq_factor stay, between them the two blend."""
    factor = _need("llama3", options, "factor")
    low = _need("llama3", options, "low_freq_factor")
    high = _need("llama3", options, "high_freq_factor")
    trained = _need("llama3", options, "original_max_position_embeddings")
    plain = _plain(dim, base)
    turns = trained * plain / (2 * math.pi)  # over the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - keep) + plain * keep, 1.0


_TRAINED = ("original_max_position_embeddings", "max_position_embeddings")
_Maker = Callable[[int, float, int, dict[str, Any]], tuple[Tensor, float]]
# What computes the frequencies and the factor of cos and sin, and the keys it takes.
_TYPES: dict[str, tuple[_Maker, tuple[str, ...]]] = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "dynamic": (_dynamic, ("factor", *_TRAINED)),
    "yarn": (
        _yarn,
        (
            "factor", *_TRAINED, "beta_fast", "beta_slow", "attention_factor", "mscale",
            "mscale_all_dim", "truncate",
        ),
    ),
    "llama3": (
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}  # fmt: skip
