"""llmops.patch on plain torch modules: the same results, and the same torch around them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from patch_kit import distance
from torch import Tensor, nn

import llmops

pytestmark = pytest.mark.usefixtures("one_thread")

# name -> (module, inputs, the operator)
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], str]] = {
    "LayerNorm": (lambda: nn.LayerNorm((3, 8)), lambda: (torch.randn(4, 3, 8),), "layer_norm"),
    "LayerNorm, no bias": (
        lambda: nn.LayerNorm(8, bias=False),
        lambda: (torch.randn(4, 8),),
        "layer_norm",
    ),
    "RMSNorm": (lambda: nn.RMSNorm(8), lambda: (torch.randn(4, 8),), "rms_norm"),
    "RMSNorm, eps": (lambda: nn.RMSNorm(8, eps=0.1), lambda: (torch.randn(4, 8),), "rms_norm"),
    "Softmax": (lambda: nn.Softmax(1), lambda: (torch.randn(4, 5, 6),), "softmax"),
    "GELU": (nn.GELU, lambda: (torch.randn(4, 8),), "gelu"),
    "GELU, tanh": (lambda: nn.GELU("tanh"), lambda: (torch.randn(4, 8),), "gelu"),
    "Embedding": (
        lambda: nn.Embedding(9, 4, padding_idx=2),
        lambda: (torch.tensor([[1, 2], [8, 1]]),),
        "embedding",
    ),
    "Linear": (lambda: nn.Linear(8, 5), lambda: (torch.randn(3, 4, 8),), "linear"),
    "CrossEntropyLoss": (
        lambda: nn.CrossEntropyLoss(
            torch.rand(7), ignore_index=3, label_smoothing=0.1, reduction="sum"
        ),
        lambda: (torch.randn(5, 7), torch.tensor([0, 3, 6, 2, 3])),
        "cross_entropy",
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: (*torch.randn(3, 2, 5, 8).unbind(0), torch.tensor([[0, 0, 0, 0, 1]] * 2).bool()),
        "attention",
    ),
    "MultiheadAttention, kdim": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True, add_zero_attn=True),
        lambda: (torch.randn(5, 2, 8), torch.randn(3, 2, 6), torch.randn(3, 2, 4)),
        "attention",
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True),
        lambda: (torch.randn(2, 5, 8), None, torch.tensor([[0, 0, 0, 0, 1]] * 2).bool()),
        "attention",
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, nn.functional.gelu, norm_first=True),
        lambda: (
            torch.randn(5, 2, 8),
            torch.randn(3, 2, 8),
            nn.Transformer.generate_square_subsequent_mask(5),
        ),
        "attention",
    ),
}


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def run(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The result and all gradients."""
    leaves = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    y = first(module(*leaves))
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if y.dtype == torch.bfloat16:
        weigh = weigh.bfloat16()
    wanted += list(module.parameters())
    return [y, *torch.autograd.grad(y, wanted, weigh, allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_patch_module_computes_the_same(name: str, dtype: torch.dtype) -> None:
    build, make, op = MODULES[name]
    torch.manual_seed(0)
    module = build().to(dtype)
    inputs = tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in make()
    )
    before = run(module, inputs)
    cls, state = type(module), module.state_dict()
    report = llmops.patch(module)
    assert report.replaced[0].op == op
    assert isinstance(module, cls) and type(module) is not cls
    assert "[llmops]" in repr(module)
    assert module.state_dict().keys() == state.keys()
    after = run(module, inputs)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    scale = max(b.abs().max().item() for b in before if b is not None)
    for old, new in zip(before, after, strict=True):
        assert (old is None) == (new is None)
        if old is not None:
            assert old.dtype == new.dtype and old.shape == new.shape
            assert distance(new, old, 0.1 * scale) < limit
    module.eval()
    with torch.no_grad():
        ours = first(module(*inputs))
        again = pickle.loads(pickle.dumps(module))
        assert torch.equal(first(again(*inputs)), ours)
        assert torch.equal(first(copy.deepcopy(module)(*inputs)), ours)
    llmops.unpatch(module)
    assert type(module) is cls and not any("llmops" in n for n in vars(module))
    for old, new in zip(before, run(module.train(), inputs), strict=True):
        assert old is None or torch.equal(old, new)


def test_patch_encoder_goes_past_torchs_fused_kernel() -> None:
    """In inference torch's layers would go past their parts, patched ones included."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 6, 16)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        llmops.patch(model)
        seen: list[str] = []
        for name, part in model.named_modules():
            if isinstance(part, nn.MultiheadAttention):
                part.register_forward_hook(lambda *_, name=name: seen.append(name))
        after = model(x, src_key_padding_mask=padding)
    assert len(seen) == 2
    assert distance(after[~padding], before[~padding]) < 1e-5


def test_patch_keeps_hooks() -> None:
    module = nn.LayerNorm(8)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("post"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    llmops.patch(module)
    module(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "backward"]


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.LayerNorm):
    """The same forward as torch's."""


def test_patch_leaves_alone_what_it_does_not_know() -> None:
    own = nn.LayerNorm(8)
    own.forward = lambda x: x + 1  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "doubled": Doubled(8),
            "renamed": Renamed(8),
            "own": own,
            "norm": nn.Embedding(4, 8, max_norm=1.0),
            "sparse": nn.Embedding(4, 8, sparse=True),
            "softmax": nn.Softmax(),
            "conv": nn.Conv1d(8, 8, 1),
        }
    )
    report = llmops.patch(model)
    left = {e.name: e.reason for e in report.left}
    assert [e.name for e in report.replaced] == ["renamed"]
    assert left["doubled"] == "Doubled has a forward of its own"
    assert "replaced on the instance" in left["own"]
    assert "max_norm=1.0 has no form" in left["norm"] and "sparse=True" in left["sparse"]
    assert left["softmax"] == "it names no dim"
    assert left["conv"] == "no operator here computes it"
    assert set(left) | {"renamed"} == {n for n, _ in model.named_modules()}
    x = torch.randn(3, 8)
    assert torch.equal(model["own"](x), x + 1)
    for line in ("1 x Renamed -> layer_norm: renamed", "1 x Doubled: Doubled has a forward"):
        assert line in str(report)


