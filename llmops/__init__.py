"""llmops: fused kernels for language models, as torch custom ops.

One set of operator schemas for three kernel backends: C++ on CPU, Triton, CUDA C++. `llmops.info()`
says what is usable here; `llmops.explain(op, ...)` which kernel a call would run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmops.dispatch import Decision, FallbackWarning, explain, use_backend
from llmops.ops.attention import attention
from llmops.ops.attention_kvcache import attention_kvcache
from llmops.ops.attention_varlen import attention_varlen
from llmops.ops.cross_entropy import cross_entropy
from llmops.ops.embedding import embedding
from llmops.ops.gelu import gelu
from llmops.ops.kv_cache_append_ import kv_cache_append_
from llmops.ops.layer_norm import add_layer_norm, layer_norm
from llmops.ops.linear import linear
from llmops.ops.linear_cross_entropy import linear_cross_entropy
from llmops.ops.merge_attention import merge_attention
from llmops.ops.rms_norm import add_rms_norm, rms_norm
from llmops.ops.rope import rope, rope_qk, rope_qk_
from llmops.ops.rope_tables import rope_tables
from llmops.ops.sample import sample
from llmops.ops.scaled_dot_product_attention import scaled_dot_product_attention
from llmops.ops.softmax import softmax
from llmops.ops.swiglu import geglu, swiglu

if TYPE_CHECKING:
    from llmops.integrations.patch import patch as patch
    from llmops.integrations.patch import unpatch as unpatch
    from llmops.kv_cache import KVCache as KVCache
    from llmops.report import info as info

__version__ = "0.1.0"

# Every public operator; explain(), the support matrix and the conformance kit go by this list.
OPERATORS = (
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "cross_entropy",
    "embedding",
    "geglu",
    "gelu",
    "kv_cache_append_",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention",
    "rms_norm",
    "rope",
    "rope_qk",
    "rope_qk_",
    "sample",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
)

# Loaded on first use: a plain import stays as quick as torch's own.
_LAZY = {
    "KVCache": "llmops.kv_cache",
    "info": "llmops.report",
    "patch": "llmops.integrations.patch",
    "unpatch": "llmops.integrations.patch",
}

__all__ = [
    "OPERATORS",
    "Decision",
    "FallbackWarning",
    "KVCache",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "backends",
    "cross_entropy",
    "embedding",
    "explain",
    "geglu",
    "gelu",
    "info",
    "kv_cache_append_",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention",
    "patch",
    "rms_norm",
    "rope",
    "rope_qk",
    "rope_qk_",
    "rope_tables",
    "sample",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
    "unpatch",
    "use_backend",
]


def backends() -> dict[str, str | None]:  # (the submodule of that name is reached by import)
    """Each backend's name with None where it is usable here, else the reason it is not."""
    from llmops import report

    return report.backends()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llmops' has no attribute {name!r}")
