"""Repairs of Triton's interpreter, which runs kernels on CPU tensors where TRITON_INTERPRET=1.

As it comes, it computes with the bit patterns of bf16 as integers, truncates casts to bf16, rounds
a maximum with NaN as NumPy does and not as GPUs do, and reads whatever lies at an address. Here:

- bf16 is rounded to nearest even, and arithmetic on it is that of fp32, rounded;
- tl.maximum and tl.minimum give the number where one side is NaN, as compiled code does;
- a load or store of an address outside the launch's tensors raises, naming the address's tensor;
- a call of a helper no longer replaces all of triton.language anew, and the check of integers for
  overflow is NumPy's arithmetic and no longer Triton's: each a third of the time of many kernels.

Tried on Triton 3.6.0 and 3.7.1, whose interpreter this patches in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class OutOfBoundsError(IndexError):
    """A kernel's load or store touches memory of none of its arguments."""


def widen(bits: Any) -> Any:
    """bf16 bit patterns (uint16) -> fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """fp32 -> bf16 bit patterns, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _repair_arithmetic() -> None:
    binary, unary, ternary = Builder.binary_op, Builder.unary_op, Builder.ternary_op
    cast, dot = Builder.cast_impl, Builder.create_dot

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return binary(self, lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(narrow(result), tl.bfloat16)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        if not _is_bf16(arg):
            return unary(self, arg, op)
        return Handle(narrow(op(widen(arg.data))), tl.bfloat16)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if _is_bf16(other) and op is not np.where:
            result = op(*(widen(h.data) for h in (lhs, rhs, other)))
            return Handle(narrow(result), tl.bfloat16)
        return ternary(self, lhs, rhs, other, op)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return cast(self, src, dst_type) if source != tl.bfloat16 else src
        if source == tl.bfloat16:
            wide = _widened(src)
            return wide if target == tl.float32 else cast(self, wide, dst_type)
        if target == tl.bfloat16:
            return Handle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def exact(handle: Any) -> Any:  # tensor cores multiply 16-bit values exactly, sum in fp32
            handle = _widened(handle)
            if handle.data.dtype == np.float16 and d.dtype.scalar == tl.float32:
                return Handle(handle.data.astype(np.float32), tl.float32)
            return handle

        return dot(self, exact(a), exact(b), d, *rest)

    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary_op, unary_op, ternary_op
    Builder.cast_impl, Builder.create_dot = cast_impl, create_dot
    Builder.get_bf16 = lambda self, value: Handle(
        narrow(np.array([value], np.float32)), tl.bfloat16
    )
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(
            Builder, f"create_{name}", lambda self, src, dst_type: self.cast_impl(src, dst_type)
        )
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _repair_scalars() -> None:
    """A float argument is fp32, as in a compiled launch. As it comes it stays Python's, which an
    operation takes for fp64 where fp32 has no normal number of its size."""
    stock = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if not isinstance(argument, float):
            return stock(argument)
        with np.errstate(over="ignore"):
            data = np.array([argument], np.float32)
        return tl.core.tensor(Handle(data, tl.float32), tl.float32)

    interpreter._implicit_cvt = convert


def _repair_sums() -> None:
    """tl.sum and the scans of bf16 add bit patterns; compiled kernels upcast before they sum."""

    def wrap(cls: Any, name: str) -> None:
        stock = getattr(cls, name)

        def of_fp32(self: Any, input: Any) -> Any:
            if not _is_bf16(input.handle):
                return stock(self, input)
            wide = widen(input.handle.data)
            kind = tl.block_type(tl.float32, list(wide.shape)) if wide.shape else tl.float32
            return stock(self, tl.core.tensor(Handle(wide, tl.float32), kind))

        setattr(cls, name, of_fp32)

    for cls, names in (
        (interpreter.ReduceOps, ("sum",)),
        (interpreter.ScanOps, ("cumsum", "cumprod")),
    ):
        for name in names:
            wrap(cls, name)


# The extents [begin, end) in bytes of the tensors of the launch in progress.
_extents: list[tuple[int, int]] = []


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes from its first to its last element; strides are not negative in torch."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _check_addresses(pointers: Any, mask: Any, what: str) -> None:
    addresses = np.asarray(pointers.data).reshape(-1)
    kept = np.broadcast_to(np.asarray(mask.data), np.asarray(pointers.data).shape).reshape(-1)
    addresses = addresses[kept.astype(bool)].astype(np.int64)
    if not addresses.size:
        return
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    inside = np.zeros(addresses.shape, bool)
    for begin, end in _extents:
        inside |= (addresses >= begin) & (addresses + size <= end)
        if inside.all():
            return
    address = int(addresses[~inside][0])
    nearest = min(_extents, key=lambda e: max(e[0] - address, address - e[1], 0))
    raise OutOfBoundsError(
        f"a {what} at byte {address - nearest[0]} of a tensor that spans {nearest[1] - nearest[0]}"
    )


def _check_memory() -> None:
    load, store = Builder.create_masked_load, Builder.create_masked_store
    rmw = Builder.create_atomic_rmw
    arguments = interpreter.GridExecutor._init_args_hst

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check_addresses(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **named)  # named: by a tensor descriptor

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check_addresses(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *r: Any) -> Any:
        _check_addresses(pointers, mask, "atomic")
        return rmw(self, op, pointers, value, mask, *r)

    def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        found = arguments(self, args_dev, kwargs)
        tensors = [*found[0], *found[1].values()]
        tensors = [getattr(t, "base", t) for t in tensors]  # of a tensor descriptor
        _extents[:] = [_extent(t) for t in tensors if isinstance(t, torch.Tensor)]
        return found

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):  # inf - inf is NaN on a GPU too, without a word
            run(self, *args, **kwargs)

    run = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = call
    Builder.create_masked_load = create_masked_load
    Builder.create_masked_store = create_masked_store
    Builder.create_atomic_rmw = create_atomic_rmw
    interpreter.GridExecutor._init_args_hst = init_args_hst


def _patch_once() -> None:
    """The functions of triton.language are replaced once per launch, not at every helper's call."""
    patched: list[Any] = []  # the modules of which they are, in the launch in progress
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_lang(fn: Any) -> Any:
        modules = [m for m in (tl, tl.core) if any(m is value for value in fn.__globals__.values())]
        if modules and all(m in patched for m in modules):
            return interpreter._LangPatchScope()
        patched.extend(modules)
        return patch(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            run(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call


def _check_integers() -> None:
    """Sums and products of signed integers that do not fit raise, as in stock, with fewer steps;
    unsigned ones wrap, as in C: `sample` takes the distance of two keys so."""
    kinds: dict[str, Any] = {}
    stock = interpreter._get_np_dtype

    def numpy_dtype(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in kinds:
            kinds[scalar.name] = stock(scalar)
        return kinds[scalar.name]

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64 or kind.is_int_unsigned():
            return
        exact = EXACT[binary_op.__name__](
            lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
        )
        if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
            raise OverflowError(f"{kind} overflow in {binary_op.__name__}: {exact.max()}")

    interpreter._get_np_dtype = numpy_dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = check


_repair_arithmetic()
_repair_scalars()
_check_integers()
_repair_sums()
_check_memory()
_patch_once()
