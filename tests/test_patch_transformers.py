"""A patched transformers model is the same model: logits, gradients, generate, every family."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_kit import (
    BY_NAME,
    FAMILIES,
    Family,
    assert_near,
    cast,
    distance,
    gradients,
    inputs,
    logits,
)

import llmops
from llmops.integrations.transformers import register

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16]
GENERATING = [f for f in FAMILIES if f.kind not in ("encoder", "vision")]


def ids(values: list[Any]) -> list[str]:
    return [getattr(v, "name", str(v).removeprefix("torch.")) for v in values]


def paddings(family: Family) -> list[str | None]:
    return [None] if family.kind in ("vision", "audio") else [None, "left", "right"]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("family", FAMILIES, ids=ids(FAMILIES))
def test_patch_gives_the_same_logits_and_gradients(family: Family, dtype: torch.dtype) -> None:
    model = family.build(dtype)
    # transformers' eager masks are NaN in fp64 (its lowest number is -inf in the fp32 softmax).
    widest = torch.float32 if model.config._attn_implementation == "eager" else torch.float64
    exact = copy.deepcopy(model).to(widest)
    given = {p: cast(inputs(family, p), dtype) for p in paddings(family)}
    before = {p: (logits(model, g).detach(), gradients(model, g)) for p, g in given.items()}
    state = {n: t.clone() for n, t in model.state_dict().items()}

    report = llmops.patch(model)
    found = {"loss" if e.kind.startswith("loss") else e.op for e in report.replaced}
    assert family.ops <= found, family.ops - found
    names = {e.name for e in (*report.replaced, *report.left)}
    assert {n for n, _ in model.named_modules()} <= names, "the report leaves a module out"
    assert all(e.reason for e in report.left)
    assert state.keys() == model.state_dict().keys()

    for p, g in given.items():
        wide = cast(g, widest)
        truth = {"logits": logits(exact, wide).detach()}, gradients(exact, wide)
        old = {"logits": before[p][0]}, before[p][1]
        assert_near({"logits": logits(model, g).detach()}, old[0], truth[0], 2.0)
        model.train()  # without dropout training computes the same
        assert_near(gradients(model, g), old[1], truth[1], 4.0)
        model.eval()

    llmops.unpatch(model)
    for p, g in given.items():
        assert torch.equal(logits(model, g), before[p][0]), "unpatch does not restore it exactly"
    assert not any(isinstance(v, str) and v == "llmops" for v in vars(model.config).values())


def generated(model: Any, family: Family, cache: str, **more: Any) -> torch.Tensor:
    given = inputs(family, "left", tokens=7)
    given.pop("decoder_input_ids", None)
    result: torch.Tensor = model.generate(
        **given,
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        cache_implementation=None if cache == "dynamic" else cache,
        disable_compile=True,
        **more,
    )
    return result


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", GENERATING, ids=ids(GENERATING))
def test_patch_generates_the_same(family: Family, cache: str) -> None:
    model = family.build()
    more = {"output_scores": True, "return_dict_in_generate": True}
    before = generated(model, family, cache, **more)
    llmops.patch(model)
    after = generated(model, family, cache, **more)
    assert torch.equal(before.sequences, after.sequences)
    for old, new in zip(before.scores, after.scores, strict=True):
        finite = torch.isfinite(old)
        assert torch.equal(finite, torch.isfinite(new))
        assert distance(new[finite], old[finite]) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "t5", "bloom"])
def test_patch_beam_search_is_the_same(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    before = generated(model, family, "dynamic", num_beams=3)
    llmops.patch(model)
    assert torch.equal(generated(model, family, "dynamic", num_beams=3), before)


@pytest.mark.parametrize("family", FAMILIES, ids=ids(FAMILIES))
def test_patch_gives_attention_weights_aloud(family: Family) -> None:
    """output_attentions is served, by all scores, and says so."""
    model = family.build(attn_implementation="eager")
    given = inputs(family)
    before = model(**given, output_attentions=True)
    llmops.patch(model)
    with pytest.warns(llmops.FallbackWarning) if family.name != "bloom" else _nothing():
        after = model(**given, output_attentions=True)
    kinds = [n for n in before if "attentions" in n and len(before[n])]
    assert kinds
    for kind in kinds:
        assert len(before[kind]) == len(after[kind])
        for old, new in zip(before[kind], after[kind], strict=True):
            seen = inputs(family).get("attention_mask")
            if seen is not None and old.shape[2] == seen.shape[1]:
                old, new = old[0], new[0]  # the padded sequence's own padding means nothing
            assert distance(new, old) < 1e-4, kind
    assert (
        distance(
            logits(model, given),
            before.logits[given["attention_mask"].bool()]
            if family.kind in ("decoder", "encoder")
            else before.logits,
        )
        < 1e-4
    )


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_patch_dry_run_measures_attention_and_loss(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = BY_NAME[name].build()
    classes = [type(m) for m in model.modules()]
    config = model.config
    report = llmops.patch(model, dry_run=True)
    assert classes == [type(m) for m in model.modules()] and model.config is config
    assert "_llmops_patched" not in vars(model) and "_loss_function" not in vars(model)
    measured = {e.kind.split(" ")[0]: e.speedup for e in report.replaced}
    assert all(v is not None and v > 0 for v in measured.values()), measured
    assert {"attention", "loss", "Linear"} <= measured.keys()
    assert str(report) in capsys.readouterr().out


def test_patch_leaves_other_models_of_the_configuration_alone() -> None:
    family = BY_NAME["llama"]
    model = family.build()
    config = model.config
    other = type(model)(config)
    llmops.patch(model)
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "llmops"
    assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}
    llmops.unpatch(model)
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))


@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
def test_patch_survives_pickle_and_deepcopy(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    given = inputs(family)
    before = logits(model, given)
    llmops.patch(model)
    after = logits(model, given)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again, given), after)
        llmops.unpatch(again)
        assert torch.equal(logits(again, given), before)
        assert not hasattr(again, "_llmops_patched")
    assert torch.equal(logits(model, given), after)


def test_patch_some_ops() -> None:
    model = BY_NAME["llama"].build()
    report = llmops.patch(model, ops=["rms_norm"])
    assert {e.op for e in report.replaced} == {"rms_norm"}
    assert model.config._attn_implementation == "sdpa"
    assert any(e.reason == "ops does not name attention" for e in report.left)
    again = llmops.patch(model, ops=["rms_norm", "attention"])
    assert {e.op for e in again.replaced} == {"attention"}
    llmops.unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"ops may name attention, .*got 'atention'"):
        llmops.patch(model, ops=["atention"])
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module; got dict"):
        llmops.patch({})  # type: ignore[arg-type]


BY_INTERFACE = [f for f in FAMILIES if f.name != "bloom"]


@pytest.mark.parametrize("family", BY_INTERFACE, ids=ids(BY_INTERFACE))
def test_attn_implementation_alone(family: Family) -> None:
    register()
    expected = family.build()
    model = family.build(attn_implementation="llmops")
    assert model.config._attn_implementation == "llmops"
    given = inputs(family)
    assert distance(logits(model, given), logits(expected, given)) < 2e-5
    expected.set_attn_implementation("llmops")
    assert torch.equal(logits(model, given), logits(expected, given))


def test_attn_implementation_alone_is_refused_where_it_would_be_wrong() -> None:
    """BLOOM's layers add whatever mask they get: None would be no mask at all."""
    register()
    model = BY_NAME["bloom"].build(attn_implementation="llmops")
    with pytest.raises(NotImplementedError, match=r"the layers of bloom do not go .*llmops.patch"):
        model(**inputs(BY_NAME["bloom"]))


