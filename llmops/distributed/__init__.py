"""llmops over several processes, on torch.distributed.

DTensor: every operator has a sharding rule (`_rules.py`), so that tensor-parallel plans
(`ColwiseParallel`, `RowwiseParallel`, `SequenceParallel`) and FSDP2 run with no communication but
what the mathematics needs. The rules load by themselves with the first DTensor that an operator
sees; `import llmops.distributed` loads them for calls of `torch.ops.llmops.*` that pass by the
public functions.

Long sequences: `context_parallel_attention` and its helpers.
"""

from llmops.distributed._rules import register_all
from llmops.distributed.context_parallel import (
    context_parallel_attention,
    sequence_positions,
    shard_sequence,
    unshard_sequence,
)

__all__ = [
    "context_parallel_attention",
    "sequence_positions",
    "shard_sequence",
    "unshard_sequence",
]

register_all()
