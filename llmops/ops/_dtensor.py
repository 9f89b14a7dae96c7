"""What a front door does for a DTensor. Before there is one, nothing imports torch.distributed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter

from llmops.dispatch import learn_sharding

_PLAIN = (Tensor, Parameter)


def is_distributed(*tensors: Tensor | None) -> bool:
    """Whether one of them is a DTensor."""
    return any(type(x) not in _PLAIN and hasattr(x, "device_mesh") for x in tensors)


def replicated(x: Tensor, like: Tensor, *, drawn: bool = False) -> Tensor:
    """x, which every rank has made, as a DTensor on the mesh of `like`. What was drawn at random is
    the first rank's."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    learn_sharding()
    mesh = like.device_mesh  # type: ignore[attr-defined]
    placements = [Replicate()] * mesh.ndim
    if drawn:
        return distribute_tensor(x, mesh, placements)
    return DTensor.from_local(x, mesh, placements, run_check=False)
