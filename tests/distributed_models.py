"""Checks in four processes: whole models under tensor parallel plans and FSDP2, by two and by four
ranks, beside the same model in one process (distributed_kit.py)."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import llmops
import llmops.nn

B, T, V = 2, 8, 32


@functools.cache
def meshes() -> dict[str, DeviceMesh]:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    return {"grid": grid, "two": grid["model"], "four": init_device_mesh("cpu", (4,))}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.q = llmops.nn.Linear(width, heads * dim)
        self.k = llmops.nn.Linear(width, kv_heads * dim)
        self.v = llmops.nn.Linear(width, kv_heads * dim)
        self.out = llmops.nn.Linear(heads * dim, width)
        self.rotary = llmops.nn.RotaryEmbedding(dim, T)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        q, k = self.rotary(q, k)
        y = llmops.attention(q, k, v, causal=True)
        assert isinstance(y, Tensor)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = llmops.nn.Linear(width, 24), llmops.nn.Linear(width, 24)
        self.swiglu, self.down = llmops.nn.SwiGLU(), llmops.nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = llmops.nn.RMSNorm(width), llmops.nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, 8, 4, 4), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.tokens = llmops.nn.Embedding(V, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = llmops.nn.RMSNorm(width), llmops.nn.Linear(width, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(V, (B, T))
    targets = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, -100)
    return ids, targets


def step(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def same(found: nn.Module, expected: nn.Module) -> None:
    """Gradients and, after a step, parameters."""
    parameters = dict(found.named_parameters())
    for name, one in expected.named_parameters():
        other = parameters[name]
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(whole(other.grad), one.grad, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(whole(other), one, rtol=1e-4, atol=1e-5, msg=name)


def counts(comms: CommDebugMode) -> dict[str, int]:
    """Communications by kind: functional or not, c10d's spellings included."""
    kinds: Counter[str] = Counter()
    for op, count in comms.get_comm_counts().items():
        name = str(op).replace("_", "")
        for kind in ("allgather", "reducescatter", "allreduce", "alltoall", "broadcast"):
            if kind in name:
                kinds[kind] += count
    assert sum(kinds.values()) == comms.get_total_counts(), comms.get_comm_counts()
    return dict(kinds)


PLAN = {
    "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(
        input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
    ),
}
GATHER = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
BLOCK = {
    "norm_1": SequenceParallel(),
    "norm_2": SequenceParallel(),
    "attention": PrepareModuleInput(**GATHER),
    "mlp": PrepareModuleInput(**GATHER),
    **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
    "attention.out": RowwiseParallel(output_layouts=Shard(1)),
    "mlp.gate": ColwiseParallel(),
    "mlp.up": ColwiseParallel(),
    "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
}


def tensor_parallel(model: Model, mesh: DeviceMesh) -> Model:
    parallelize_module(model, mesh, PLAN)
    for block in model.blocks:
        parallelize_module(block, mesh, BLOCK)
    return model


def check_tensor_parallel() -> None:
    """Columns, rows and sequence, logits left split by vocabulary: per block two gathers and two
    scatters forward and as many backward, one of each for the embedding and the head, and three
    numbers per token for the loss. Nothing else travels."""
    ids, targets = data()
    for name in ("two", "four"):
        mesh = meshes()[name]
        torch.manual_seed(0)
        alone = Model()
        model = tensor_parallel(copy.deepcopy(alone), mesh)
        with CommDebugMode() as forward:
            logits = model(ids).flatten(0, 1)
            split = distribute_tensor(targets.flatten(), mesh, [Replicate()], src_data_rank=None)
            loss = llmops.cross_entropy(logits, split)
        assert counts(forward) == {"allgather": 4 + 1 + 1, "reducescatter": 4 + 1}, counts(forward)
        with CommDebugMode() as backward:
            loss.backward()
        assert counts(backward) == {"allgather": 4 + 1, "reducescatter": 4 + 1}, counts(backward)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        expected = llmops.cross_entropy(alone(ids).flatten(0, 1), targets.flatten())
        step(alone, expected)
        torch.testing.assert_close(whole(loss), expected)
        same(model, alone)


