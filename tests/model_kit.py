"""What the model tests share: small configurations, the real model, real English, transformers."""

import dataclasses
import functools
import importlib

import pytest
import torch

from llmops.model import GPT, GPTConfig

SHAPE = {"vocab_size": 97, "block_size": 64, "n_layer": 3, "n_head": 4, "d_model": 32}
GPT2 = GPTConfig(**SHAPE)
LLAMA = GPTConfig(
    **SHAPE,
    n_kv_head=2,
    d_ff=48,
    position="rotary",
    norm="rms_norm",
    activation="swiglu",
    bias=False,
    tie_head=False,
)
CONFIGS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    # every choice away from the company it usually keeps
    "mixed": GPTConfig(
        **SHAPE, n_kv_head=1, d_head=6, position="rotary", activation="gelu", tie_head=False
    ),
    "learned-rms": GPTConfig(**SHAPE, norm="rms_norm", activation="swiglu", bias=True),
}


def need(package: str, pip: str | None = None):
    """The package, or a failed test that says how to install it: a skip would hide the hole."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        pytest.fail(f"{error}; pip install {pip or package}", pytrace=False)


def small(config: GPTConfig, seed: int = 0, **changes) -> GPT:
    """A random model whose weights are large enough that every part matters to the logits."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(config, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=0.02 if name == "positions" else 0.15)
    return model


@functools.cache
def smollm2(dtype: torch.dtype = torch.float32) -> GPT:
    return GPT.from_pretrained("smollm2-135m", dtype=dtype)


@functools.cache
def smollm2_tokenizer():
    from llmops.tokenizer import load_tokenizer

    return load_tokenizer("smollm2-135m")


@functools.cache
def smollm2_transformers():
    """transformers' LlamaForCausalLM with the weights of the same GGUF, taken from the file by a
    few lines of its own, not by the code under test."""
    transformers, gguf = need("transformers"), need("gguf")
    from llmops.pretrained import find

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in gguf.GGUFReader(find("smollm2-135m")).tensors:
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        *block, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):  # row 2 i + s of a head of 64 is row 32 s + i there
            rows = torch.arange(64).view(2, 32)
            order = (
                torch.arange(0, weight.size(0), 64)[:, None]
                + (2 * (rows % 32) + rows // 32).flatten()
            )
            weight = weight[order.flatten()]
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{names[part]}.weight"] = weight
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model.float().eval()


@functools.cache
def english(tokens: int) -> torch.Tensor:
    """[tokens] ids of real English that every Python carries: its own help topics."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(smollm2_tokenizer().encode(text[: 8 * tokens])[:tokens])
