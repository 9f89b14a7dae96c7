"""One block of a language model on two processes: split by heads and columns, then by tokens.

python examples/tensor_parallel.py             # starts two processes on this machine, over gloo
torchrun --nproc-per-node 4 examples/tensor_parallel.py

The first part splits the weights by torch's own plan, the second keeps them whole and splits the
sequence; both are held to the block in one process.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import llmops
import llmops.nn
from llmops.distributed import context_parallel_attention, sequence_positions, shard_sequence

WIDTH, DIM, TOKENS = 64, 16, 32


class Block(nn.Module):
    """Norm, causal attention with 4 query and 4 key/value heads, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = llmops.nn.RMSNorm(WIDTH), llmops.nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.out = (llmops.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = llmops.nn.Linear(WIDTH, 128), llmops.nn.Linear(WIDTH, 128)
        self.down, self.rotary = (
            llmops.nn.Linear(128, WIDTH),
            llmops.nn.RotaryEmbedding(DIM, TOKENS),
        )

    def forward(self, x: Tensor, attend=llmops.attention, positions=None) -> Tensor:
        h = self.norm_1(x)
        # -1: as many heads as this process has
        q, k, v = (p(h).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.rotary(q, k, positions)
        x = x + self.out(attend(q, k, v, causal=True).transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down(llmops.swiglu(self.gate(h), self.up(h)))


def tell(what: str, found: Tensor, expected: Tensor) -> None:
    apart = (found - expected).detach().abs().max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes with {what} each: apart by {apart:.0e} at most")


def main() -> None:
    torch.manual_seed(0)  # the same weights and data everywhere
    block, x = Block(), torch.randn(2, TOKENS, WIDTH)
    expected = block(x)

    # Tokens: each process has its own; keys and values travel around.
    mine = shard_sequence(x, 1, causal=True)
    positions = sequence_positions(TOKENS, causal=True)
    found = block(mine, context_parallel_attention, positions)
    tell(f"{mine.shape[1]} of {TOKENS} tokens", found, shard_sequence(expected, 1, causal=True))

    # Heads and columns: each process has its part of the weights and all tokens.
    columns = dict.fromkeys(("q", "k", "v", "gate", "up"), ColwiseParallel())
    rows = dict.fromkeys(("out", "down"), RowwiseParallel())
    parallelize_module(
        block, init_device_mesh("cpu", (dist.get_world_size(),)), {**columns, **rows}
    )
    rows = block.q.weight.to_local().shape[0]
    tell(f"{rows} of {WIDTH} rows of q's weight", block(x), expected)
    dist.destroy_process_group()


def start(rank: int, ranks: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
        main()
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (2, f"{folder}/store")
            torch.multiprocessing.start_processes(start, arguments, 2, start_method="fork")
