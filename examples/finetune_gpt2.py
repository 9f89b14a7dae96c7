"""A transformers GPT-2, patched, learns a text: Python's own documentation, with no download.

python examples/finetune_gpt2.py            # a small model from random weights; bytes as tokens
"""

from pydoc_data import topics

import torch
import transformers

import llmops

torch.manual_seed(0)
text = torch.tensor(list("\n".join(topics.topics.values()).encode()[:200_000]))
config = transformers.GPT2Config(
    vocab_size=256, n_positions=128, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
)
model = transformers.GPT2LMHeadModel(config)
report = llmops.patch(model)
print(f"{len(report.replaced)} modules on llmops, dropout and all")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
first = last = 0.0
for step in range(40):
    starts = torch.randint(len(text) - 65, (8,))
    batch = torch.stack([text[s : s + 64] for s in starts])
    loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    first, last = first or loss.item(), loss.item()
    if step % 10 == 0:
        print(f"step {step:2d}: loss {loss.item():.2f}")
print(f"loss {first:.2f} at first, {last:.2f} at last")
llmops.unpatch(model)  # the checkpoint is transformers' own, patched or not
