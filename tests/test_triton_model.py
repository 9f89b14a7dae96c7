"""The reference GPT on the Triton kernels: logits, loss and gradients are the reference's, and so
are the tokens of a generation with a cache, sampled ones too."""

from __future__ import annotations

import os

import pytest
import torch
from model_kit import CONFIGS, small

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(18).view(2, 9) * 5 % 97


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_triton_model_matches_reference(name: str) -> None:
    results = {}
    for backend in ("triton", "reference"):
        model = small(CONFIGS[name], backend=backend, n_layer=2)
        with torch.no_grad():
            logits = model(IDS)
        loss = model.loss(IDS, IDS.roll(-1, 1))
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        results[backend] = logits, loss.detach(), gradients
    torch.testing.assert_close(*results.values(), rtol=1e-4, atol=1e-5)


def test_triton_model_generates_the_reference_tokens() -> None:
    """With a cache, greedy and sampled; and what ran are Triton's kernels."""
    from llmops.kernels.triton import _config

    models = [small(CONFIGS["llama"], backend=b, n_layer=1) for b in ("triton", "reference")]
    for options in ({"temperature": 0.0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}):
        with _config.watching() as seen:
            tokens = [
                model.generate(IDS, 3, generator=torch.Generator().manual_seed(1), **options)
                for model in models
            ]
        assert torch.equal(*tokens)
        ran = {op for op, *_ in seen}
        assert {"embedding", "rms_norm", "rope", "attention_kvcache", "sample"} <= ran, ran
