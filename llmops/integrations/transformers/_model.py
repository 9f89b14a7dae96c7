"""What of a transformers model is no module: the attention that its configuration names, its loss.

The configuration object may be shared, with the user and with other models: the patched model gets
a copy of it that says "llmops", and unpatch gives it the object back.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import llmops
from llmops.integrations.patch import _measure
from llmops.integrations.patch._report import Entry, Report
from llmops.integrations.patch._rules import SERVED
from llmops.integrations.transformers import registration
from llmops.integrations.transformers.modules import BloomAttention

RECORD = "_llmops_patched"  # on the model: pairs (its own configuration, the copy), and the loss
_NONE = "none"


def patch_model(model: nn.Module, wanted: set[str], report: Report) -> None:
    from transformers import PreTrainedModel

    models = [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    if not models:
        return
    if (note := registration.version_note()) is not None:
        report.notes.append(note)
    record: dict[str, Any] = {"configs": [], "losses": []}
    _patch_attention(model, models, wanted, report, record)
    _patch_losses(models, wanted, report, record)
    if not report.dry_run and (record["configs"] or record["losses"]):
        model.__dict__.setdefault(RECORD, []).append(record)


def unpatch_model(model: nn.Module, report: Report) -> None:
    for holder in model.modules():
        for record in reversed(holder.__dict__.pop(RECORD, [])):
            for module, config, copied in record["configs"]:
                if module.__dict__.get("config") is copied:
                    module.config = config
            for owner, before in record["losses"]:
                if before == _NONE:
                    owner.__dict__.pop("_loss_function", None)
                else:
                    owner._loss_function = before
            names = {c._attn_implementation for _, c, _ in record["configs"]}
            if names:
                report.replaced.append(Entry("", "attention", ", ".join(sorted(map(str, names)))))
            if record["losses"]:
                report.replaced.append(Entry("", "loss", "its own"))


def _patch_attention(
    root: nn.Module, models: list[Any], wanted: set[str], report: Report, record: dict[str, Any]
) -> None:
    """By configuration: one may serve several models within this one."""
    owners: dict[int, tuple[str, Any]] = {}
    for name, model in models:
        owners.setdefault(id(model.config), (name, model))
    memo: dict[int, Any] = {}
    for name, model in owners.values():
        implementation = model.config._attn_implementation
        reason = _attention_left(model, wanted)
        if reason is not None:
            report.left.append(Entry(name, f"attention ({implementation})", reason=reason))
            continue
        kind, speedup = f"attention ({implementation})", None
        if report.dry_run:
            speedup = _gain(model, implementation)
        report.replaced.append(Entry(name, kind, "attention", speedup=speedup))
        if not report.dry_run:
            registration.register()
            copied = copy.deepcopy(model.config, memo)
            by_interface = _can_set(model)
            name = registration.NAME if by_interface else registration.OF_LAYERS
            copied._attn_implementation_internal = name
    if not memo:
        return
    for module in root.modules():
        config = module.__dict__.get("config")
        copied = memo.get(id(config)) if config is not None else None
        if copied is not None:
            record["configs"].append((module, config, copied))
            module.config = copied


def _attention_left(model: Any, wanted: set[str]) -> str | None:
    config = model.config
    implementation = config._attn_implementation
    if implementation in (registration.NAME, registration.OF_LAYERS):
        return "it is llmops already"
    if "attention" not in wanted:
        return "ops does not name attention"
    if (reason := registration.why_not()) is not None:
        return reason
    if implementation is not None and str(implementation).startswith("paged"):
        return "paged attention has a cache of its own"
    if implementation == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn asks for transformers' own"
    if not _can_set(model):
        if any(isinstance(m, BloomAttention) for m in model.modules()):
            return None  # its layers were replaced, and take our mask
        return f"{type(model).__name__} does not go by transformers' attention interface"
    if not (
        getattr(model, "_supports_attention_backend", False)
        or getattr(model, "_supports_sdpa", False)
    ):
        return f"{type(model).__name__} supports its own attention only"
    return None


def _can_set(model: Any) -> bool:
    return bool(getattr(model, "_can_set_attn_implementation", lambda: False)())


def _gain(model: Any, implementation: str | None) -> float | None:
    """Of attention alone, on heads of the model's own size."""
    config = model.config
    tensor = next(model.parameters(), None)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if tensor is None or tensor.is_meta or not heads or not width:
        return None
    if implementation not in ("sdpa", "eager") or tensor.dtype not in SERVED:
        return None
    dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    q, k, v = (
        torch.randn(1, n, 2 * _measure.ROWS, dim, dtype=tensor.dtype, device=tensor.device)
        for n in (heads, kv_heads, kv_heads)
    )
    group = kv_heads != heads

    tokens = q.shape[2]
    unseen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    added = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device)
    added.masked_fill_(unseen, torch.finfo(q.dtype).min)

    def theirs() -> Tensor:
        if implementation == "eager":
            keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            scores = q @ keys.transpose(2, 3) * dim**-0.5 + added
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group)

    return _measure.ratio(theirs, lambda: llmops.attention(q, k, v, causal=True), q.device)


# ---- the loss ------------------------------------------------------------------------------------


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, without its fp32 copy of the logits."""
    if shift_labels is None:
        assert labels is not None
        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)
        shift_labels = labels[..., 1:].contiguous()
    return _loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForMaskedLMLoss, likewise."""
    return _loss(logits, labels, vocab_size, num_items_in_batch, ignore_index)


def _loss(
    logits: Tensor, labels: Tensor, vocab_size: int, items: Tensor | int | None, ignore_index: int
) -> Tensor:
    loss = llmops.cross_entropy(
        logits.view(-1, vocab_size),
        labels.view(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction="mean" if items is None else "sum",
        dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32,
    )
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def _patch_losses(
    models: list[Any], wanted: set[str], report: Report, record: dict[str, Any]
) -> None:
    ours = {"ForCausalLMLoss": causal_lm_loss, "ForMaskedLMLoss": masked_lm_loss}
    for name, model in models:
        if not _goes_by_loss_function(model):
            continue
        current = model.loss_function
        known = ours.get(getattr(current, "__name__", ""))
        if current in ours.values() or known is None:
            continue
        if not getattr(current, "__module__", "").startswith("transformers.loss"):
            report.left.append(Entry(name, "loss", reason="it is a function of the user's"))
            continue
        if "cross_entropy" not in wanted:
            report.left.append(Entry(name, "loss", reason="ops does not name cross_entropy"))
            continue
        speedup = _loss_gain(model, current, known) if report.dry_run else None
        kind = f"loss ({current.__name__})"
        report.replaced.append(Entry(name, kind, "cross_entropy", speedup=speedup))
        if not report.dry_run:
            record["losses"].append((model, model.__dict__.get("_loss_function", _NONE)))
            model.loss_function = known


def _loss_gain(model: Any, theirs: Any, ours: Any) -> float | None:
    tensor, vocab = next(model.parameters()), getattr(model.config, "vocab_size", None)
    if tensor.is_meta or not isinstance(vocab, int) or tensor.dtype not in SERVED:
        return None
    logits = torch.randn(1, _measure.ROWS, vocab, dtype=tensor.dtype, device=tensor.device)
    labels = torch.randint(vocab, (1, _measure.ROWS), device=tensor.device)

    def call(loss: Any) -> Any:
        return lambda: loss(logits, labels, vocab_size=vocab)

    return _measure.ratio(call(theirs), call(ours), tensor.device)


def _goes_by_loss_function(model: Any) -> bool:
    forward = type(model).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ())
