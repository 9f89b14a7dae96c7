"""Checks in four processes: every operator's sharding rule, way by way (see distributed_kit.py)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._ops._embedding_ops import _MaskPartial
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import llmops
from llmops.distributed._rules import RULES
from llmops.testing import Make
from llmops.testing.specs import every

SMALL = 20_000  # elements of a sample's largest tensor
SAMPLES = 12


@functools.cache
def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """Two ranks, twice, and four."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "pair"))["pair"], (
        init_device_mesh("cpu", (4,))
    )


class Recorder(TorchDispatchMode):
    """The calls of our operators, backward ones too, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "llmops":
            copies = (x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.append((func, tuple(copies)))
        return func(*args, **(kwargs or {}))


def samples_of(op: str) -> Iterator[Any]:
    """Small ones of the conformance kit, as functions that call."""
    spec = every().get(op)
    small = []
    for sample in itertools.islice(spec.samples(Make(torch.float32)), 60) if spec else ():
        tensors = [x for x in sample.args if isinstance(x, Tensor)]
        if "dropout_p" not in sample.kwargs and all(0 < x.numel() < SMALL for x in tensors):
            small.append(functools.partial(spec.fn, *sample.args, **sample.kwargs, backend="cpu"))
    yield from small[:SAMPLES]


def more_of(op: str) -> Iterator[Any]:
    """Calls for ways that the kit's samples are too small for, or of operators it has none for."""
    make = Make(torch.float32, seed=1)
    slopes = make(4, 8, grad=False).abs()
    lengths = torch.tensor([5, 9, 1, 7])
    table = torch.tensor([[0, 3], [1, 2], [5, 4], [6, 7]])
    cos, sin = llmops.rope_tables(8, 8)
    for kv_heads in (4, 1):
        q, k, v = make(4, 8, 6, 8), make(4, kv_heads, 10, 8), make(4, kv_heads, 10, 4)
        if op == "attention":
            sinks = make(8)
            for mask in (None, make(1, 8, 6, 10), make(4, 1, 1, 10), make(6, 10)):
                yield lambda q=q, k=k, v=v, mask=mask, sinks=sinks: llmops.attention(
                    q, k, v, mask=mask, sinks=sinks, softcap=3.0, return_lse=True
                )
            yield lambda q=q, k=k, v=v: llmops.attention(
                q, k, v, causal=True, window=(3, 0), alibi_slopes=slopes
            )
        if op == "attention_varlen":
            q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in (q, k, v))
            at = [torch.tensor(ends) for ends in ([0, 2, 6], [0, 7, 10])]
            yield lambda q=q, k=k, v=v, at=at: llmops.attention_varlen(
                q, k, v, *at, 4, 7, sinks=make(8), alibi_slopes=slopes[0], return_lse=True
            )
        if op == "attention_kvcache":
            yield lambda q=q, k=k, v=v: llmops.attention_kvcache(
                q, k, v, lengths, cache_leftpad=torch.tensor([1, 0, 0, 2]), sinks=make(8),
                alibi_slopes=slopes, return_lse=True,
            )  # fmt: skip
            pages = make(8, kv_heads, 5, 8)
            yield lambda q=q, pages=pages: llmops.attention_kvcache(
                q, pages, pages, lengths, block_table=table, causal=True
            )
        k, v = k.detach(), v.detach()
        if op == "kv_cache_append_":
            arguments = [make(4, kv_heads, 16, n, grad=False) for n in (8, 4)]
            yield lambda k=k, v=v, to=arguments: llmops.kv_cache_append_(
                *to, k[:, :, :3], v[:, :, :3], lengths
            )
            paged = [make(8, kv_heads, 8, n, grad=False) for n in (8, 4)]
            yield lambda k=k, v=v, to=paged: llmops.kv_cache_append_(
                *to, k[:, :, :3], v[:, :, :3], lengths, block_table=table
            )
        if op in ("rope", "rope_qk", "rope_qk_"):
            q, k = make(4, 8, 8, 8), make(4, kv_heads, 8, 8)
            if op == "rope_qk_":
                q, k = q.detach(), k.detach()
            heads = (q,) if op == "rope" else (q, k)
            ids = make.ints(4, 8, high=8)
            gathered = (cos[ids], sin[ids])
            for tables in ((cos, sin), (cos, sin, ids), (cos, sin, ids[0]), gathered):
                yield functools.partial(getattr(llmops, op), *heads, *tables)
    if op == "sample":
        yield lambda: llmops.sample(make(5, 9, grad=False), top_k=4, top_p=0.9)


