"""flash-attn's functions, argument for argument, on llmops' operators: on a CPU as well.

    import torch
    from llmops.integrations.flash_attn import flash_attn_func  # instead of: from flash_attn import

    q, k, v = (torch.randn(2, 128, heads, 64) for heads in (8, 2, 2))  # [B, T, H, D]
    out = flash_attn_func(q, k, v, causal=True, window_size=(63, 0), softcap=30.0)

Matched: flash-attn 2.8 (2.8.0 to 2.8.4), `flash_attn_interface.py` and `layers/rotary.py`: names,
order, defaults, layout, bottom-right alignment, forms of the results. Each function's docstring has
what is particular to it. For all of them:

Args:
    q, k, v: [B, T, H, D], fp32/bf16/fp16, any strides; fewer key/value heads than query heads are
        grouped-query attention (query head h reads key head h // (Hq // Hkv)).
    dropout_p: probability, from torch's default generator.
    softmax_scale: of the scores; 1/sqrt(D) when None.
    causal: query i sees keys up to i + Tk - Tq.
    window_size: (left, right), -1 unbounded: query i sees keys from i + Tk - Tq - left to
        i + Tk - Tq + right, both included.
    softcap: c, scores become c tanh(score / c); 0.0 is none.
    alibi_slopes: [H] or [B, H]: adds -slope * |i + Tk - Tq - j|.
    deterministic: either value gives the deterministic backward; there is no other here.
    return_attn_probs: return (out, softmax_lse, S_dmask). softmax_lse is [B, H, Tq] fp32; S_dmask
        is [B, H, Tq, Tk] with dropout, the weights before dropout, negative where dropped, and
        empty without, as upstream's.

Beyond upstream: fp32, any head dim up to 512, pages of any size, left padding of a paged cache,
softcap together with dropout, a differentiable softmax_lse. Apart from it: softmax_lse is that of
the scores as documented above, so that a row which sees no key has -inf (upstream's kernels write
+inf) and causal ALiBi carries no shift per row (there it does). Which weights are dropped follows
llmops' random numbers. An argument that cannot be honoured raises, naming it; none is ignored.
The backend is chosen by `llmops.use_backend` or LLMOPS_BACKEND.
"""

from llmops.integrations.flash_attn.attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from llmops.integrations.flash_attn.kvcache import flash_attn_with_kvcache
from llmops.integrations.flash_attn.rotary import apply_rotary_emb
from llmops.integrations.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
