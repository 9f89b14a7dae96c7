"""rope_tables: exact values, and transformers' own frequencies for every scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import llmops

SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 0.7,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.8,
        "mscale_all_dim": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def test_rope_tables_plain_values() -> None:
    cos, sin = llmops.rope_tables(1000, 6, base=500.0, dtype=torch.float64)
    assert cos.shape == sin.shape == (1000, 3)
    for p, i in ((0, 0), (1, 1), (999, 2)):
        angle = p * 500.0 ** (-2 * i / 6)
        assert math.isclose(cos[p, i], math.cos(angle), abs_tol=1e-12)
        assert math.isclose(sin[p, i], math.sin(angle), abs_tol=1e-12)
    # fp32 is fp64 rounded once, also far out, where fp32 angles would be off by 1e-3.
    far = llmops.rope_tables(20000, 6, base=500.0)
    exact = llmops.rope_tables(20000, 6, base=500.0, dtype=torch.float64)
    assert torch.equal(far[0], exact[0].float()) and torch.equal(far[1], exact[1].float())


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", (64, 2048))
def test_rope_tables_match_transformers(name: str, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    trained = (scaling or {}).get("original_max_position_embeddings", 512)
    parameters = {"rope_theta": 50000.0, **(scaling or {"rope_type": "default"})}
    if name == "dynamic":
        parameters.pop("original_max_position_embeddings")
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=trained,
        rope_parameters=parameters,
    )
    theirs = LlamaRotaryEmbedding(config)
    positions = torch.arange(length)[None]
    want_cos, want_sin = theirs(torch.zeros(1), positions)
    cos, sin = llmops.rope_tables(length, 64, base=50000.0, scaling=scaling)
    # Theirs has fp32 frequencies and angles: three roundings of an angle of up to `length`.
    allowed = 2e-6 + 3 * torch.finfo(torch.float32).eps * positions[0].float()[:, None]
    for got, want in ((cos, want_cos), (sin, want_sin)):
        error = (got - want[0, :, :32]).abs() / theirs.attention_scaling
        assert bool((error <= allowed).all()), (error - allowed).max()
    # The rotation they make of a tensor is ours.
    assert torch.allclose(cos.square() + sin.square(), torch.tensor(theirs.attention_scaling) ** 2)


def test_rope_tables_scalings_differ() -> None:
    """Each scaling changes the tables: none is accepted and ignored."""
    made = {name: llmops.rope_tables(1024, 64, scaling=s)[0] for name, s in SCALINGS.items()}
    names = list(made)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not torch.equal(made[first], made[second]), (first, second)


def test_rope_tables_config_forms() -> None:
    new = llmops.rope_tables(
        32, 8, scaling={"rope_type": "linear", "factor": 2, "rope_theta": 77.0}
    )
    old = llmops.rope_tables(32, 8, base=77.0, scaling={"type": "linear", "factor": 2})
    assert torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])
    plain = llmops.rope_tables(32, 8)
    assert torch.equal(llmops.rope_tables(32, 8, scaling={"rope_type": "default"})[0], plain[0])
    half = llmops.rope_tables(5, 8, dtype=torch.bfloat16, device="cpu")
    assert half[0].dtype == torch.bfloat16
    assert llmops.rope_tables(0, 8)[0].shape == (0, 4)
    assert llmops.rope_tables(3, 0)[0].shape == (3, 0)


def test_rope_tables_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="'longrope' is not supported; there are default, linear"):
        llmops.rope_tables(8, 8, scaling={"rope_type": "longrope", "factor": 2})
    with pytest.raises(ValueError, match="'linear' needs factor"):
        llmops.rope_tables(8, 8, scaling={"rope_type": "linear"})
    with pytest.raises(ValueError, match="'dynamic' needs original_max_position_embeddings or max"):
        llmops.rope_tables(8, 8, scaling={"type": "dynamic", "factor": 2})
    with pytest.raises(ValueError, match="'linear' does not know beta_fast; it takes factor"):
        llmops.rope_tables(8, 8, scaling={"type": "linear", "factor": 2, "beta_fast": 3})
    with pytest.raises(ValueError, match="partial_rotary_factor.*pass dim=int"):
        llmops.rope_tables(8, 8, scaling={"type": "default", "partial_rotary_factor": 0.5})
    with pytest.raises(ValueError, match="base is 5.0, but scaling has rope_theta 7.0"):
        llmops.rope_tables(8, 8, base=5.0, scaling={"type": "default", "rope_theta": 7.0})
    with pytest.raises(TypeError, match="scaling must be a dictionary"):
        llmops.rope_tables(8, 8, scaling="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim must be an even int"):
        llmops.rope_tables(8, 7)
    with pytest.raises(ValueError, match="length must be an int >= 0"):
        llmops.rope_tables(-1, 8)
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        llmops.rope_tables(8, 8, dtype=torch.int32)
