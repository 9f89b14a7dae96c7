"""The C++ kernels for CPU tensors: raw operators of the compiled extension."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch

from llmops.backends import _extension, _linear_cross_entropy

if TYPE_CHECKING:
    from llmops.dispatch import Call

DEVICE = "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What there is of each public operator, for the support table.
PASSES = {
    "add_layer_norm": "forward, backward",
    "add_rms_norm": "forward, backward",
    "attention": "forward, backward",
    "attention_kvcache": "forward",
    "attention_varlen": "forward, backward",
    "cross_entropy": "forward, backward",
    "embedding": "forward, backward",
    "geglu": "forward, backward",
    "gelu": "forward, backward",
    "kv_cache_append_": "in place",
    "layer_norm": "forward, backward",
    "linear": "forward (gradients: matrix products)",
    "linear_cross_entropy": "forward, backward",
    "merge_attention": "forward, backward",
    "rms_norm": "forward, backward",
    "rope": "forward, backward",
    "rope_qk": "forward, backward",
    "rope_qk_": "in place",
    "sample": "forward (no gradient)",
    "scaled_dot_product_attention": "forward, backward",
    "softmax": "forward, backward",
    "swiglu": "forward, backward",
}

# What an op has no kernel for, as its front door names it in Call.features.
_MISSING = {
    "attention": ("gradient of alibi_slopes",),
    "attention_kvcache": ("gradient of alibi_slopes",),
    "attention_varlen": ("gradient of alibi_slopes",),
    "cross_entropy": ("probability targets",),
    "linear_cross_entropy": ("probability targets", "multi-dimensional linear_weight"),
}

# linear: up to how many rows of x our kernel is ahead of torch's own product, per instruction set
# and dtype; of LINEAR_ROWS and all, measured (benchmarks/NOTES.md). On AVX2 torch has no 16-bit
# product worth the name.
LINEAR_ROWS = (8, 64, 128)
ANY_ROWS = sys.maxsize
LINEAR_AHEAD = {
    "scalar": {},
    "avx2": {torch.float32: 128, torch.bfloat16: ANY_ROWS, torch.float16: ANY_ROWS},
    "avx512": {torch.float32: 64, torch.bfloat16: 8, torch.float16: 64},
    "avx512_bf16": {torch.float32: 64, torch.bfloat16: 8, torch.float16: 64},
    "amx": {torch.float32: ANY_ROWS, torch.bfloat16: 128, torch.float16: ANY_ROWS},
}
# Where products of any number of rows are ours, gradients' are beyond so many, and on AVX2 in 16
# bits of any number: by AMX in parts (csrc/cpu/split_amx.h).
GRADIENT_ROWS = 48
# bf16 on AMX: from so many rows on dy^T x alone is ours. Torch's takes twice as long as its x W^T.
WEIGHT_GRADIENT_ROWS = 1024


def widens_products(dtype: torch.dtype) -> bool:
    """Whether matrix products of this dtype are better done in fp32: torch has no 16-bit product
    on this processor."""
    return dtype != torch.float32 and isa() == "avx2"


def own_products(dtype: torch.dtype) -> bool:
    """Whether products of many rows, gradients' too, are ours."""
    return LINEAR_AHEAD[isa()].get(dtype) == ANY_ROWS


def fp32_parts() -> int:
    """Of eight bits each, how many AMX counts of an fp32 element in a product, all of it being 3:
    what torch.set_float32_matmul_precision("high" or "medium") allows, or torch.backends' newer
    form of it for CPUs. Torch's own product on a CPU hears "medium" alone."""
    setting = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    return {"tf32": 2, "bf16": 1}.get(setting, 3)


def gradient_products(dtype: torch.dtype, rows: int) -> tuple[Any, Any]:
    """The products dy W and dy^T x of a linear of `rows` rows: ours where they are ahead of
    torch's."""
    ours = functools.partial(matmul, parts=fp32_parts())
    if own_products(dtype) and (rows > GRADIENT_ROWS or widens_products(dtype)):
        return ours, ours
    return torch.matmul, ours if own_weight_gradient(dtype, rows) else torch.matmul


def own_weight_gradient(dtype: torch.dtype, rows: int) -> bool:
    """Whether dy^T x alone is ours."""
    if dtype != torch.bfloat16 or rows < WEIGHT_GRADIENT_ROWS:
        return False
    return _extension.REASON is None and isa() == "amx"


def holds_logits(dtype: torch.dtype) -> bool:
    """Whether linear_cross_entropy's logits may be held for the backward in this dtype: not where
    products, and with them the logits, are widened."""
    return dtype == torch.float32 or not widens_products(dtype)


def available() -> str | None:
    """None when usable, else the reason."""
    return _extension.REASON


def isa() -> str:
    """The instruction set the kernels run on: scalar, avx2, avx512, avx512_bf16 or amx."""
    return str(torch.ops.llmops_cpu.isa_active())


def supports(call: Call) -> str | None:
    return _extension.REASON or serves(call)


