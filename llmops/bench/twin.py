"""transformers' own model with the weights of our reference GPT, GPT-2 or Llama shaped, as a
provider of cases/model.py: what its users run today. Its attention is its default, torch's SDPA.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmops import pretrained
from llmops.bench.harness import Call
from llmops.kv_cache import KVCache
from llmops.model import GPT


class Twin:
    """The model and its calls; each does what cases/model.py does with ours."""

    def __init__(self, model: GPT) -> None:
        self.ours = model
        self.gpt2 = model.config.norm == "layer_norm"
        self.recipes = pretrained.recipes(model, "gpt2" if self.gpt2 else "llama")
        self.model = self._made().to(model.tokens.dtype).eval()
        base = "transformer." if self.gpt2 else "model."
        self.parameters = {n.removeprefix(base): p for n, p in self.model.named_parameters()}
        with torch.no_grad():
            for name, parts in self._parts():
                source = model.get_parameter(name)
                for part, rows in zip(parts, source.split([len(p) for p in parts]), strict=True):
                    part.copy_(rows)

    def _made(self) -> Any:
        hf: Any = importlib.import_module("transformers")
        c = self.ours.config
        common = {"vocab_size": c.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
        if self.gpt2:
            sizes = {"n_positions": c.block_size, "n_embd": c.d_model, "n_layer": c.n_layer}
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            config = hf.GPT2Config(
                **common, **sizes, **dropout, n_head=c.n_head, layer_norm_epsilon=c.norm_eps
            )
            return hf.GPT2LMHeadModel(config)
        config = hf.LlamaConfig(
            **common,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            max_position_embeddings=c.block_size,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
            tie_word_embeddings=c.tie_head,
        )
        return hf.LlamaForCausalLM(config)

    def _parts(self, of: dict[str, Tensor] | None = None) -> Iterator[tuple[str, list[Tensor]]]:
        """Each parameter of ours with the tensors that make it up, turned as ours are; `of`: by
        their names, its parameters when None."""
        of = dict(self.parameters) if of is None else of
        for name, parts in self.recipes.items():
            yield (
                name,
                [
                    of[p].t() if self.gpt2 and ".c_" in p and of[p].dim() == 2 else of[p]
                    for p in parts
                ],
            )

    def prefill(self, ids: Tensor) -> Call:
        @torch.inference_mode()
        def call() -> Tensor:
            return self.model(ids, use_cache=False, logits_to_keep=1).logits

        return call

    def decode(self, ids: Tensor, cache: KVCache, cached: int) -> Call:
        """One token after those that our cache holds."""
        hf: Any = importlib.import_module("transformers")
        held = hf.DynamicCache()
        for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
            held.update(k[:, :, :cached].clone(), v[:, :, :cached].clone(), layer)

        @torch.inference_mode()
        def call() -> Tensor:
            out = self.model(ids, past_key_values=held, use_cache=True, logits_to_keep=1)
            held.crop(-1)  # a negative number is that of tokens to drop
            return out.logits

        return call

    def train(self, ids: Tensor, targets: Tensor) -> Call:
        def call() -> tuple[Tensor, ...]:
            logits = self.model(ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            return (loss, *torch.autograd.grad(loss, list(self.parameters.values())))

        def comparable(results: Any) -> list[Tensor]:
            loss, *gradients = results
            of = dict(zip(self.parameters, gradients, strict=True))
            whole = {name: torch.cat(parts) for name, parts in self._parts(of)}
            return [loss, *(whole[name] for name, _ in self.ours.named_parameters())]

        call.__dict__["comparable"] = comparable
        return call

    def generate(self, ids: Tensor, new: int) -> Call:
        more = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}

        def call() -> Tensor:
            mask = torch.ones_like(ids)
            return self.model.generate(ids, attention_mask=mask, pad_token_id=0, **more)

        return call
