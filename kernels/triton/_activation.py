"""Activations of fp32 values and their derivatives, for gelu, swiglu and geglu.

    silu(x) = x s(x),  s(x) = 1 / (1 + exp(-x))          silu' = s (1 + x (1 - s))
    gelu(x) = x Phi(x)                                   gelu' = Phi + x Phi'
    its tanh form: x s(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3), as (1 + tanh u) / 2 = s(2 u)

The logistic function is made of exp(-|x|) alone: nothing overflows, and neither s nor 1 - s is a
difference, so both keep their relative precision far out. Infinities and NaN come out as torch's.
"""

from __future__ import annotations

import triton
import triton.language as tl

SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit
def _exp_of_negative(x):
    """exp(x) for x <= 0 to about 2 ulp; 0 where it would be subnormal.

    2^n 2^(r log2 e), n = round(x log2 e), r = x - n ln 2 with ln 2 in two parts, the first of 10
    bits: the hardware's exp2 of a rounded x log2 e is off by 1e-5 of the result at x = -80.
    """
    # Adding 1.5 2^23 rounds to an integer, which the low bits of the sum then hold.
    shifted = tl.maximum(x * 1.4426950408889634, -127.0) + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.exp2(r * 1.4426950408889634) * power


@triton.jit
def _logistic(x):
    """s(x) and 1 - s(x)."""
    e = _exp_of_negative(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x)."""
    if KIND == 0:
        s, _ = _logistic(x)
    elif KIND == 1:
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        s, _ = _logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * s


@triton.jit
def activate_with_slope(x, KIND: tl.constexpr):
    """act(x) and act'(x)."""
    if KIND == 0:
        s, rest = _logistic(x)
        slope = s * (1.0 + x * rest)
    elif KIND == 1:
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = s + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:
        s, rest = _logistic(1.5957691216057308 * (x + 0.044715 * x * x * x))
        # s (1 - s) is 0 beyond 12, where the square overflows in the end: no 0 times infinity.
        near = tl.minimum(tl.maximum(x, -12.0), 12.0)
        slope = s + s * rest * near * (1.5957691216057308 + 0.2140644488178072 * near * near)
    return x * s, slope
