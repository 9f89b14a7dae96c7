"""Whole models: the reference GPT of llmops/model.py, on our operators and on plain PyTorch
(backend="reference"), the same random weights in both. Matrix products are torch's in both.

prefill: one prompt, logits of its last token. decode: one token after 256, and the limit is to read
all weights once. train: forward, loss and backward; the optimizer is the same on both sides and
left out. Tokens per second are tokens over the time. Flops: 2 per weight and token (the embedding
is a look-up, the tied head is not), and attention's 4 L H D T^2 / 2; training three times that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.bench.harness import Case
from llmops.model import GPT, GPTConfig

PROMPT, CACHED = 128, 256


def _configs(quick: bool) -> dict[str, GPTConfig]:
    if quick:
        # Two layers and a small vocabulary: the head alone would take the time of the rest.
        return {"GPT-2 width, 2 layers": GPTConfig(vocab_size=4096, n_layer=2)}
    smollm2 = GPTConfig(
        vocab_size=49152,
        n_layer=30,
        n_head=9,
        n_kv_head=3,
        d_model=576,
        d_ff=1536,
        position="rotary",
        norm="rms_norm",
        activation="swiglu",
        bias=False,
        rope_base=100000.0,
    )
    return {"GPT-2 124M": GPTConfig(), "SmolLM2 135M": smollm2}


def cases(quick: bool) -> Iterator[Case]:
    for name, config in _configs(quick).items():
        for dtype in (torch.float32, torch.bfloat16):
            model = GPT(config).to(dtype)
            for case in _cases(name, model, dtype):
                if quick and case.passes == "train" and dtype != torch.float32:
                    continue  # many seconds where torch has no fast bf16 product
                case.ours, case.torch = _on("auto", case.ours), _on("reference", case.torch)
                yield case


def _on(backend: str, call: Any) -> Any:
    def run() -> Any:
        with llmops.use_backend(backend):
            return call()

    return run


def _cases(name: str, model: GPT, dtype: torch.dtype) -> Iterator[Case]:
    c = model.config
    ids = torch.randint(c.vocab_size, (1, PROMPT + 1))
    weights = sum(p.numel() for p in model.blocks.parameters()) + c.vocab_size * c.d_model
    size = torch.finfo(dtype).bits // 8
    # Rounding differs at every layer; 16-bit logits of a random model differ in their last bits.
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    attended = 2 * c.n_layer * c.n_head * c.d_head * PROMPT**2
    cache = model.new_cache(1, CACHED + 1)
    for held in (*cache.keys, *cache.values):
        held.normal_()

    @torch.inference_mode()
    def prefill() -> Tensor:
        return model(ids[:, :PROMPT], last_only=True)

    @torch.inference_mode()
    def decode() -> Tensor:
        cache.reset()
        cache.extend(CACHED)
        return model(ids[:, :1], cache=cache, last_only=True)

    def train() -> tuple[Tensor, ...]:
        loss = model.loss(ids[:, :PROMPT], ids[:, 1:])
        return (loss, *torch.autograd.grad(loss, list(model.parameters())))

    head = c.vocab_size * c.d_model
    forward = 2 * (weights - head) * PROMPT + attended
    for passes, call, bytes, flops, of in (
        ("prefill", prefill, weights * size, forward + 2 * head, f"{PROMPT} tokens"),
        ("decode", decode, weights * size, 2 * weights, f"1 token after {CACHED}"),
        ("train", train, 3 * weights * size, 3 * (forward + 2 * head * PROMPT), f"1x{PROMPT}"),
    ):
        yield Case(
            "model",
            passes,
            dtype,
            f"{name}, {of}",
            call,
            call,
            bytes=bytes,
            flops=flops,
            tolerance=tolerance,
            torch_name="plain PyTorch",
            read_only=passes == "decode",
        )
