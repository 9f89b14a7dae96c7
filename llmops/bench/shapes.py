"""The sizes of real models that the cases take their shapes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Per layer: `heads` query and `kv_heads` key/value heads of `head_dim`, an MLP `hidden` wide."""

    name: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int


GPT2 = Model("GPT-2", 768, 12, 12, 64, 3072, 50257)  # 124M
BERT = Model("BERT", 768, 12, 12, 64, 3072, 30522)  # base
SMOLLM2 = Model("SmolLM2", 576, 9, 3, 64, 1536, 49152)  # 135M
GEMMA = Model("Gemma", 2304, 8, 4, 256, 9216, 256000)  # 2, 2B
LLAMA = Model("Llama-3", 4096, 32, 8, 128, 14336, 128256)  # 8B

TOKENS = 512  # of a prompt, where a case says no other number