def calls_of(op: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Calls of the operators beneath llmops.<op>, forward and backward."""
    for call in itertools.chain(samples_of(op), more_of(op)):
        with Recorder() as recorder:
            result = call()
            results = result if isinstance(result, tuple) else (result,)
            losses = [x.float().sum() for x in results if x.requires_grad]
            if losses:
                torch.stack(losses).sum().backward()
        yield from recorder.calls


def split(x: Tensor, place: Any, mesh: DeviceMesh) -> DTensor:
    if place == "sum":  # terms that are no halves
        rank, ranks = mesh.get_local_rank(), mesh.size()
        term = x * (2.0 if rank == 0 else -1.0 if rank == ranks - 1 else 0.0)
        return DTensor.from_local(term, mesh, [Partial()], run_check=False)
    shard = Shard(place) if isinstance(place, int) else Replicate()
    return distribute_tensor(x, mesh, [shard])


def placement_of(place: Any) -> Placement:
    if place == "sum":
        return Partial()
    return Shard(place) if isinstance(place, int) else Replicate()


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def holds(
    op: Any, args: tuple[Any, ...], outputs: Any, inputs: dict[str, Any], mesh: DeviceMesh
) -> bool:
    """The operator on tensors split as the way says: nothing travels, the results are split as it
    says, and are right. False where the sizes do not allow this way."""
    names = [a.name for a in op._schema.arguments]
    ranks = mesh.size()
    for name, x in zip(names, args, strict=True):
        place = inputs.get(name)
        if isinstance(x, Tensor) and isinstance(place, int) and x.shape[place] < ranks:
            return False
    heads, kv_heads = "q" in names and args[names.index("q")].shape[1], 0
    for name in ("k", "k_cache"):
        if name in names and "attention" in str(op) and inputs.get(name) == 1:
            kv_heads = args[names.index(name)].shape[1]
            if kv_heads != heads and kv_heads % ranks:
                return False
    if "linear_cross_entropy_bwd" in str(op):  # given sums of rows, it drops a rank's without any
        chunks = args[names.index("target")].chunk(ranks)
        ignored = args[names.index("ignore_index")]
        if len(chunks) < ranks or not all(bool((chunk != ignored).any()) for chunk in chunks):
            return False
    expected = [x.clone() if isinstance(x, Tensor) else x for x in args]
    wanted = op(*expected)
    masked = any(isinstance(place, _MaskPartial) for place in outputs)
    given = [
        split(x.clone(), inputs.get(name), mesh) if isinstance(x, Tensor) else x
        for name, x in zip(names, args, strict=True)
    ]
    with CommDebugMode() as comms:
        found = op(*given)
    assert comms.get_total_counts() == 0, (op, inputs, comms.get_comm_counts())
    if wanted is None:  # in place
        wanted, found = tuple(expected[:2]), tuple(given[:2])
        outputs = tuple(inputs.get(name) for name in names[:2])
    if isinstance(wanted, Tensor):
        wanted, found = (wanted,), (found,)
    for place, one, other in zip(outputs, wanted, found, strict=True):
        if not masked:
            assert other.placements == (placement_of(place),), (op, inputs, other.placements)
        assert other.shape == one.shape and other.dtype == one.dtype, (op, inputs)
        scale = max(1.0, float(one.abs().nan_to_num(0, 0, 0).max())) if one.numel() else 1.0
        torch.testing.assert_close(
            whole(other), one, rtol=1e-4, atol=2e-5 * scale, equal_nan=True,
            msg=lambda text, inputs=inputs, op=op: f"{op} {inputs}: {text}",
        )  # fmt: skip
    return True


def rules_of(op: str) -> None:
    tried: dict[str, set[str]] = {}
    for call, args in calls_of(op):
        name = call._schema.name.removeprefix("llmops::")
        names = [a.name for a in call._schema.arguments]
        specs = [
            distribute_tensor(x, meshes()[1])._spec if isinstance(x, Tensor) else x for x in args
        ]
        for outputs, inputs in RULES[name](**dict(zip(names, specs, strict=True))):
            for mesh in meshes():
                if holds(call, args, outputs, inputs, mesh):
                    tried.setdefault(name, set()).add(f"{outputs} {mesh.size()}")
    assert tried, op
    expected = {name for name in RULES if name in tried or name in _beneath(op)}
    assert set(tried) == expected, expected - set(tried)


def _beneath(op: str) -> set[str]:
    """The operators that a call of llmops.<op> and its backward must come to."""
    names = {op, f"{op}_bwd"}
    if op in ("swiglu", "geglu"):
        names |= {"glu_bwd", "glu_bwd_fused"}
    if op.startswith("add_"):
        names.add(f"{op.removeprefix('add_')}_bwd")
    return names


MORE = {f"rules-{op}": functools.partial(rules_of, op) for op in llmops.OPERATORS}
