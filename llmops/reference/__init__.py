"""Every operator in plain PyTorch: the specification the kernels are held to.

Nothing here is fast and nothing is clever. 16-bit inputs are computed in fp32 and rounded once at
the end; fp64 inputs are computed in fp64. All of it is differentiable by torch's own autograd, as
often as one likes; double backward of the kernels goes through here.

Signatures are those of the public functions, less `backend`; docstrings there have the formulas.
"""

from __future__ import annotations

from llmops.reference.attention import attention, attention_bwd, dropout_seed, dropout_weights
from llmops.reference.attention_kvcache import attention_kvcache, attention_kvcache_bwd, cached_rows
from llmops.reference.attention_varlen import attention_varlen, attention_varlen_bwd
from llmops.reference.cross_entropy import cross_entropy, cross_entropy_bwd, cross_entropy_fwd
from llmops.reference.embedding import embedding, embedding_bwd
from llmops.reference.gelu import gelu, gelu_bwd
from llmops.reference.kv_cache_append_ import kv_cache_append_
from llmops.reference.layer_norm import add_layer_norm, layer_norm, layer_norm_bwd
from llmops.reference.linear import linear
from llmops.reference.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_bwd
from llmops.reference.merge_attention import merge_attention, merge_attention_bwd
from llmops.reference.rms_norm import add_rms_norm, rms_norm, rms_norm_bwd, rms_norm_eps
from llmops.reference.rope import rope, rope_qk, rope_qk_
from llmops.reference.sample import sample, sample_at, sample_probabilities
from llmops.reference.softmax import softmax, softmax_bwd
from llmops.reference.swiglu import geglu, glu_bwd, glu_bwd_fused, swiglu

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_bwd",
    "attention_kvcache",
    "attention_kvcache_bwd",
    "attention_varlen",
    "attention_varlen_bwd",
    "cached_rows",
    "cross_entropy",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "dropout_seed",
    "dropout_weights",
    "embedding",
    "embedding_bwd",
    "geglu",
    "gelu",
    "gelu_bwd",
    "glu_bwd",
    "glu_bwd_fused",
    "kv_cache_append_",
    "layer_norm",
    "layer_norm_bwd",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_bwd",
    "merge_attention",
    "merge_attention_bwd",
    "rms_norm",
    "rms_norm_bwd",
    "rms_norm_eps",
    "rope",
    "rope_qk",
    "rope_qk_",
    "sample",
    "sample_at",
    "sample_probabilities",
    "softmax",
    "softmax_bwd",
    "swiglu",
]
