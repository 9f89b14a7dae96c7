"""The reference GPT: cached and batched generation equal the plain forward, training equals plain
PyTorch and transformers, and the operators are what runs."""

import dataclasses
import itertools
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from model_kit import (
    CONFIGS,
    GPT2,
    LLAMA,
    english,
    need,
    small,
    smollm2,
    smollm2_tokenizer,
)

import llmops
from llmops.model import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
ids_2x9 = torch.arange(18).view(2, 9) * 5 % 97


# ---- the model as a function -----------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_model_matches_reference(name):
    ours, plain = small(CONFIGS[name]), small(CONFIGS[name], backend="reference")
    torch.testing.assert_close(ours(ids_2x9), plain(ids_2x9), rtol=1e-4, atol=1e-5)
    with llmops.use_backend("reference"):
        assert torch.equal(ours(ids_2x9), plain(ids_2x9))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_model_is_causal(name):
    model, changed = small(CONFIGS[name]), ids_2x9.clone()
    changed[:, 5] += 1
    a, b = model(ids_2x9), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert ((a - b)[:, 5:].abs().amax(-1) > 1e-3).all(), "every later position sees token 5"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [(9,), (1,) * 9, (4, 1, 3, 1)], ids=str)
@torch.inference_mode()
def test_cache_matches_no_cache(name, steps):
    model = small(CONFIGS[name])
    cache = model.new_cache(2, 9)
    logits = [model(part, cache=cache) for part in ids_2x9.split(steps, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids_2x9), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="KVCache: it holds 9 of 9 tokens, 1 more do not fit"):
        model(ids_2x9[:, :1], cache=cache)


@torch.inference_mode()
def test_smollm2_cache_matches_no_cache():
    ids = english(96)[None]
    cache = smollm2().new_cache(1, 96)
    logits = [smollm2()(part, cache=cache) for part in ids.split((64, *(1,) * 8, 24), 1)]
    torch.testing.assert_close(torch.cat(logits, 1), smollm2()(ids), rtol=1e-4, atol=1e-3)


def test_loss_ignores_masked_targets():
    model, targets = small(LLAMA), ids_2x9.roll(-1, 1)
    targets[:, -1] = -100
    logits = model(ids_2x9)[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), ids_2x9[:, 1:].flatten())
    torch.testing.assert_close(model.loss(ids_2x9, targets), expected.float())


def test_loss_of_bf16_logits_is_fp32():
    """Of logits as bf16 holds them, or never rounded where their product is done in fp32."""
    model = small(LLAMA).bfloat16()
    wide = model._hidden(ids_2x9).double() @ model._head_weight().double().t()
    got = model.loss(ids_2x9, ids_2x9).detach()
    assert got.dtype == torch.float32
    expected = [
        F.cross_entropy(logits.double().flatten(0, 1), ids_2x9.flatten())
        for logits in (model(ids_2x9), wide)
    ]
    assert min(abs(float(got - e)) for e in expected) < 1e-5


def test_position_tables_stay_fp32():
    model = small(LLAMA)
    before = model.cos.clone()
    model.to(torch.bfloat16)
    assert model.tokens.dtype == torch.bfloat16 and torch.equal(model.cos, before)
    assert "cos" not in model.state_dict()
    assert model.to("meta").cos.is_meta, "they follow the device"


def test_initial_loss_is_that_of_a_uniform_guess():
    for config in CONFIGS.values():
        torch.manual_seed(0)
        loss = GPT(config).loss(ids_2x9, ids_2x9 + 1).item()
        assert abs(loss - math.log(97)) < 0.1


def test_residual_starts_at_the_same_size_at_any_depth():
    """2 L projections add to it, so each has 1/sqrt(2 L) of the other weights' deviation."""
    block = GPT(dataclasses.replace(GPT2, n_layer=8)).blocks[3]
    for weight, std in (
        (block.attention.qkv.weight, 0.02),
        (block.attention.out.weight, 0.005),
        (block.mlp.down.weight, 0.005),
    ):
        assert abs(weight.std().item() / std - 1) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "alibi"}, "position must be one of learned, rotary, got 'alibi'"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"n_head": 5}, "d_model 32 is not a multiple of n_head 5"),
        ({"n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"d_head": 7, "position": "rotary"}, "d_head must be even, got 7"),
        ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
    ],
)
def test_config_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**({"n_head": 4, "d_model": 32} | changes))


def test_model_rejects_bad_ids():
    model = small(GPT2)
    with pytest.raises(ValueError, match=r"ids must be \[B, T\] integers, got \(9,\) torch.int64"):
        model(ids_2x9[0])
    with pytest.raises(ValueError, match=r"got \(2, 9\) torch.float32"):
        model(ids_2x9.float())
    with pytest.raises(ValueError, match="65 tokens do not fit block_size 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises((IndexError, ValueError, RuntimeError), match=r"97|out of range"):
        model(torch.tensor([[97]]))
    cache = model.new_cache(2, 9)
    with pytest.raises(ValueError, match=r"use it in torch.inference_mode\(\)"):
        model(ids_2x9, cache=cache)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_model_compiles_fullgraph(name):
    model = small(CONFIGS[name])
    model.loss(ids_2x9, ids_2x9 + 1).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids_2x9), model(ids_2x9))
    torch.compile(model.loss, fullgraph=True, backend="aot_eager")(ids_2x9, ids_2x9 + 1).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