def serves(call: Call) -> str | None:
    """None where there is a kernel for such a call, else why not."""
    if call.device != "cpu":
        return f"it serves CPU tensors, and these are on {call.device}"
    if call.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, and this is {call.dtype}"
    if call.op not in globals():
        return f"it has no {call.op}"
    for feature in _MISSING.get(call.op, ()):
        if feature in call.features:
            return f"its {call.op} has no {feature}"
    return None


def yields(call: Call) -> str | None:
    """Why another backend should serve a call that this one can serve: asked under "auto"."""
    if call.op != "linear":
        return None
    ahead = LINEAR_AHEAD[isa()].get(call.dtype, 0)
    rows = next((int(f.split()[2]) for f in call.features if f.startswith("at most")), ANY_ROWS)
    packs = rows > GRADIENT_ROWS and ahead == ANY_ROWS and isa() == "amx"
    if "weight dense in no dimension" in call.features or (
        "transposed weight" in call.features and not packs
    ):
        return "it would copy a weight that is not dense in its last dimension"
    if "autocast weight" in call.features:
        return "it would cast the weight in each call, which torch does once per autocast region"
    if rows <= ahead:
        return None
    dtype = str(call.dtype).removeprefix("torch.")
    only = f" beyond {ahead} rows of x" if ahead else ""
    return f"torch's own product is as fast in {dtype} on {isa()}{only}"


def describe(call: Call) -> str:
    return f"C++ {call.op} [{isa()}]"


if _extension.REASON is None:
    _raw = torch.ops.llmops_cpu
    softmax = _raw.softmax_fwd.default
    softmax_plain = _raw.softmax_fwd.plain
    softmax_bwd = _raw.softmax_bwd.default
    rope = _raw.rope.default
    rope_qk = _raw.rope_qk.default
    rope_qk_ = _raw.rope_qk_.default
    attention = _raw.attention_fwd.default
    attention_bwd = _raw.attention_bwd.default
    attention_varlen = _raw.attention_varlen_fwd.default
    attention_varlen_bwd = _raw.attention_varlen_bwd.default
    attention_kvcache = _raw.attention_kvcache.default
    kv_cache_append_ = _raw.kv_cache_append_.default
    merge_attention = _raw.merge_attention_fwd.default
    merge_attention_bwd = _raw.merge_attention_bwd.default
    rms_norm = _raw.rms_norm_fwd.default
    add_rms_norm = _raw.add_rms_norm_fwd.default
    rms_norm_bwd = _raw.rms_norm_bwd.default
    layer_norm = _raw.layer_norm_fwd.default
    layer_norm_plain = _raw.layer_norm_fwd.plain
    add_layer_norm = _raw.add_layer_norm_fwd.default
    layer_norm_bwd = _raw.layer_norm_bwd.default
    linear = _raw.linear.default
    matmul = _raw.matmul.default
    matmul_into = _raw.matmul_into.default
    gelu = _raw.gelu.default
    gelu_bwd = _raw.gelu_bwd.default
    swiglu = _raw.swiglu.default
    geglu = _raw.geglu.default
    glu_bwd = _raw.glu_bwd.default
    glu_bwd_fused = _raw.glu_bwd_fused.default
    cross_entropy = _raw.cross_entropy_fwd.default
    cross_entropy_bwd = _raw.cross_entropy_bwd.default
    cross_entropy_bwd_ = _raw.cross_entropy_bwd_.default
    embedding = _raw.embedding.default
    embedding_bwd = _raw.embedding_bwd.default
    sample = _raw.sample.default

    def linear_cross_entropy(*args: Any) -> _linear_cross_entropy.Sums:
        call, dtype = _linear_cross_entropy.Call(*args), args[0].dtype
        if dtype == torch.float32 or widens_products(dtype):
            return _linear_cross_entropy.sums_by_class(
                cross_entropy, cross_entropy_bwd_, call, _product_into
            )
        wide = isa() == "amx"
        return _linear_cross_entropy.sums(
            cross_entropy, cross_entropy_bwd_, call, _product_into, wide
        )

    def _product_into(
        a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False
    ) -> None:
        """By linear's table where it is such a product; of others the smallest of three sizes
        decides, as the number of rows does for gradients."""
        smallest, across = min(*a.shape, out.shape[1]), a.stride(1) != 1
        if out.dtype != a.dtype:
            ours = True
        elif a.dtype == torch.bfloat16:
            ours = across and own_weight_gradient(a.dtype, smallest)
        elif not add and not across and b.stride(0) == 1:
            ours = len(a) <= LINEAR_AHEAD[isa()].get(a.dtype, 0)
        else:
            ours = own_products(a.dtype) and smallest > GRADIENT_ROWS
        if ours:
            matmul_into(a, b, out, add, fp32_parts())
        else:
            _linear_cross_entropy.product_into(a, b, out, add)

    linear_cross_entropy_weight_gradient = functools.partial(
        _linear_cross_entropy.weight_gradient, into=_product_into
    )
