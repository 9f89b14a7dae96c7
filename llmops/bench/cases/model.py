"""Whole models: the reference GPT of llmops/model.py, on our operators and on plain PyTorch
(backend="reference"), the same random weights in both.

prefill: one prompt, logits of its last token. decode: one token after 256, and the limit is to read
all weights once. train: forward, loss and backward; the optimizer is the same on both sides and
left out. generate: greedy, from one token on, so that every step is a decode step; with `--with
peers` beside llama.cpp and ctranslate2, which can do nothing smaller. Tokens/s: the prompt's, one,
the batch's, the new ones, over the time of the call.

Flops: 2 per weight and token (the embedding is a look-up, the tied head is not), and attention's
4 L H D T^2 / 2; training three times that. Bytes: the weights once (prefill, decode), once per new
token (generate), three times (train: both passes read them, and their gradients are written).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.bench import engines
from llmops.bench.harness import Case
from llmops.model import GPT, GPTConfig

PROMPT, CACHED, NEW = 128, 256, 8


def _configs(quick: bool) -> dict[str, GPTConfig]:
    # Quick: two layers and a small vocabulary: the head alone would take the time of the rest.
    short: dict[str, Any] = {"vocab_size": 4096, "n_layer": 2} if quick else {}
    llama: dict[str, Any] = {
        "vocab_size": 49152,
        "n_layer": 30,
        "n_head": 9,
        "n_kv_head": 3,
        "d_model": 576,
        "d_ff": 1536,
        "position": "rotary",
        "norm": "rms_norm",
        "activation": "swiglu",
        "bias": False,
        "rope_base": 100000.0,
    }
    of = ", 2 layers" if quick else ""
    return {
        f"GPT-2{of or ' 124M'}": GPTConfig(**short),
        f"SmolLM2{of or ' 135M'}": GPTConfig(**{**llama, **short}),
    }


def cases(quick: bool) -> Iterator[Case]:
    for name, config in _configs(quick).items():
        for dtype in (torch.float32, torch.bfloat16):
            model = GPT(config).to(dtype)
            for case in (*_cases(name, model, dtype), _generation(name, model, dtype)):
                if quick and case.passes == "train" and dtype != torch.float32:
                    continue  # many seconds where torch has no fast bf16 product
                case.ours, case.torch = _on("auto", case.ours), _on("reference", case.torch)
                case.model = name.split()[0].rstrip(",")
                yield case


def _on(backend: str, call: Any) -> Any:
    def run() -> Any:
        with llmops.use_backend(backend):
            return call()

    return run


def _sizes(model: GPT) -> tuple[int, int]:
    """Weights of the matrices, the head included, and bytes of one."""
    c = model.config
    weights = sum(p.numel() for p in model.blocks.parameters()) + c.vocab_size * c.d_model
    return weights, torch.finfo(model.tokens.dtype).bits // 8


def _cases(name: str, model: GPT, dtype: torch.dtype) -> Iterator[Case]:
    c = model.config
    ids = torch.randint(c.vocab_size, (1, PROMPT + 1))
    weights, size = _sizes(model)
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
    whole = forward + 2 * head * PROMPT
    for passes, call, bytes, flops, of, tokens in (
        ("prefill", prefill, weights * size, forward + 2 * head, f"{PROMPT} tokens", PROMPT),
        ("decode", decode, weights * size, 2 * weights, f"1 token after {CACHED}", 1),
        ("train", train, 3 * weights * size, 3 * whole, f"1x{PROMPT}", PROMPT),
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
            tokens=tokens,
        )


def _generation(name: str, model: GPT, dtype: torch.dtype) -> Case:
    ids = torch.tensor([[5]])
    weights, size = _sizes(model)

    def generate() -> Any:
        return model.generate(ids, NEW, temperature=0.0)

    def likelihood(tokens: Tensor) -> Tensor:
        """Each new token's logit over the largest one, by plain PyTorch in fp32: 1 where it is the
        likeliest. Two that are equal to within rounding may come out either way."""
        if tokens.shape != (1, 1 + NEW):
            return tokens  # another shape than torch's: wrong
        plain = GPT(model.config).to(tokens.device)
        plain.load_state_dict(model.state_dict())
        with torch.inference_mode(), llmops.use_backend("reference"):
            logits = plain(tokens[:, :-1])  # [1, NEW, V]
        return logits.gather(2, tokens[:, 1:, None])[..., 0] / logits.amax(-1)

    return Case(
        "model",
        "generate",
        dtype,
        f"{name}, {NEW} tokens after 1",
        generate,
        generate,
        bytes=NEW * weights * size,
        flops=NEW * 2 * weights,
        tolerance=1e-3 if dtype == torch.float32 else 0.05,
        torch_name="plain PyTorch",
        read_only=True,
        tokens=NEW,
        evidence=likelihood,
        peers={
            "xllamacpp": partial(engines.xllamacpp, model, ids, NEW),
            "ctranslate2": partial(engines.ctranslate2, model, ids, NEW),
        },
    )
