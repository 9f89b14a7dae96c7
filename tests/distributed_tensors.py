"""Checks in four processes: public functions on DTensors, beside plain tensors: losses over rows
and vocabularies, positions and draws, and what is refused (distributed_kit.py)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import llmops
import llmops.nn

R = Replicate()
N, D, V = 12, 8, 18


@functools.cache
def meshes() -> dict[str, DeviceMesh]:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    return {"grid": grid, "two": grid["model"], "four": init_device_mesh("cpu", (4,))}


def split(x: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    placements = placements or (R,) * mesh.ndim
    leaf = distribute_tensor(x.detach(), mesh, placements, src_data_rank=None)
    return leaf.requires_grad_(x.requires_grad)


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(found: Any, expected: Tensor, what: object = "") -> None:
    torch.testing.assert_close(
        whole(found), expected, rtol=2e-5, atol=2e-5, msg=lambda text: f"{what}: {text}"
    )


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    targets = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.3, -100)
    return (4 * torch.randn(N, V)).to(dtype), targets


HOW: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.2, "z_loss": 0.01},
    {"label_smoothing": 0.2, "z_loss": 0.01, "reduction": "none"},
)


def losses(
    x: Tensor, targets: Tensor, mesh: DeviceMesh, of_x: list[Placement], of_target: list[Placement],
    how: dict[str, Any],
) -> CommDebugMode:  # fmt: skip
    leaf = x.detach().requires_grad_()
    parallel = split(leaf, mesh, *of_x)
    target = split(targets, mesh, *of_target)
    weight = how.get("weight")
    given = how if weight is None else {**how, "weight": split(weight, mesh)}
    with CommDebugMode() as comms:
        loss = llmops.cross_entropy(parallel, target, **given)
        (loss.sum() if how.get("reduction") == "none" else loss).backward()
    if how.get("reduction") != "none":  # a number that .item() tells rightly on every rank
        assert loss.placements == (R,) * mesh.ndim
    expected = llmops.cross_entropy(leaf, targets, **how)
    expected.sum().backward()
    close(loss, expected, (how, of_x))
    close(parallel.grad, leaf.grad, (how, of_x))
    return comms


def check_cross_entropy_by_rows() -> None:
    """Tokens split: each rank's rows stay where they are, and only scalars travel."""
    x, targets = rows()
    weighted = ({"weight": torch.rand(V)}, {"weight": torch.rand(V), "z_loss": 0.1})
    for name in ("two", "four"):
        for how in (*HOW, *weighted):
            comms = losses(x, targets, meshes()[name], [Shard(0)], [Shard(0)], how)
            kinds = {str(op) for op in comms.get_comm_counts()}
            assert all("all_reduce" in kind for kind in kinds), kinds


def check_cross_entropy_by_vocabulary() -> None:
    """Classes split, evenly and not: three numbers per row are gathered, no logits."""
    x, targets = rows()
    for name in ("two", "four"):
        for how in HOW:
            comms = losses(x, targets, meshes()[name], [Shard(1)], [R], how)
            assert comms.get_total_counts() == 1, comms.get_comm_counts()
    few = targets.where(targets < 5, 4)  # five classes on four ranks: 2, 2, 1 and none
    losses(x[:, :5], few, meshes()["four"], [Shard(1)], [R], {"label_smoothing": 0.1})
    both: list[Placement] = [Shard(0), Shard(1)]
    for how in HOW:
        losses(x, targets, meshes()["grid"], both, [Shard(0), R], how)
        losses(x, targets, meshes()["grid"], both, [R, R], how)
    images = x.view(3, 4, V).transpose(1, 2)  # [N, C, d]: the class dimension is 1
    losses(images, targets.view(3, 4), meshes()["two"], [Shard(1)], [R], {})


def check_cross_entropy_bf16() -> None:
    x, targets = rows(torch.bfloat16)
    exact = torch.nn.functional.cross_entropy(x.double(), targets)
    for placements in ([Shard(0)], [Shard(1)]):
        parallel = split(x, meshes()["four"], *placements)
        target = split(targets, meshes()["four"])
        loss = llmops.cross_entropy(parallel, target, dtype=torch.float32)
        close(loss, exact.float(), placements)
        assert llmops.cross_entropy(parallel, target).dtype == torch.bfloat16


