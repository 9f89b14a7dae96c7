"""How an operator's sharding rule reaches DTensor.

A rule is a generator over the ways in which one dimension of the device mesh may split the work. It
receives the operator's arguments by name (a tensor as its DTensorSpec, which has shape, ndim and
placements) and yields pairs (outputs, inputs): where each output and each named input is split, by
its dimension, SUM (each rank holds a term of the sum) or a placement; an output that is None and an
input that is not named are replicated. All replicated is always one way, and needs no rule.

    def gelu(x, **_):
        for dim in range(x.ndim):
            yield (dim,), {"x": dim}

DTensor combines the ways over the dimensions of the mesh and takes the one that moves least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

# As torch.distributed.tensor.experimental.register_sharding does it, which forgets arguments that
# are no ints (`causal`, `dtype`) when it looks up an earlier decision.
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

SUM = "sum"
Place = Any  # int, SUM, None or a Placement
Ways = Iterator[tuple[tuple[Place, ...], dict[str, Place]]]
Rule = Callable[..., Ways]


def _placement(place: Place) -> Placement:
    if place is None:
        return Replicate()
    if isinstance(place, Placement):
        return place
    return Partial() if place == SUM else Shard(place)


def _spec(argument: Any) -> Any:
    return argument.strategies[0].output_spec if isinstance(argument, OpStrategy) else argument


def register(op: str, rule: Rule, *, grouped: tuple[str, str] | None = None) -> None:
    """`rule` for torch.ops.llmops.<op>.

    Args:
        grouped: the arguments whose dimension 1 are query and key/value heads. Where there are
            fewer of the latter, they are split evenly or not at all: else the ranks' query heads
            would not meet their own key/value heads.
    """
    overload = getattr(torch.ops.llmops, op).default
    arguments, outputs = overload._schema.arguments, len(overload._schema.returns)
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}

    def strategy(schema: OpSchema) -> OpStrategy:
        named = [a.name for a, _ in zip(arguments, schema.args_schema, strict=False)]
        given = dict(zip(named, map(_spec, schema.args_schema), strict=True))
        given.update({name: _spec(value) for name, value in schema.kwargs_schema.items()})
        tensors = [name for name, value in given.items() if hasattr(value, "placements")]
        ways: list[list[Placement | None]] = [[Replicate()] * (outputs + len(tensors))]
        for results, inputs in rule(**given):
            places = [*results, *(inputs.get(name) for name in tensors)]
            ways.append([_placement(place) for place in places])
        found = expand_to_full_mesh_op_strategy(
            schema.get_mesh_from_args(), schema, ways, input_index=outputs
        )
        allowed = [s for s in found.strategies if _allowed(s, given, tensors, written, grouped)]
        if not allowed:
            raise NotImplementedError(_why_none(op, given, written))
        return OpStrategy(allowed)

    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
        overload, strategy, RuntimeSchemaInfo(static_argnum=0)
    )


def _allowed(
    way: OpSpec,
    given: dict[str, Any],
    tensors: list[str],
    written: set[str],
    grouped: tuple[str, str] | None,
) -> bool:
    specs = dict(zip(tensors, way.input_specs or (), strict=True))
    # What is written in place stays where it is: written to a copy, it would be lost.
    if any(specs[name].placements != given[name].placements for name in written):
        return False
    if grouped is None:
        return True
    heads, kv_heads = (given[name].shape[1] for name in grouped)
    return bool(heads == kv_heads or kv_heads % _shards(specs[grouped[1]], 1) == 0)


def _shards(spec: Any, dim: int) -> int:
    """Into how many parts `dim` is split."""
    count = 1
    for placement, size in zip(spec.placements, spec.mesh.shape, strict=True):
        if placement.is_shard(dim):
            count *= size
    return count


def _why_none(op: str, given: dict[str, Any], written: set[str]) -> str:
    placements = ", ".join(f"{name} {given[name].placements}" for name in sorted(written))
    return (
        f"llmops.{op}: writes in place, which these placements do not allow: {placements}; shard "
        "all by batch or all by heads (evenly, with fewer key/value heads), or replicate all"
    )
