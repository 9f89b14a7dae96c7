"""Whole models: the reference GPT of llmops/model.py, on our operators and on plain PyTorch
(backend="reference"), the same random weights in both.

prefill: one prompt, logits of its last token. decode: one token after 256, and the limit is to read
all weights once. train: forward, loss and backward; the optimizer is the same on both sides and
left out. generate: greedy, from one token on, so that every step is a decode step. With `--with
peers` all beside transformers (twin.py), generate beside llama.cpp and ctranslate2 (engines.py),
which can do nothing smaller. Tokens/s: the prompt's, one, the batch's, the new ones, over the time
of the call. model_long has the sizes at which people train, in minutes per row.

Flops: 2 per weight and token (the embedding is a look-up, the tied head is not), and attention's
4 L H D T^2 / 2; training three times that. Bytes: the weights once (prefill, decode), once per new
token (generate), three times (train: both passes read them, and their gradients are written).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.bench import engines
from llmops.bench.harness import Case, trains_slowly
from llmops.model import GPT, GPTConfig


@dataclass(frozen=True)
class Sizes:
    """Tokens of the prompt, rows of a training batch (as long as the prompt), tokens before the one
    that is decoded, tokens to generate."""

    prompt: int = 128
    batch: int = 1
    cached: int = 256
    new: int = 8


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


def cases(quick: bool, sizes: Sizes = Sizes()) -> Iterator[Case]:
    for name, config in _configs(quick).items():
        for dtype in (torch.float32, torch.bfloat16):
            model = GPT(config).to(dtype)
            twin = functools.cache(partial(_twin, model))
            for case in (
                *_cases(name, model, dtype, sizes, twin),
                _generation(name, model, dtype, sizes.new, twin),
            ):
                if case.passes == "train" and trains_slowly(dtype):
                    continue
                case.ours, case.torch = _on("auto", case.ours), _on("reference", case.torch)
                case.model = name.split()[0].rstrip(",")
                yield case


def _twin(model: GPT) -> Any:
    from llmops.bench.twin import Twin

    return Twin(model)


def _on(backend: str, call: Any) -> Any:
    def run() -> Any:
        with llmops.use_backend(backend):
            return call()

    return run


def _weights(model: GPT) -> tuple[int, int]:
    """Weights of the matrices, the head included, and bytes of one."""
    c = model.config
    weights = sum(p.numel() for p in model.blocks.parameters()) + c.vocab_size * c.d_model
    return weights, torch.finfo(model.tokens.dtype).bits // 8


def _cases(
    name: str, model: GPT, dtype: torch.dtype, sizes: Sizes, twin: Callable[[], Any]
) -> Iterator[Case]:
    c, prompt, rows, cached = model.config, sizes.prompt, sizes.batch, sizes.cached
    ids = torch.randint(c.vocab_size, (rows, prompt + 1))
    inputs, targets = ids[:, :prompt], ids[:, 1:]
    weights, size = _weights(model)
    # Rounding differs at every layer; 16-bit logits of a random model differ in their last bits.
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    attended = 2 * c.n_layer * c.n_head * c.d_head * prompt**2
    cache = model.new_cache(1, cached + 1)
    for held in (*cache.keys, *cache.values):
        held.normal_()

    @torch.inference_mode()
    def prefill() -> Tensor:
        return model(inputs[:1], last_only=True)

    @torch.inference_mode()
    def decode() -> Tensor:
        cache.reset()
        cache.extend(cached)
        return model(ids[:1, :1], cache=cache, last_only=True)

    def train() -> tuple[Tensor, ...]:
        loss = model.loss(inputs, targets)
        return (loss, *torch.autograd.grad(loss, list(model.parameters())))

    head = c.vocab_size * c.d_model
    forward = 2 * (weights - head) * prompt + attended
    whole = rows * (forward + 2 * head * prompt)
    peers: dict[str, Callable[[], Any]] = {
        "prefill": lambda: twin().prefill(inputs[:1]),
        "decode": lambda: twin().decode(ids[:1, :1], cache, cached),
        "train": lambda: twin().train(inputs, targets),
    }
    for passes, call, bytes, flops, of, tokens in (
        ("prefill", prefill, weights * size, forward + 2 * head, f"{prompt} tokens", prompt),
        ("decode", decode, weights * size, 2 * weights, f"1 token after {cached}", 1),
        ("train", train, 3 * weights * size, 3 * whole, f"{rows}x{prompt}", rows * prompt),
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
            peers={"transformers": peers[passes]},
        )


def _generation(
    name: str, model: GPT, dtype: torch.dtype, new: int, twin: Callable[[], Any]
) -> Case:
    ids = torch.tensor([[5]])
    weights, size = _weights(model)

    def generate() -> Any:
        return model.generate(ids, new, temperature=0.0)

    def likelihood(tokens: Tensor) -> Tensor:
        """Each new token's logit over the largest one, by plain PyTorch in fp32: 1 where it is the
        likeliest. Two that are equal to within rounding may come out either way."""
        if tokens.shape != (1, 1 + new):
            return tokens  # another shape than torch's: wrong
        plain = GPT(model.config).to(tokens.device)
        plain.load_state_dict(model.state_dict())
        with torch.inference_mode(), llmops.use_backend("reference"):
            logits = plain(tokens[:, :-1])  # [1, new, V]
        return logits.gather(2, tokens[:, 1:, None])[..., 0] / logits.amax(-1)

    return Case(
        "model",
        "generate",
        dtype,
        f"{name}, {new} tokens after 1",
        generate,
        generate,
        bytes=new * weights * size,
        flops=new * 2 * weights,
        tolerance=1e-3 if dtype == torch.float32 else 0.05,
        torch_name="plain PyTorch",
        read_only=True,
        tokens=new,
        evidence=likelihood,
        peers={
            "xllamacpp": partial(engines.xllamacpp, model, ids, new),
            "ctranslate2": partial(engines.ctranslate2, model, ids, new),
            "transformers": lambda: twin().generate(ids, new),
        },
    )
