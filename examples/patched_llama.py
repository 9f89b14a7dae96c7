"""A transformers Llama on llmops: what a patch changes, the same text, tokens per second.

python examples/patched_llama.py            # small random weights
python examples/patched_llama.py PATH       # a checkpoint of yours
"""

import sys
import time

import torch
import transformers

import llmops


def load() -> transformers.PreTrainedModel:
    if len(sys.argv) > 1:
        return transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def generate(model: transformers.PreTrainedModel) -> tuple[torch.Tensor, float]:
    prompt = torch.arange(3, 35)[None]
    start = time.perf_counter()
    ids = model.generate(prompt, do_sample=False, min_new_tokens=32, max_new_tokens=32)
    return ids, 32 / (time.perf_counter() - start)


model = load()
llmops.patch(model, dry_run=True)  # prints what would change, and the gain of each part here
generate(model)  # warm up
before, slow = generate(model)
llmops.patch(model)
generate(model)
after, fast = generate(model)
print(
    f"{slow:.0f} tokens/s before, {fast:.0f} after; the same tokens: {torch.equal(before, after)}"
)
llmops.unpatch(model)
