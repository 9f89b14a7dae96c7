"""Code that imports flash_attn runs where there is none, a CPU included: the same functions, with
the same arguments, layouts and alignment.

-from flash_attn import flash_attn_func, flash_attn_varlen_func
+from llmops.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
"""

import torch

from llmops.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func

torch.manual_seed(0)
q = torch.randn(2, 64, 8, 32, requires_grad=True)  # [batch, tokens, heads, head dim]
k, v = torch.randn(2, 2, 64, 2, 32).unbind(0)  # grouped-query: two key/value heads
out = flash_attn_func(q, k, v, causal=True, window_size=(16, 0), softcap=30.0)
out.sum().backward()
print("dense:", tuple(out.shape), "gradient:", tuple(q.grad.shape))

# Three sequences of 5, 20 and 3 tokens side by side, without padding.
lengths = torch.tensor([0, 5, 25, 28], dtype=torch.int32)
packed = [torch.randn(28, heads, 32) for heads in (8, 2, 2)]
out = flash_attn_varlen_func(*packed, lengths, lengths, 20, 20, causal=True)
alone = flash_attn_func(*(x[None, 5:25] for x in packed), causal=True)
print("packed:", tuple(out.shape), "as alone:", torch.allclose(out[5:25], alone[0], atol=1e-5))
