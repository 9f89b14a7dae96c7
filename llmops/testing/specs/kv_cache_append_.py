"""kv_cache_append_ moves numbers and changes its arguments, so the kit's numeric checks do not fit
it; tests/test_kv_cache_append_.py compares bits. Here is what opcheck needs."""

from __future__ import annotations

from typing import Any

import torch

from llmops.testing._core import Make


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    k_cache, v_cache = make(5, 2, 4, 8, grad=False), make(5, 2, 4, 6, grad=False)
    k, v = make(2, 2, 3, 8, grad=False), make(2, 2, 3, 6, grad=False)
    table = torch.tensor([[0, 1], [2, 4]])
    return {
        "kv_cache_append_": (k_cache, v_cache, k, v, torch.tensor([2, 5]), table, "cpu"),
    }
