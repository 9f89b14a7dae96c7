"""Small random transformers models, one of each family, and what a patched one is held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCAB = 96
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 66, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    name: str
    model: str  # class of transformers
    config: str
    settings: dict[str, Any]
    # Operators that must have been brought in: a patch that does nothing would pass the rest.
    ops: frozenset[str]
    kind: str = "decoder"  # "decoder", "encoder", "seq2seq", "vision" or "audio"
    before: dict[str, Any] = field(default_factory=dict)  # of from_config: attn_implementation

    def build(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**{**self.settings, **changes})
        if "attn_implementation" in self.before:
            config._attn_implementation = self.before["attn_implementation"]
        model = getattr(hf, self.model)(config).to(dtype).eval()
        # As they start, attention is all but even and the norms' weights are constant: mistakes
        # would not show.
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.mul_(0.2 / max(p.std().item(), 0.02)) if "emb" not in name else None
                else:
                    p.add_(torch.randn_like(p) * (0.2 if "norm" in name.lower() else 0.05))
        return model


def _family(
    name: str, cls: str, config: str, ops: str, kind: str = "decoder", **changes: Any
) -> Family:
    base = {"decoder": _DECODER, "encoder": _ENCODER}.get(kind, {})
    settings = {**base, **changes}
    return Family(name, cls, config, settings, frozenset(ops.split()), kind)


_LLAMA = "attention rms_norm swiglu linear embedding loss"
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
FAMILIES = [
    _family("gpt2", "GPT2LMHeadModel", "GPT2Config",
            "attention layer_norm gelu embedding linear loss",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    _family("llama", "LlamaForCausalLM", "LlamaConfig", _LLAMA),
    _family("mistral", "MistralForCausalLM", "MistralConfig", _LLAMA, sliding_window=5),
    _family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _LLAMA, use_sliding_window=True,
            sliding_window=5, max_window_layers=1),
    _family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _LLAMA, head_dim=16),
    _family("phi3", "Phi3ForCausalLM", "Phi3Config", _LLAMA, sliding_window=6, resid_pdrop=0.0,
            partial_rotary_factor=0.5, head_dim=16),
    _family("gemma2", "Gemma2ForCausalLM", "Gemma2Config",
            "attention rms_norm geglu linear loss", head_dim=16, sliding_window=5,
            attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=7),
    _family("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig",
            "attention rms_norm geglu linear loss", head_dim=16, sliding_window=5,
            query_pre_attn_scalar=7, num_hidden_layers=3, sliding_window_pattern=2),
    _family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig",
            "attention layer_norm gelu linear embedding loss", hidden_dropout=0.0, rotary_pct=0.5),
    _family("gpt_oss", "GptOssForCausalLM", "GptOssConfig",
            "attention rms_norm linear embedding loss", head_dim=16, sliding_window=5,
            num_local_experts=2, num_experts_per_tok=1),
    _family("bloom", "BloomForCausalLM", "BloomConfig",
            "attention layer_norm gelu linear embedding loss", hidden_dropout=0.0),
    _family("opt", "OPTForCausalLM", "OPTConfig", "attention layer_norm linear embedding loss",
            ffn_dim=48, dropout=0.0, word_embed_proj_dim=32),
    _family("bert", "BertForMaskedLM", "BertConfig",
            "attention layer_norm gelu linear embedding", kind="encoder"),
    _family("roberta", "RobertaForMaskedLM", "RobertaConfig",
            "attention layer_norm gelu linear embedding", kind="encoder"),
    _family("vit", "ViTForImageClassification", "ViTConfig", "attention layer_norm gelu linear",
            kind="vision", image_size=16, patch_size=4, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_labels=5),
    _family("t5", "T5ForConditionalGeneration", "T5Config",
            "attention rms_norm geglu linear embedding", kind="seq2seq", vocab_size=VOCAB,
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
            relative_attention_num_buckets=8, relative_attention_max_distance=16),
    _family("bart", "BartForConditionalGeneration", "BartConfig",
            "attention layer_norm gelu linear", kind="seq2seq",
            max_position_embeddings=64, **_SEQ2SEQ),
    _family("whisper", "WhisperForConditionalGeneration", "WhisperConfig",
            "attention layer_norm gelu linear embedding", kind="audio", num_mel_bins=8,
            max_source_positions=12, max_target_positions=40, **_SEQ2SEQ),
]  # fmt: skip
BY_NAME = {f.name: f for f in FAMILIES}


def inputs(family: Family, padding: str | None = "left", tokens: int = 11) -> dict[str, Tensor]:
    """A batch of two; the second sequence is shorter by four tokens, padded on that side."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> Tensor:
        return torch.randint(3, VOCAB, (2, count), generator=generator)

    if family.kind == "vision":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if family.kind == "audio":
        features = torch.randn(2, 8, 24, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids(tokens)}
    mask = torch.ones(2, tokens, dtype=torch.long)
    if padding == "left":
        mask[1, :4] = 0
    elif padding == "right":
        mask[1, -4:] = 0
    given = {"input_ids": ids(tokens) * mask, "attention_mask": mask}
    if family.kind == "seq2seq":
        given["decoder_input_ids"] = ids(tokens - 2)
    return given


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()}


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Those at real tokens, one after another: what stands at padding means nothing."""
    found: Tensor = model(**given).logits
    mask = given.get("attention_mask")
    if mask is None or "decoder_input_ids" in given:
        return found
    return found[mask.bool()]


def gradients(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss that weighs every logit differently."""
    model.zero_grad()
    found = logits(model, given).float()
    weigh = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found * weigh).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def distance(got: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Largest difference, over the largest value (of `scale` at least)."""
    scale = max(expected.abs().max().item(), scale, 1e-30)
    return (got.double() - expected.double()).abs().max().item() / scale


def assert_near(
    got: dict[str, Tensor], expected: dict[str, Tensor], truth: dict[str, Tensor], factor: float
) -> None:
    """What we compute errs from the truth at most `factor` times as much as the model itself did,
    and a few roundings: more of them where the truth is fp32 and knows no better. (A gradient that
    is zero but for rounding counts beside the others.)"""
    assert got.keys() == expected.keys()
    whole = max(t.abs().max().item() for t in truth.values())
    for name, true in truth.items():
        scale = 1e-2 * whole
        roundings = 64 if true.dtype == got[name].dtype else 48
        eps = torch.finfo(got[name].dtype).eps
        limit = factor * distance(expected[name], true, scale) + roundings * eps
        error = distance(got[name], true, scale)
        assert got[name].dtype == expected[name].dtype
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"