def check_linear_cross_entropy() -> None:
    torch.manual_seed(3)
    _, targets = rows()
    given = [torch.randn(N, D), torch.randn(V, D), torch.randn(V)]
    ways: list[tuple[Placement, Placement, Placement]] = [
        (Shard(0), R, Shard(0)),  # tokens
        (R, Shard(0), R),  # vocabulary
    ]
    for name in ("two", "four"):
        mesh = meshes()[name]
        for of_input, of_weight, of_target in ways:
            for how in HOW[:3]:
                plain = [x.clone().requires_grad_() for x in given]
                places = (of_input, of_weight, of_weight)
                leaves = [split(x, mesh, p) for x, p in zip(plain, places, strict=True)]
                target = split(targets, mesh, of_target)
                loss = llmops.linear_cross_entropy(
                    leaves[0], leaves[1], target, linear_bias=leaves[2], **how
                )
                (loss.sum() if how.get("reduction") == "none" else loss).backward()
                expected = llmops.linear_cross_entropy(
                    plain[0], plain[1], targets, linear_bias=plain[2], **how
                )
                expected.sum().backward()
                close(loss, expected, how)
                for one, other in zip(leaves, plain, strict=True):
                    close(one.grad, other.grad, how)  # type: ignore[arg-type]


def check_embedding() -> None:
    """Vocabulary split: what a rank has not, another adds; learned positions once."""
    torch.manual_seed(4)
    ids = torch.randint(V, (3, 5))
    for name in ("two", "four"):
        mesh = meshes()[name]
        for place in (Shard(0), Shard(1), R):
            tables = [torch.randn(n, D).requires_grad_() for n in (V, 7)]
            weight, positions = split(tables[0], mesh, place), split(tables[1], mesh)
            with CommDebugMode() as comms:
                out = llmops.embedding(split(ids, mesh), weight, position_weight=positions)
            assert comms.get_total_counts() == 0, comms.get_comm_counts()
            expected = llmops.embedding(ids, tables[0], position_weight=tables[1])
            full = out.redistribute(placements=[R])
            close(full, expected, place)
            full.square().sum().backward()
            expected.square().sum().backward()
            for one, other in zip((weight, positions), tables, strict=True):
                close(one.grad, other.grad, place)  # type: ignore[arg-type]


def check_rope_splits_tokens() -> None:
    """Tables longer than the sequence do not keep its tokens together."""
    mesh = meshes()["four"]
    q = torch.randn(2, 4, 8, 8)
    cos, sin = llmops.rope_tables(100, 8)
    tables = split(cos, mesh), split(sin, mesh)
    with CommDebugMode() as comms:
        out = llmops.rope(split(q, mesh, Shard(2)), *tables)
    assert comms.get_total_counts() == 0 and out.placements == (Shard(2),)
    close(out, llmops.rope(q, cos, sin))


def check_rotary_module() -> None:
    """Its tables are the same on every rank, so they need no distributing."""
    mesh = meshes()["four"]
    q, k = torch.randn(2, 8, 5, 8), torch.randn(2, 4, 5, 8)
    rotary = llmops.nn.RotaryEmbedding(8, 16)
    with CommDebugMode() as comms:
        found = rotary(split(q, mesh, Shard(1)), split(k, mesh, Shard(1)))
    assert comms.get_total_counts() == 0
    for one, other in zip(found, rotary(q, k), strict=True):
        assert one.placements == (Shard(1),)
        close(one, other)


def check_ulysses() -> None:
    """Causal attention of split tokens needs all of them: where they are large enough to matter,
    they go to where their heads are, which is less than gathering them everywhere."""
    mesh = meshes()["four"]
    plain = [torch.randn(2, heads, 512, 8).requires_grad_() for heads in (8, 4, 4)]
    q, k, v = (split(x, mesh, Shard(2)) for x in plain)
    with CommDebugMode() as comms:
        out = llmops.attention(q, k, v, causal=True)
    assert comms.get_total_counts() == 3 and out.placements == (Shard(1),)  # type: ignore[union-attr]
    expected = llmops.attention(*plain, causal=True)
    close(out, expected)  # type: ignore[arg-type]
    out.sum().backward()  # type: ignore[union-attr]
    expected.sum().backward()  # type: ignore[union-attr]
    for one, other in zip((q, k, v), plain, strict=True):
        close(one.grad, other.grad)  # type: ignore[arg-type]


