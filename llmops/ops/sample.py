"""sample: from logits to token ids in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from llmops import backends, reference
from llmops.dispatch import learn_sharding, resolve
from llmops.ops import _check, _dtensor
from llmops.ops._op import LIBRARY, is_tracing, shortcut

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws one token per row from softmax(logits / temperature), filtered.

    The filters apply in this order, as in transformers, each to what the one before left:
    top_k keeps the k largest; top_p the most probable tokens until their probabilities reach
    top_p (the one that reaches it included); min_p those with at least min_p times the probability
    of the most probable. Tokens tied with the last one kept are kept.

    Args:
        logits: [B, V], fp32/bf16/fp16 (fp64 on the reference), any strides; -inf excludes a token.
        temperature: > 0; or 0 for greedy: the first maximum, and no filter matters.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        generator: of torch, on logits' device; one fp64 uniform number per row is drawn from it
            (none for temperature 0), so that its state alone decides the ids.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor [B], int64. Not differentiable.

    Raises:
        ValueError: an argument out of range; a row with NaN, with +inf (greedy takes it) or with
            -inf only. On a GPU, which would have to be waited for, such a row's id is -1.
        TypeError: naming the argument.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: weights in fp32 relative to the row's maximum, their sums in fp64 across blocks; the
    token is the first whose cumulative weight exceeds the uniform number's share.

    Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p).
    """
    _check_arguments(logits, temperature, top_k, top_p, min_p)
    if backend is None and not is_tracing():
        raw = _sample_raw(logits)
        if raw is not None:
            drawn = _uniform(logits, generator) if temperature > 0.0 else None
            return raw(logits, drawn, temperature, top_k, top_p, min_p)  # type: ignore[no-any-return]
    name = resolve("sample", logits.device, logits.dtype, (), backend)
    uniform = None
    if temperature > 0.0:
        uniform = _uniform(logits, generator)
        if _dtensor.is_distributed(logits):
            uniform = _dtensor.replicated(uniform, logits, drawn=True)
    if name == "reference":
        if not _is_compiling():
            _check_rows(logits, greedy=temperature == 0.0)
        return reference.sample_at(logits, uniform, temperature, top_k, top_p, min_p)
    if _is_compiling() or type(logits) is not Tensor or _dispatch_modes():
        learn_sharding()
        return torch.ops.llmops.sample(logits, uniform, temperature, top_k, top_p, min_p, name)  # type: ignore[no-any-return]
    return _forward(logits, uniform, temperature, top_k, top_p, min_p, name)


def _uniform(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    rows, device = logits.shape[0], logits.device
    if generator is None:  # naming None, torch.rand takes no symbolic size under compile
        return torch.rand(rows, dtype=torch.float64, device=device)
    return torch.rand(rows, generator=generator, dtype=torch.float64, device=device)


def _check_arguments(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    _check.floating("sample", "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"llmops.sample: logits must be [B, V] with V > 0; got shape {tuple(logits.shape)}"
        )
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"llmops.sample: temperature must be >= 0; got {temperature}")
    if isinstance(top_k, float) or top_k < 0:
        raise ValueError(f"llmops.sample: top_k must be an int >= 0 (0 keeps all); got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"llmops.sample: top_p must be in (0, 1]; got {top_p}")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"llmops.sample: min_p must be in [0, 1]; got {min_p}")


def _check_rows(logits: Tensor, greedy: bool) -> None:
    """For the reference; the kernels check as they read."""
    if logits.shape[0] == 0:
        return
    top = logits.amax(-1)
    reasons = [
        (top.isnan(), "holds NaN"),
        (top == -float("inf"), "is -inf in every place: no token is left"),
    ]
    if not greedy:
        reasons.append((top == float("inf"), "holds +inf, which has no probability"))
    for bad, why in reasons:
        if bool(bad.any()):
            raise ValueError(
                f"llmops.sample: row {int(bad.nonzero()[0])} of logits {why}; check what computes "
                "or masks the logits"
            )


# ---- the operator --------------------------------------------------------------------------------

_sample_raw = shortcut("sample")


def _forward(
    logits: Tensor, uniform: Tensor | None, temperature: float, top_k: int, top_p: float,
    min_p: float, backend: str,
) -> Tensor:  # fmt: skip
    if backend != "cpu":
        backend = resolve("sample", logits.device, logits.dtype, (), backend)
    if backend == "reference":
        return reference.sample_at(logits, uniform, temperature, top_k, top_p, min_p)
    return backends.get(backend).sample(logits, uniform, temperature, top_k, top_p, min_p)  # type: ignore[no-any-return]


def _fake(
    logits: Tensor, uniform: Tensor | None, temperature: float, top_k: int, top_p: float,
    min_p: float, backend: str,
) -> Tensor:  # fmt: skip
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


# Its result takes no gradient, so it is no Op.
LIBRARY.define(
    "sample(Tensor logits, Tensor? uniform, float temperature, int top_k, float top_p, "
    "float min_p, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("sample", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("llmops::sample", _fake, lib=LIBRARY)
