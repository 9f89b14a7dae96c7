"""How an operator is registered: one `Op` per schema, and what a call of it costs and does.

An `Op` is three things over the same functions:
- `torch.ops.llmops.<name>`: schema, fake, autograd. Compiled graphs, export and tensor subclasses
  see this one. Its last argument names the backend, so a graph keeps the choice it was traced with.
- a plain call of `forward`, when nothing asks for a gradient: no autograd machinery at all.
- a `torch.autograd.Function` around `forward`, when a gradient is asked for: about half the cost of
  register_autograd per call, and the only form that torch.func.grad goes through.
benchmarks/NOTES.md has the measurements behind this.

Double backward is right for every op: a backward operator is an `Op` itself, whose own backward is
torch.func.vjp of its plain PyTorch form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

LIBRARY = torch.library.Library("llmops", "FRAGMENT")

# Tensor types without behaviour of their own: these may skip the dispatcher's Python layers.
_PLAIN = (Tensor, Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_forward_ad = torch.autograd.forward_ad

Setup = Callable[[Any, tuple[Any, ...], Any], None]


class Op:
    """One operator.

    Args:
        schema: without the namespace, e.g. "softmax(Tensor x, float scale, str backend) -> Tensor".
            The last argument is `str backend`.
        forward: computes it, with the schema's arguments, `backend` resolved to a name.
        fake: the same signature; returns empty tensors of the right shape, dtype and strides.
        setup, backward: as torch.library.register_autograd takes them: setup(ctx, inputs, output)
            saves, backward(ctx, *grads) returns one gradient (or None) per argument.
        reference: instead of setup and backward, the op in plain PyTorch with the schema's
            arguments less `backend`; its torch.func.vjp is then the backward.
    """

    def __init__(
        self,
        schema: str,
        *,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup: Setup | None = None,
        backward: Callable[..., Any] | None = None,
        reference: Callable[..., Any] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.forward = forward
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, forward, "CompositeExplicitAutograd")
        qualified = f"llmops::{self.name}"
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.llmops, self.name).default
        arguments = self.overload._schema.arguments
        self.tensor_positions = tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
        if reference is not None:
            setup, backward = _vjp_of(reference, self.tensor_positions, len(arguments))
        if setup is None or backward is None:
            raise TypeError(f"{qualified}: needs setup and backward, or reference")
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=LIBRARY)
        self.function, self.functorch_function = _functions(self.name, forward, setup, backward)

    def __call__(self, *args: Any) -> Any:
        if _is_compiling():
            return self.overload(*args)
        needs_grad = False
        for i in self.tensor_positions:
            tensor = args[i]
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN or tensor.is_meta:
                return self.overload(*args)
            if tensor.requires_grad:
                needs_grad = True
        if _dispatch_modes():
            return self.overload(*args)
        # Inside a forward-mode level a plain call would drop the tangents without a word; the
        # Functions raise NotImplementedError for them.
        if (needs_grad and _is_grad_enabled()) or _forward_ad._current_level >= 0:
            if _functorch_level() is not None:
                return self.functorch_function.apply(*args)
            return self.function.apply(*args)
        return self.forward(*args)


def _functions(name: str, forward: Any, setup: Any, backward: Any) -> tuple[Any, Any]:
    """The same op as two autograd Functions: torch.func transforms need forward and setup_context
    apart; one forward with ctx costs half as much."""

    def forward_with_ctx(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup(ctx, args, output)
        return output

    plain = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward_with_ctx), "backward": staticmethod(backward)},
    )
    functorch = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(backward),
            "generate_vmap_rule": True,
        },
    )
    return plain, functorch


def _vjp_of(
    reference: Callable[..., Any], tensor_positions: Sequence[int], count: int
) -> tuple[Setup, Callable[..., Any]]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in tensor_positions))
        ctx.constants = [None if i in tensor_positions else a for i, a in enumerate(inputs)]
        ctx.output_count = len(output) if isinstance(output, tuple) else 0
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Any) -> Any:
        arguments = list(ctx.constants)
        for i, tensor in zip(tensor_positions, ctx.saved_tensors, strict=True):
            arguments[i] = tensor
        wanted = [
            i for i in tensor_positions if ctx.needs_input_grad[i] and arguments[i] is not None
        ]

        def of_wanted(*tensors: Tensor) -> tuple[Tensor, ...]:
            for i, tensor in zip(wanted, tensors, strict=True):
                arguments[i] = tensor
            result = reference(*arguments[:-1])
            outputs = result if isinstance(result, tuple) else (result,)
            # An output that no one differentiated, or that is None, takes no part.
            return tuple(
                o for o, g in zip(outputs, grads, strict=True) if g is not None and o is not None
            )

        results: list[Any] = [None] * count
        if wanted and any(g is not None for g in grads):
            pull = torch.func.vjp(of_wanted, *(arguments[i] for i in wanted))[1]
            given = tuple(g for g in grads if g is not None)
            for i, gradient in zip(wanted, pull(given), strict=True):
                results[i] = gradient
        return tuple(results)

    return setup, backward
