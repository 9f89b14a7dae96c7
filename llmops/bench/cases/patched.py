"""Models of transformers, patched (`llmops.patch`) beside themselves as they were, with the same
random weights: a prompt's forward, a training step (forward, loss and backward), a greedy
generation. The other side is transformers with its own default, torch's SDPA. None where
transformers is not installed.

Bytes and flops as in cases/model.py: the weights once per pass (forward, new token; three times in
training), 2 flops per weight and token, three times that in training.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops.bench.harness import Case, trains_slowly

PROMPT, NEW = 128, 8


def _models(quick: bool) -> Iterator[tuple[str, Any]]:
    import transformers as hf

    layers = 2 if quick else 6
    vocab = 4096 if quick else 32768
    llama = hf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    bert = hf.BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=12
    )
    gpt2 = hf.GPT2Config(vocab_size=vocab, n_layer=layers, bos_token_id=0, eos_token_id=0)
    yield f"Llama, {layers} layers", hf.LlamaForCausalLM(llama)
    yield f"GPT-2, {layers} layers", hf.GPT2LMHeadModel(gpt2)
    yield f"BERT, {layers} layers", hf.BertModel(bert, add_pooling_layer=False)


def cases(quick: bool) -> Iterator[Case]:
    if importlib.util.find_spec("transformers") is None:
        return
    for name, made in _models(quick):
        for dtype in (torch.float32, torch.bfloat16):
            if quick and dtype != torch.float32:
                continue  # many seconds where torch has no fast bf16 product
            plain = copy.deepcopy(made).to(dtype).eval()
            patched = copy.deepcopy(plain)
            llmops.patch(patched)
            yield from _cases(name, dtype, plain, patched)


def _cases(name: str, dtype: torch.dtype, plain: Any, patched: Any) -> Iterator[Case]:
    ids = torch.randint(3, 1000, (1, PROMPT))
    decoder = hasattr(plain, "lm_head")
    embedding = plain.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in plain.parameters())
    size = torch.finfo(dtype).bits // 8
    computed = weights if decoder else weights - embedding
    weigh = torch.randn(1, PROMPT, plain.config.hidden_size)

    def forward(model: Any) -> Any:
        def run() -> Tensor:
            with torch.inference_mode():
                return model(ids)[0]

        return run

    def train(model: Any) -> Any:
        parameters = list(model.parameters())

        def run() -> tuple[Tensor, ...]:
            if decoder:
                loss = model(ids, labels=ids).loss
            else:
                loss = (model(ids).last_hidden_state.float() * weigh).sum()
            return (loss, *torch.autograd.grad(loss, parameters, allow_unused=True))

        return run

    def generate(model: Any) -> Any:
        more = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}

        def run() -> Tensor:
            mask = torch.ones_like(ids[:, :1])
            return model.generate(ids[:, :1], attention_mask=mask, pad_token_id=0, **more)

        return run

    def likelihood(tokens: Tensor) -> Tensor:
        """Each new token's logit over the largest one: 1 where it is the likeliest, for either."""
        with torch.inference_mode():
            logits = copy.deepcopy(plain).float()(tokens[:, :-1]).logits
        return logits.gather(2, tokens[:, 1:, None])[..., 0] / logits.amax(-1)

    def together(results: tuple[Tensor, ...]) -> Tensor:
        """Loss and gradients in one: some gradients are zero but for rounding."""
        return torch.cat([r.flatten().float() for r in results if r is not None])

    evidence: dict[str, Any] = {"generate": likelihood, "train": together}
    passes = [("fwd", forward, 1, PROMPT)]
    if not trains_slowly(dtype):
        passes.append(("train", train, 3, PROMPT))
    if decoder:
        passes.append(("generate", generate, NEW, 1))
    for which, make, times, tokens in passes:
        yield Case(
            "patched",
            which,
            dtype,
            f"{name}, {NEW} tokens after 1" if which == "generate" else f"{name}, 1x{PROMPT}",
            make(patched),
            make(plain),
            bytes=times * weights * size,
            flops=times * 2 * computed * tokens,
            tolerance=1e-3 if dtype == torch.float32 else 0.1,
            torch_name="transformers",
            tokens=NEW if which == "generate" else PROMPT,
            model=name.split(",")[0],
            evidence=evidence.get(which),
        )
