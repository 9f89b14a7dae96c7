"""Engines that generate with whole models of their own file formats: llama.cpp (xllamacpp) and
ctranslate2, as providers of cases/model.py's generation.

Both get the weights of our reference GPT, GPT-2 or Llama shaped, through a file in a temporary
folder: in the model's dtype, unquantized, so that all providers read as many bytes per token. A
token 7 is spelled "t7", since no text is involved. Each call is greedy, from prompt to last token.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.bench.harness import Call
from llmops.bench.peers import Absent
from llmops.model import GPT


def _spelled(model: GPT) -> list[str]:
    return [f"t{i}" for i in range(model.config.vocab_size)]


# ---- llama.cpp -----------------------------------------------------------------------------------


def xllamacpp(model: GPT, ids: Tensor, new: int) -> Call:
    """Through the engine's completion handler, without HTTP; nothing is kept between calls."""
    engine = importlib.import_module("xllamacpp")
    prompt, threads = ids[0].tolist(), torch.get_num_threads()
    params = engine.CommonParams()
    params.n_ctx, params.n_parallel = len(prompt) + new + 8, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.verbosity = 0, -1
    params.fit_params = params.warmup = params.cache_prompt = False
    with tempfile.TemporaryDirectory() as folder:  # mapped once it is loaded
        file = Path(folder) / "model.gguf"
        _write_gguf(model, file)
        params.model.path = str(file)
        server = engine.Server(params)
    request = {
        "prompt": prompt,
        "n_predict": new,
        "samplers": ["top_k"],
        "top_k": 1,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def call() -> Tensor:
        text = server.handle_completions(request)["choices"][0]["text"]
        return torch.tensor([[*prompt, *(int(t) for t in text.split("t")[1:])]])

    return call


def _write_gguf(model: GPT, file: Path) -> None:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise Absent("its models are written with gguf: pip install gguf") from None
    c = model.config
    llama = c.norm == "rms_norm"
    writer = gguf.GGUFWriter(file, "llama" if llama else "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head)
    writer.add_vocab_size(c.vocab_size)
    if llama:
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_base)
        writer.add_rope_dimension_count(c.d_head)
    else:
        writer.add_layer_norm_eps(c.norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_spelled(model))
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_token_types([1] * c.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in _gguf_tensors(model):
        tensor = tensor.detach().contiguous()
        if tensor.dim() == 1 or tensor.dtype == torch.float32:  # vectors are fp32 in llama.cpp
            writer.add_tensor(name, tensor.float().numpy())
        else:
            kind = "BF16" if tensor.dtype == torch.bfloat16 else "F16"
            raw = tensor.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    c = model.config
    yield "token_embd.weight", model.tokens
    if model.positions is not None:
        yield "position_embd.weight", model.positions
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        layers: dict[str, Any] = {
            "attn_norm": block.norm_1,
            "attn_output": block.attention.out,
            "ffn_norm": block.norm_2,
            "ffn_down": block.mlp.down,
        }
        if c.activation != "swiglu":
            layers |= {"attn_qkv": block.attention.qkv, "ffn_up": block.mlp.up}
        for name, layer in layers.items():
            yield f"blk.{i}.{name}.weight", layer.weight
            if layer.bias is not None:
                yield f"blk.{i}.{name}.bias", layer.bias
        if c.activation == "swiglu":
            sizes = [c.n_head * c.d_head] + [c.n_kv_head * c.d_head] * 2
            q, k, v = block.attention.qkv.weight.split(sizes)
            gate, up = block.mlp.up.weight.chunk(2)
            turned = {"attn_q": _paired(q, c.d_head), "attn_k": _paired(k, c.d_head), "attn_v": v}
            for name, weight in {**turned, "ffn_gate": gate, "ffn_up": up}.items():
                yield f"blk.{i}.{name}.weight", weight
    yield "output_norm.weight", model.norm.weight
    if model.norm.bias is not None:
        yield "output_norm.bias", model.norm.bias


def _paired(weight: Tensor, head_dim: int) -> Tensor:
    """Rows as llama.cpp turns them: neighbours, where ours turns the halves of a head."""
    halves = weight.view(-1, 2, head_dim // 2, weight.size(1))
    return halves.transpose(1, 2).reshape(weight.shape)


# ---- ctranslate2 ---------------------------------------------------------------------------------


def ctranslate2(model: GPT, ids: Tensor, new: int) -> Call:
    engine = importlib.import_module("ctranslate2")
    kind = str(model.tokens.dtype).removeprefix("torch.")
    usable = engine.get_supported_compute_types("cpu")
    if kind not in usable:
        raise Absent(f"computes in {', '.join(sorted(usable))} on this processor, not in {kind}")
    with tempfile.TemporaryDirectory() as folder:  # it reads all of it
        _ctranslate2_spec(model).save(folder)
        generator = engine.Generator(
            folder,
            device="cpu",
            compute_type=kind,
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )
    words = [f"t{i}" for i in ids[0].tolist()]

    def call() -> Tensor:
        (result,) = generator.generate_batch(
            [words],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
        )
        return torch.cat((ids, torch.tensor(result.sequences_ids)), 1)

    return call


def _ctranslate2_spec(model: GPT) -> Any:
    specs = importlib.import_module("ctranslate2.specs")
    common = importlib.import_module("ctranslate2.specs.common_spec")
    c = model.config
    llama = c.norm == "rms_norm"
    if llama:
        options = {
            "activation": common.Activation.SWISH,
            "ffn_glu": True,
            "rms_norm": True,
            "rotary_dim": 0,  # all of the head
            "rotary_interleave": False,
            "rotary_base": c.rope_base,
            "num_heads_kv": None if c.n_kv_head == c.n_head else c.n_kv_head,
        }
    else:
        options = {"activation": common.Activation.GELUTanh}
    spec = specs.TransformerDecoderModelSpec.from_config(
        c.n_layer, c.n_head, pre_norm=True, **options
    )

    def numpy(tensor: Tensor) -> Any:
        return tensor.detach().float().numpy()  # converted back by optimize()

    def norm(target: Any, layer: Any) -> None:
        target.gamma = numpy(layer.weight)
        if layer.bias is not None:
            target.beta = numpy(layer.bias)

    def linear(target: Any, weight: Tensor, bias: Tensor | None) -> None:
        target.weight = numpy(weight)
        if bias is not None:
            target.bias = numpy(bias)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = numpy(model.tokens)
    if model.positions is not None:
        decoder.position_encodings.encodings = numpy(model.positions)
    norm(decoder.layer_norm, model.norm)
    blocks: Any = model.blocks
    for target, block in zip(decoder.layer, blocks, strict=True):
        attention, mlp = block.attention, block.mlp
        norm(target.self_attention.layer_norm, block.norm_1)
        norm(target.ffn.layer_norm, block.norm_2)
        linear(target.self_attention.linear[0], attention.qkv.weight, attention.qkv.bias)
        linear(target.self_attention.linear[1], attention.out.weight, attention.out.bias)
        if llama:
            gate, up = mlp.up.weight.chunk(2)
            linear(target.ffn.linear_0, gate, None)
            linear(target.ffn.linear_0_noact, up, None)
        else:
            linear(target.ffn.linear_0, mlp.up.weight, mlp.up.bias)
        linear(target.ffn.linear_1, mlp.down.weight, mlp.down.bias)
    spec.register_vocabulary(_spelled(model))
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "t1", "t2", "t0"
    spec.config.layer_norm_epsilon = c.norm_eps
    spec.validate()
    spec.optimize(quantization=str(model.tokens.dtype).removeprefix("torch."))
    return spec