def test_patch_twice_is_once() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    llmops.patch(model)
    cls = type(model[0])
    report = llmops.patch(model)
    assert not report.replaced and type(model[0]) is cls
    assert [e.reason for e in report.left][1:] == ["patched already"] * 2
    assert len(llmops.unpatch(model).replaced) == 2
    assert not llmops.unpatch(model).replaced


def test_patch_and_parametrizations() -> None:
    """Both change a module's class: neither takes the other's back."""
    from torch.nn.utils import parametrizations

    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    before = model(x)
    report = llmops.patch(model)
    assert [e.name for e in report.replaced] == ["1"]
    assert any(e.name == "0" and "parametrized" in e.reason for e in report.left)
    parametrizations.weight_norm(model[1])
    assert distance(model(x), before) < 1e-5
    left = llmops.unpatch(model).left
    assert [e.name for e in left] == ["1"] and "changed after the patch" in left[0].reason
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    llmops.unpatch(model)
    assert type(model[1]) is nn.Linear
    assert distance(model(x), before) < 1e-5


def test_patch_serves_dtypes_of_no_kernel_as_before() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Softmax(-1)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    llmops.patch(model)
    assert torch.equal(model(x), before)


def test_patch_of_a_model_on_meta() -> None:
    """Built without memory, patched, and only then given its weights."""
    torch.manual_seed(0)
    real = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    assert all(e.speedup is None for e in llmops.patch(model, dry_run=True).replaced)
    llmops.patch(model)
    assert model(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 4)
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    ids = torch.tensor([[1, 2, 8]])
    assert distance(model(ids), real(ids)) < 1e-5


def test_patch_dry_run_changes_nothing_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))
    classes = [type(m) for m in model.modules()]
    report = llmops.patch(model, dry_run=True)
    assert classes == [type(m) for m in model.modules()]
    assert all(e.speedup is not None and e.speedup > 0 for e in report.replaced)
    printed = capsys.readouterr().out
    assert printed.startswith("llmops.patch would replace 4 of 5") and "x as fast" in printed


def stack() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True)
    return nn.Sequential(nn.Embedding(9, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 9))


def test_patch_checkpointing_inference_mode_and_save() -> None:
    from torch.utils.checkpoint import checkpoint

    model = stack()
    ids = torch.randint(9, (2, 5))
    llmops.patch(model)
    plain = model(ids)
    grads = torch.autograd.grad(plain.sum(), list(model.parameters()))
    again = checkpoint(model, ids, use_reentrant=False)
    for a, b in zip(grads, torch.autograd.grad(again.sum(), list(model.parameters())), strict=True):
        assert torch.equal(a, b)
    with torch.inference_mode():
        assert distance(model(ids), plain) < 1e-6
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(ids), plain)


def test_patch_compiles_fullgraph_without_recompiling() -> None:
    """One graph, and after the second length no more of them."""
    model = stack().eval()
    llmops.patch(model)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for tokens in range(3, 13):
            ids = torch.randint(9, (2, tokens))
            assert distance(compiled(ids), model(ids)) < 1e-6
    assert len(graphs) == 2
    assert "llmops" in str(graphs[1].graph)


@pytest.mark.rotating
def test_patch_inductor_and_export() -> None:
    model = stack()
    ids = torch.randint(9, (2, 5))
    llmops.patch(model)
    expected = model(ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    got = compiled(ids)
    assert distance(got, expected) < 1e-5
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(torch.autograd.grad(got.square().sum(), parameters), wanted, strict=True):
        assert distance(a, b, 1e-2) < 1e-4
    program = torch.export.export(model.eval(), (ids,), strict=False)
    assert "llmops" in str(program.graph)
    assert distance(program.module()(ids), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.rotating
def test_patch_aot_inductor(tmp_path: Any) -> None:
    model = stack().eval()
    ids = torch.randint(9, (2, 5))
    llmops.patch(model)
    with torch.no_grad():
        program = torch.export.export(model, (ids,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        assert distance(torch._inductor.aoti_load_package(path)(ids), model(ids)) < 1e-5


def test_patch_under_autocast() -> None:
    """bf16 products, and results of the dtype that torch's modules give."""
    model = stack()
    ids = torch.randint(9, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids)
        llmops.patch(model)
        after = model(ids)
    assert before.dtype == after.dtype == torch.bfloat16
    assert distance(after, before) < 3e-2
    after.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