def check_fsdp() -> None:
    """The reference GPT under FSDP2: a gather of each block's parameters forward and backward, a
    scatter of its gradients, and no more."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    from llmops.model import GPT, GPTConfig

    torch.manual_seed(1)
    ids, targets = torch.randint(V, (4, T)), torch.randint(V, (4, T))
    for changes in ({}, {"position": "rotary", "norm": "rms_norm", "activation": "swiglu"}):
        config = GPTConfig(V, T, n_layer=2, n_head=4, n_kv_head=2, d_model=16, **changes)
        for name in ("two", "four"):
            mesh = meshes()[name]
            torch.manual_seed(0)
            alone = GPT(config)
            model = copy.deepcopy(alone)
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            register_fsdp_forward_method(model, "loss")
            rows = slice(mesh.get_local_rank() * 4 // mesh.size(), None)
            rows = slice(rows.start, rows.start + 4 // mesh.size())
            with CommDebugMode() as comms:
                loss = model.loss(ids[rows], targets[rows])
                loss.backward()
            # The root's parameters (embedding, final norm) stay gathered from forward to backward.
            assert counts(comms) == {"allgather": 2 * 2 + 1, "reducescatter": 3}, counts(comms)
            torch.optim.SGD(model.parameters(), lr=0.5).step()
            expected = alone.loss(ids, targets)
            step(alone, expected)
            mean = distribute_mean(loss.detach(), mesh)
            torch.testing.assert_close(mean, expected.detach())
            same(model, alone)


def distribute_mean(x: Tensor, mesh: DeviceMesh) -> Tensor:
    from torch.distributed.tensor import Partial

    return DTensor.from_local(x, mesh, [Partial("avg")], run_check=False).full_tensor()


def check_fsdp_and_tensor_parallel() -> None:
    """Two by two: each block's columns and rows over one dimension, its shards over the other."""
    from torch.distributed.fsdp import fully_shard

    grid = meshes()["grid"]
    torch.manual_seed(0)
    alone = Model()
    model = tensor_parallel(copy.deepcopy(alone), grid["model"])
    for block in model.blocks:
        fully_shard(block, mesh=grid["data"])
    fully_shard(model, mesh=grid["data"])
    ids, targets = data()
    targets = torch.randint(V, (B, T))
    mine = slice(grid["data"].get_local_rank(), grid["data"].get_local_rank() + 1)
    logits = model(ids[mine]).flatten(0, 1)
    split = distribute_tensor(
        targets[mine].flatten(), grid["model"], [Replicate()], src_data_rank=None
    )
    loss = llmops.cross_entropy(logits, split)
    step(model, loss)
    expected = llmops.cross_entropy(alone(ids).flatten(0, 1), targets.flatten())
    step(alone, expected)
    torch.testing.assert_close(
        distribute_mean(whole(loss).detach(), grid["data"]), expected.detach()
    )
    same(model, alone)


def check_patched_llama() -> None:
    """transformers' Llama, patched, under a plan that splits its projections: loss, gradients and a
    step as of the model alone. Per layer two reductions forward, and backward one for each of the
    five projections that the plan gives an input of its own: as many as unpatched."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    ids, targets = data()
    for name in ("two", "four"):
        torch.manual_seed(0)
        alone = transformers.LlamaForCausalLM(config)
        model = copy.deepcopy(alone)
        llmops.patch(model)
        for layer in model.model.layers:
            columns = [f"self_attn.{n}_proj" for n in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
            rows = ["self_attn.o_proj", "mlp.down_proj"]
            plan = {n: ColwiseParallel() for n in columns} | {n: RowwiseParallel() for n in rows}
            parallelize_module(layer, meshes()[name], plan)
        with CommDebugMode() as forward:
            loss = model(input_ids=ids, labels=targets).loss
        assert counts(forward) == {"allreduce": 4}, counts(forward)
        with CommDebugMode() as backward:
            loss.backward()
        expected = alone(input_ids=ids, labels=targets).loss
        torch.testing.assert_close(whole(loss), expected, rtol=1e-5, atol=1e-5)
        assert counts(backward) == {"allreduce": 10}, counts(backward)
        expected.backward()
        for optimized in (model, alone):
            torch.optim.SGD(optimized.parameters(), lr=0.5).step()
        same(model, alone)


def check_transformers_own_plan() -> None:
    """A Llama that transformers itself has split (tp_plan="auto"), patched: the logits of the model
    alone, and the communications that it had before."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    alone = transformers.LlamaForCausalLM(config)
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, 0)
    folder = shared[0]
    if dist.get_rank() == 0:
        alone.save_pretrained(folder)
    dist.barrier()
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, tp_plan="auto", device_mesh=meshes()["four"]
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    ids, targets = data()

    def run() -> tuple[Any, dict[str, int]]:
        with CommDebugMode() as comms:
            out = model(input_ids=ids, labels=targets)
            out.loss.backward()
        return out, counts(comms)

    expected = alone(input_ids=ids, labels=targets)
    before, had = run()
    llmops.patch(model)
    after, has = run()
    assert has == had, (has, had)
    for found in (before, after):
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