# ---- generation --------------------------------------------------------------------------------


@torch.inference_mode()
def _greedy_by_forward(model: GPT, ids: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_greedy_matches_forward(name):
    model = small(CONFIGS[name])
    out = model.generate(ids_2x9, max_new_tokens=20, temperature=0.0)
    assert torch.equal(out, _greedy_by_forward(model, ids_2x9, 20))
    assert torch.equal(out, model.generate(ids_2x9, max_new_tokens=20, temperature=0.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_unequal_prompts_match_each_alone(name):
    model = small(CONFIGS[name])
    prompts = [[5], list(range(1, 12)), [7, 7, 7], list(range(40, 51))]
    together = model.generate(prompts, max_new_tokens=20, temperature=0.0)
    for prompt, out in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=20, temperature=0.0)
        assert out.tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_padding_changes_no_logits(name):
    model, short = small(CONFIGS[name]), ids_2x9[1, 4:]
    cache = model.new_cache(2, 9)
    cache.pad_left(torch.tensor([0, 4]))
    padded = torch.stack((ids_2x9[0], F.pad(short, (4, 0), value=96)))
    logits = model(padded, cache=cache)
    torch.testing.assert_close(logits[0], model(ids_2x9)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1, 4:], model(short[None])[0], rtol=1e-4, atol=1e-5)


def test_smollm2_unequal_prompts_match_each_alone():
    tokenizer = smollm2_tokenizer()
    texts = ("Hello", "The three primary colours are", "import torch\n\n\ndef main():\n    x =")
    prompts = [tokenizer.encode(text) for text in texts]
    together = smollm2().generate(prompts, max_new_tokens=12, temperature=0.0)
    for prompt, out in zip(prompts, together, strict=True):
        alone = smollm2().generate(torch.tensor([prompt]), max_new_tokens=12, temperature=0.0)
        assert out.tolist() == alone[0].tolist()


def test_generate_samples_as_asked():
    model = small(LLAMA)
    model.head.weight.data *= 0.3  # a flat distribution

    def draw(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids_2x9, max_new_tokens=30, generator=generator, **settings)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    greedy = model.generate(ids_2x9, max_new_tokens=30, temperature=0.0)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert torch.equal(draw(3, **settings), greedy), settings
    out = draw(4, top_k=3)
    with torch.inference_mode():
        best = model(out[:, :-1]).topk(3, -1).indices[:, 8:]
    assert (best == out[:, 9:, None]).any(-1).all(), "every token is one of the three likeliest"
    assert not torch.equal(out, draw(4))


# Kernels of one step: once, and once per layer.
CACHED = "attention_kvcache kv_cache_append_"
KERNELS = {
    "gpt2": ("embedding layer_norm sample", f"{CACHED} add_layer_norm add_layer_norm gelu"),
    "llama": ("embedding rms_norm sample", f"{CACHED} add_rms_norm add_rms_norm rope_qk_ swiglu"),
}
# What stands for an operator of ours in torch; linear, views and copies are the model's own.
PLAIN = re.compile(
    "softmax|attention|norm|gelu|silu|sigmoid|tanh|exp$|pow|rsqrt|mean|cos|sin|embed"
)
PLAIN_SAMPLING = re.compile("index|gather|sort|topk|multinomial|argmax|cumsum")


@pytest.mark.parametrize("prompts", [ids_2x9, [[5], [1, 2, 3]]], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", KERNELS)
def test_generate_runs_on_our_kernels(name, prompts):
    """Counted by torch's profiler, which sees every operator that runs, ours under torch or not."""
    model, steps, layers = small(CONFIGS[name]), 5, CONFIGS[name].n_layer

    def run() -> Counter:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.generate(prompts, steps, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)
        return Counter({event.key: event.count for event in profile.key_averages()})

    run()  # the first call also asks which instruction set there is
    seen = run()
    once, per_layer = (Counter(names.split()) for names in KERNELS[name])
    expected = {k: steps * (once[k] + layers * per_layer[k]) for k in once + per_layer}
    ours = {k: n for k, n in seen.items() if k.startswith("llmops_cpu::")}
    # A product is ours or torch's, whichever the table of llmops.linear says for its rows.
    products = ours.pop("llmops_cpu::linear", 0)
    assert products + seen["aten::linear"] == steps * (4 * layers + 1)
    weight = torch.ones(1, 1)
    decode_is_ours = llmops.explain("linear", weight, weight).backend == "cpu"
    assert (products >= (steps - 1) * (4 * layers + 1)) == decode_is_ours
    assert {k.split("::")[1].removesuffix("_fwd"): n for k, n in ours.items()} == expected
    torchs = [k for k in seen if k.startswith("aten::")]
    assert not [k for k in torchs if PLAIN.search(k) or PLAIN_SAMPLING.search(k)]
    with llmops.use_backend("reference"):
        plain = run()
    assert not [k for k in plain if k.startswith("llmops_cpu::")]
    assert {"aten::softmax", "aten::embedding", "aten::rsqrt"} <= plain.keys()


def test_generate_stops_at_eos():
    model = small(LLAMA)
    free = model.generate(ids_2x9, max_new_tokens=30, temperature=0.0)[:, 9:]
    # a token that ends row 0 before row 1, and one that nobody makes
    first = {int(t): free[0].tolist().index(int(t)) for t in free[0]}
    eos, at = next((t, i) for t, i in first.items() if t not in free[1, : i + 1] and i > 0)
    out = model.generate(ids_2x9, max_new_tokens=30, temperature=0.0, eos_id=eos)[:, 9:]
    assert out[0, : at + 1].tolist() == free[0, : at + 1].tolist()
    assert (out[0, at:] == eos).all()
    ends = [row.index(eos) if eos in row else 29 for row in free.tolist()]
    assert out.shape[1] == max(ends) + 1
    listed = model.generate(list(ids_2x9), max_new_tokens=30, temperature=0.0, eos_id=eos)
    assert [len(row) for row in listed] == [9 + end + 1 for end in ends]
    never = (set(range(97)) - set(free.flatten().tolist())).pop()
    assert model.generate(ids_2x9, 30, temperature=0.0, eos_id=never).shape == (2, 39)


def test_generate_stream_gives_the_same_tokens():
    model = small(GPT2)
    out = model.generate(ids_2x9, max_new_tokens=6, temperature=0.0)
    stream = model.generate_stream(ids_2x9, 20, temperature=0.0)
    assert torch.equal(torch.stack(list(itertools.islice(stream, 6)), 1), out[:, 9:])


def test_generated_tokens_can_be_trained_on():
    model = small(LLAMA)
    out = model.generate(ids_2x9, max_new_tokens=4)
    model.loss(out[:, :-1], out[:, 1:]).backward()
    streamed = torch.stack(list(model.generate_stream(ids_2x9, 4)), 1)
    model.loss(streamed[:, :-1], streamed[:, 1:]).backward()


def test_generate_edges():
    model = small(LLAMA)
    assert torch.equal(model.generate(ids_2x9, max_new_tokens=0), ids_2x9)
    assert model.generate(ids_2x9, max_new_tokens=55).shape == (2, 64)  # the whole block
    assert model.generate(ids_2x9.int(), max_new_tokens=2).dtype == torch.int32
    for call, message in (
        (
            lambda: model.generate(ids_2x9, 56),
            r"from 0 to 55 \(block_size 64 less the longest prompt, 9\), got 56",
        ),
        (lambda: model.generate(ids_2x9, -1), r"must be from 0 to 55 .*got -1"),
        (lambda: model.generate(ids_2x9[:, :0], 1), "at least one token id"),
        (lambda: model.generate([], 1), "no prompts"),
        (lambda: model.generate(ids_2x9[0], 1), r"pass ids\[None\]"),
        (lambda: model.generate(ids_2x9.float(), 1), r"got \(9,\) torch.float32"),
        (lambda: model.generate(ids_2x9, 1, temperature=-1.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- training ------------------------------------------------------------------------------------


def _train(model, loss, steps: int = 5) -> list[tuple[float, float]]:
    """(loss, global gradient norm) of AdamW steps on one batch. The large eps keeps elements whose
    gradient is rounding noise, such as key biases, from moving by a full step in either sense."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seen.append((value.item(), norm.item()))
        optimizer.step()
    return seen


def _check_same_training(ours, theirs, seen, expected, start):
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-4, atol=0)
    assert seen[-1][0] < seen[0][0] - 0.5, "it learned, so the weights moved"
    for name, weight in ours.items():
        moved = (theirs[name] - start[name]).norm()
        assert moved > 0, name
        assert (weight - theirs[name]).norm() < 1e-3 * moved, name


@pytest.mark.parametrize("name", CONFIGS)
def test_training_matches_plain_pytorch(name):
    ids = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(1))

    def loss(model):
        return model.loss(ids[:, :-1], ids[:, 1:])

    ours, plain = small(CONFIGS[name]), small(CONFIGS[name], backend="reference")
    start = small(CONFIGS[name]).state_dict()
    seen, expected = _train(ours, loss), _train(plain, loss)
    _check_same_training(ours.state_dict(), plain.state_dict(), seen, expected, start)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_training_matches_transformers(kind, tmp_path):
    transformers = need("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(
            vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, **dropout
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    config.initializer_range = 0.15
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    start = GPT.from_pretrained(tmp_path).state_dict()
    ids = torch.randint(0, 97, (4, 33))
    seen = _train(ours, lambda model: model.loss(ids[:, :-1], ids[:, 1:]))
    expected = _train(theirs, lambda model: model(ids, labels=ids).loss)
    theirs.save_pretrained(tmp_path)  # their trained weights in our layout, to compare
    trained = GPT.from_pretrained(tmp_path).state_dict()
    _check_same_training(ours.state_dict(), trained, seen, expected, start)
