"""How an operator is registered: one `Op` per schema, and what a call of it costs and does.

An `Op` is three things over the same functions:
- `torch.ops.llmops.<name>`: schema, fake, autograd. Compiled graphs, export and tensor subclasses
  see this one. Its last argument names the backend, so a graph keeps the choice it was traced with.
- a plain call of `forward`, when nothing asks for a gradient: no autograd machinery at all.
- a `torch.autograd.Function` around `forward`, when a gradient is asked for: about half the cost of
  register_autograd per call, and the only form that torch.func.grad goes through.
benchmarks/NOTES.md has the measurements behind this.

A front door may go a shorter way still, straight into the raw kernel: `shortcut`.

Double backward is right for every op: a backward operator is an `Op` itself, whose own backward is
torch.func.vjp of its plain PyTorch form.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from llmops import backends, dispatch

try:
    _native: Any = importlib.import_module("llmops._C")
except ImportError:  # backends/_extension.py says why, to whoever asks for its kernels
    _native = None
_shortcut = getattr(_native, "shortcut", None)
# is_last(x, weight, sizes): whether `sizes`, an int or a tuple, is x's last dimension alone.
is_last: Any = getattr(_native, "is_last", None)

LIBRARY = torch.library.Library("llmops", "FRAGMENT")

# Tensor types without behaviour of their own: these may skip the dispatcher's Python layers.
_PLAIN = (Tensor, Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
# Half the price of is_compiling: a front door asks it before its shortcut, which a graph cannot
# hold. Non-strict export shows as a mode.
is_tracing = torch.compiler.is_dynamo_compiling
_forward_ad = torch.autograd.forward_ad
_autocast = torch._C._is_any_autocast_enabled

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
        function, self.functorch_function = _functions(self.name, forward, setup, backward)
        # Past Function.apply in Python, whose questions about functorch are answered in __call__.
        self.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *args: Any) -> Any:
        if _is_compiling():
            return self.overload(*args)
        if _dispatch_modes():
            dispatch.learn_sharding()
            return self.overload(*args)
        grad_enabled, needs_grad = _is_grad_enabled(), False
        for i in self.tensor_positions:
            tensor = args[i]
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN or tensor.is_meta:
                dispatch.learn_sharding()
                return self.overload(*args)
            if grad_enabled and tensor.requires_grad:
                needs_grad = True
        # Inside a forward-mode level a plain call would drop the tangents without a word; the
        # Functions raise NotImplementedError for them.
        if needs_grad or _forward_ad._current_level >= 0:
            if _functorch_level() is not None:
                return self.functorch_function.apply(*args)
            return self.apply(*args)
        if _functorch_level() is not None:  # vmap loops over the whole op, whatever is in it
            return self.overload(*args)
        return self.forward(*args)


def is_plain(x: Tensor) -> bool:
    """Whether x's values can be read: no transform, mode, tracing or type of its own is around."""
    if type(x) not in _PLAIN or x.is_meta or _is_compiling() or _dispatch_modes():
        return False
    return _functorch_level() is None and not torch._C._functorch.is_legacy_batchedtensor(x)


def refuse_transforms(op: str, remedy: str, *written: Tensor) -> None:
    """For operators that write in place: torch.func.vmap and forward-mode AD do not follow them,
    and a tangent that stays as it was is a wrong one."""
    if _is_compiling():  # torch's own tracing of a transform meets the operator itself
        return
    level = _functorch_level()
    what = ""
    if level is not None and level.key() == torch._C._functorch.TransformType.Vmap:
        what = "torch.func.vmap"
    elif _forward_ad._current_level >= 0 and (
        level is not None or any(_forward_ad.unpack_dual(x).tangent is not None for x in written)
    ):
        what = "forward-mode AD"
    if what:
        raise NotImplementedError(
            f"llmops.{op}: writes in place, which {what} does not follow; {remedy}"
        )


def shortcut(
    op: str,
    features: tuple[str, ...] = (),
    *,
    autocast: bool = False,
    torchs: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A function that gives the raw CPU kernel of `op`, for a call that wants its result only.

    At decode sizes a call is all overhead, so the front doors of small ops try this first and check
    nothing: the raw operator checks all that keeps memory safe, and where it raises, the long way
    checks again and says what the user should read.

    >>> raw = None if is_tracing() else _raw(x, weight)  # _raw = shortcut("op")
    >>> if raw is not None:
    ...     try:
    ...         return raw(x, weight)
    ...     except RuntimeError:
    ...         pass  # the checks below say what is wrong

    The function returns None where anything stands between the raw operator and this call: another
    backend, a gradient, a compiler, a mode, another device, a tensor type of its own. Its
    first argument decides the dtype; the others may ask for a gradient, too. `autocast`: whether
    it changes this op on a CPU, and so stands between, too; asking costs as much as all the rest.
    `torchs`: torch's own function of the same arguments, where the table prefers it to the kernel.
    """
    table: dict[torch.dtype, Any] = {}
    dispatch.on_clear(table.clear)

    def find(dtype: torch.dtype) -> Any:
        call = dispatch.Call(op, "cpu", dtype, features)
        backend = dispatch.decide(call, dispatch.requested() or "auto").backend
        if backend == "reference" and torchs is not None and dtype.is_floating_point:
            table[dtype] = torchs
        elif backend != "cpu":
            table[dtype] = False
        else:
            overload = getattr(backends.get("cpu"), op)
            # Less the Python frame of OpOverload.__call__, which only passes the arguments on.
            table[dtype] = getattr(overload, "_op", overload)
        return table[dtype]

    if _shortcut is None:
        return lambda *tensors: None
    return _shortcut(  # type: ignore[no-any-return]
        table, find, dispatch.opened, dispatch.state, _forward_ad, _dispatch_modes,
        _autocast if autocast else None, _is_grad_enabled, *_PLAIN,
    )  # fmt: skip


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