@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
def test_patched_model_saves_as_transformers_own(name: str, tmp_path: Any) -> None:
    family = BY_NAME[name]
    model = family.build()
    llmops.patch(model)
    model.save_pretrained(tmp_path)
    assert "llmops" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path).eval()
    given = inputs(family)
    assert distance(logits(again, given), logits(model, given)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bloom", "bert"])
def test_patched_model_checkpoints_activations(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    llmops.patch(model)
    given = inputs(family)
    model.train()
    wanted = gradients(model, given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, given)
    for gradient_name, gradient in wanted.items():
        assert distance(got[gradient_name], gradient, 1e-2) < 1e-5, gradient_name


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bart", "vit"])
def test_patch_drops_weights_in_training_only(name: str) -> None:
    """Dropout of the attention weights: off in eval, on in train, repeated by the seed."""
    family = BY_NAME[name]
    key = {
        "gpt2": "attn_pdrop",
        "bert": "attention_probs_dropout_prob",
        "vit": "attention_probs_dropout_prob",
    }
    model = family.build(**{key.get(name, "attention_dropout"): 0.3})
    expected = family.build()
    given = inputs(family)
    llmops.patch(model)
    exact = logits(expected, given)
    assert distance(logits(model, given), exact) < 1e-5
    model.train()
    with torch.no_grad():
        draws = [logits(model, given) for _ in range(2)]
    assert not torch.equal(*draws)
    torch.manual_seed(7)
    one = logits(model, given)
    torch.manual_seed(7)
    assert torch.equal(logits(model, given), one)


def test_patch_loss_is_the_same() -> None:
    """The model's own loss: shifted, ignored labels, a number of items of the caller's."""
    for name in ("llama", "gpt2", "bloom"):
        family = BY_NAME[name]
        for dtype in DTYPES:
            model = family.build(dtype)
            given = inputs(family)
            labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)

            def losses(model: Any = model, given: Any = given, labels: Any = labels) -> Any:
                plain = model(**given, labels=labels).loss
                items = model(**given, labels=labels, num_items_in_batch=torch.tensor(5)).loss
                return torch.stack((plain, items))

            before = losses()
            llmops.patch(model)
            after = losses()
            assert before.dtype == after.dtype == torch.float32
            assert distance(after, before) < (1e-5 if dtype == torch.float32 else 2e-2)
            model.zero_grad()
            after.sum().backward()
            assert all(p.grad is not None for n, p in model.named_parameters() if "proj" in n)


def test_patch_says_what_changed_beneath(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that no longer computes what we replace, an interface with a new argument."""
    from transformers.integrations import sdpa_attention
    from transformers.models.llama import modeling_llama

    from llmops.integrations.patch import _behaviour
    from llmops.integrations.transformers import registration

    def changed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)

    def sdpa(module: Any, query: Any, temperature: Any = None, **kwargs: Any) -> Any: ...

    monkeypatch.setattr(_behaviour, "_known", {})
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", changed)
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", sdpa)
    monkeypatch.setattr(registration, "TESTED", "5.0")
    model = BY_NAME["llama"].build()
    report = llmops.patch(model)
    left = {e.kind: e.reason for e in report.left}
    assert "does not compute the RMS norm" in left["LlamaRMSNorm"]
    assert "passes attention temperature" in left["attention (sdpa)"]
    assert " is not 5.0, for which this was tested" in report.notes[0]
    assert {e.op for e in report.replaced} == {"linear", "embedding", "swiglu", "cross_entropy"}


def test_patch_looks_at_modules_whatever_is_set_around_it() -> None:
    """A default dtype, device, autocast or backend of the caller's changes no decision."""
    from llmops.integrations.patch import _behaviour
    from llmops.integrations.transformers import modules

    def replaced(name: str) -> set[tuple[str, str | None]]:
        _behaviour._known.clear()
        modules._bloom_reason.clear()
        model = BY_NAME[name].build()
        return {(e.name, e.op) for e in llmops.patch(model).replaced}

    for name in ("gemma2", "bloom"):
        expected = replaced(name)
        model = BY_NAME[name].build()
        _behaviour._known.clear()
        modules._bloom_reason.clear()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with (
                torch.device("meta"),
                torch.autocast("cpu", torch.bfloat16),
                llmops.use_backend("triton"),
            ):
                report = llmops.patch(model)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {(e.name, e.op) for e in report.replaced} == expected


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_patched_model_exports(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    llmops.patch(model)
    given = inputs(family)
    more = {} if name == "bert" else {"use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), {**given, **more}, strict=False)
        assert "llmops" in str(program.graph)
        got = program.module()(**given, **more).logits
    mask = given["attention_mask"].bool()
    assert distance(got[mask], logits(model, given)) < 1e-5


@pytest.mark.slow
@pytest.mark.rotating
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_patched_model_aot_inductor(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    model = family.build()
    llmops.patch(model)
    given = inputs(family)
    more = {"return_dict": False} if name == "bert" else {"return_dict": False, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), {**given, **more}, strict=False)
        file = str(tmp_path / "model.pt2")
        path = torch._inductor.aoti_compile_and_package(program, package_path=file)
        got = torch._inductor.aoti_load_package(path)(**given, **more)[0]
    mask = given["attention_mask"].bool()
    assert distance(got[mask], logits(model, given)) < 1e-5