def check_groups_stay_together() -> None:
    """Three key/value heads do not split over two ranks, nor two over four: gathered, not mixed
    up."""
    for name, count in (("two", 3), ("four", 2)):
        mesh = meshes()[name]
        plain = [torch.randn(1, heads, 6, 8) for heads in (2 * count, count, count)]
        q, k, v = split(plain[0], mesh, Shard(1)), *(split(x, mesh) for x in plain[1:])
        close(llmops.attention(q, k, v), llmops.attention(*plain))  # type: ignore[arg-type]


def check_sample_draws_once() -> None:
    """Ranks whose generators differ still agree on the tokens, the first rank's."""
    mesh = meshes()["four"]
    logits = torch.randn(6, V)
    dist.broadcast(logits, 0)
    torch.manual_seed(5)
    expected = llmops.sample(logits, top_k=5)
    torch.manual_seed(5 + dist.get_rank())
    for place in (R, Shard(0)):
        if place == Shard(0):
            torch.manual_seed(5 + dist.get_rank())
        assert torch.equal(whole(llmops.sample(split(logits, mesh, place), top_k=5)), expected)


def check_cache_in_place() -> None:
    mesh = meshes()["four"]
    torch.manual_seed(6)
    plain = [torch.zeros(4, 4, 8, 8), torch.zeros(4, 4, 8, 8)]
    new = [torch.randn(4, 4, 3, 8), torch.randn(4, 4, 3, 8)]
    lengths = torch.tensor([0, 2, 1, 5])
    for place in (Shard(0), Shard(1)):
        caches = [split(x, mesh, place) for x in plain]
        keys, values = (split(x, mesh, place) for x in new)
        llmops.kv_cache_append_(*caches, keys, values, split(lengths, mesh))
        written = llmops.kv_cache_append_(*(x.clone() for x in plain), *new, lengths)
        for one, other in zip(caches, written, strict=True):
            assert one.placements == (place,)
            close(one, other)
    caches = [split(x, mesh, Shard(2)) for x in plain]
    given = (*(split(x, mesh) for x in new), split(lengths, mesh))
    with pytest.raises(NotImplementedError, match="writes in place"):
        llmops.kv_cache_append_(*caches, *given)


def check_refusals() -> None:
    mesh = meshes()["two"]
    q = split(torch.randn(2, 4, 6, 8), mesh, Shard(1))
    with pytest.raises(NotImplementedError, match="dropout of a DTensor"):
        llmops.attention(q, q, q, dropout_p=0.1)
    x, targets = rows()
    logits, target = split(x, mesh, Shard(1)), split(targets, mesh)
    with pytest.raises(NotImplementedError, match="sharded by class"):
        llmops.cross_entropy(logits, target, split(torch.ones(V), mesh))
    with pytest.raises(TypeError, match="distribute it"):
        llmops.cross_entropy(logits, targets)
    with pytest.raises(IndexError, match="target holds 18"):
        llmops.cross_entropy(logits, split(torch.full((N,), V), mesh))
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        llmops.rms_norm(torch.randn(4, 8), (8,), split(torch.ones(8), mesh))


def check_compiles() -> None:
    """A compiled step on DTensors, one graph: the same numbers."""
    mesh = meshes()["two"]
    torch.manual_seed(7)
    plain = [torch.randn(4, 8), torch.rand(8), torch.randn(16, 8)]

    def layer(x: Tensor, weight: Tensor, up: Tensor) -> Tensor:
        h = llmops.rms_norm(x, (8,), weight)
        return llmops.softmax(llmops.swiglu(torch.nn.functional.linear(h, up)))

    leaves = [
        split(x, mesh, p).requires_grad_() for x, p in zip(plain, (Shard(0), R, R), strict=True)
    ]
    for x in plain:
        x.requires_grad_()
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(*leaves)
    out.square().sum().backward()
    expected = layer(*plain)
    expected.square().sum().backward()
    close(out, expected)
    for one, other in zip(leaves, plain, strict=True):
        close(one.grad, other.grad)  # type: ignore[arg-type]
