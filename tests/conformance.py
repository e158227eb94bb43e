"""Our minifloats beside those of two independent libraries, ml_dtypes and gfloat.

`experiments/conformance` runs the same comparisons on ten million patterns.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import torch
from gfloat import Domain, FormatInfo, RoundMode, round_ndarray

from swalp import Minifloat, Nearest, TowardNegative, TowardPositive, TowardZero, quantize
from swalp.formats import NAMED

FNUZ = Minifloat(4, 3, specials="fnuz")

# Every floating-point format of ml_dtypes, and IEEE half, which numpy itself has.
ML_DTYPES = {
    Minifloat(3, 4): ml_dtypes.float8_e3m4,
    Minifloat(4, 3): ml_dtypes.float8_e4m3,
    Minifloat(4, 3, bias=11, specials="fnuz"): ml_dtypes.float8_e4m3b11fnuz,
    NAMED["e4m3fn"]: ml_dtypes.float8_e4m3fn,
    FNUZ: ml_dtypes.float8_e4m3fnuz,
    NAMED["e5m2"]: ml_dtypes.float8_e5m2,
    Minifloat(5, 2, specials="fnuz"): ml_dtypes.float8_e5m2fnuz,
    NAMED["e8m0"]: ml_dtypes.float8_e8m0fnu,
    NAMED["e2m1"]: ml_dtypes.float4_e2m1fn,
    NAMED["e2m3"]: ml_dtypes.float6_e2m3fn,
    NAMED["e3m2"]: ml_dtypes.float6_e3m2fn,
    NAMED["bf16"]: ml_dtypes.bfloat16,
    NAMED["fp16"]: np.float16,
}

# gfloat describes all of ours; without subnormals its numbers go on below the smallest.
GFLOAT = [*ML_DTYPES, NAMED["e6m9"], NAMED["e3m0"], Minifloat(4, 0, specials="fn"), Minifloat(7, 4)]

MODES = {
    Nearest(): RoundMode.TiesToEven,
    TowardZero(): RoundMode.TowardZero,
    TowardPositive(): RoundMode.TowardPositive,
    TowardNegative(): RoundMode.TowardNegative,
}


def info(fmt) -> FormatInfo:
    """gfloat's description of one of our formats."""
    nans = {"ieee": 2**fmt.mantissa_bits - 1, "fn": 1, "fnuz": 0, "finite": 0}[fmt.specials]
    return FormatInfo(
        str(fmt),
        fmt.bits,
        fmt.mantissa_bits + 1,
        bias=fmt.bias,
        is_signed=fmt.signed,
        domain=Domain.Extended if fmt.specials == "ieee" else Domain.Finite,
        has_nz=fmt.signed and fmt.specials != "fnuz",
        num_high_nans=nans,
        has_subnormals=fmt.subnormals,
        is_twos_complement=False,
    )


def ours(x: np.ndarray, fmt, rule=Nearest()) -> np.ndarray:  # noqa: B008  (a frozen value)
    return quantize(torch.from_numpy(x), fmt, rule).numpy()


def overflowing(fmt):
    """`fmt` with infinity or NaN beyond its largest value; None if it has no code for either."""
    return None if fmt.specials == "finite" else replace(fmt, saturating=False)


def converted(x: np.ndarray, dtype) -> np.ndarray:
    """`x` to a type of ml_dtypes and back."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype).astype(x.dtype)


def patterns(count: int, seed: int) -> np.ndarray:
    """Random float32 bit patterns: every exponent alike, every kind of NaN."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return bits.view(np.float32)


def landmarks(fmt) -> np.ndarray:
    """Every value, every midpoint, the last one beyond the largest; and the floats beside them."""
    values = fmt.values().numpy()
    gap = values[-1] - values[-2]
    around = np.concatenate([values, [values[-1] + gap, values[-1] + 2 * gap]])
    if fmt.signed:
        around = np.concatenate([-around[::-1], around])
    points = np.concatenate(
        [around, (around[:-1] + around[1:]) / 2, [np.inf, -np.inf, np.nan, -0.0]]
    )
    with np.errstate(over="ignore"):
        points = points.astype(np.float32)
    return np.concatenate(
        [
            points,
            np.nextafter(points, np.float32(np.inf)),
            np.nextafter(points, np.float32(-np.inf)),
        ]
    )


def differences(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where two arrays differ in a number or in the sign of a zero; a NaN equals a NaN."""
    equal = (left == right) & (np.signbit(left) == np.signbit(right))
    return ~(equal | (np.isnan(left) & np.isnan(right)))


def compare_with_ml_dtypes(x: np.ndarray, fmt) -> dict[str, np.ndarray]:
    """Where nearest rounding differs from ml_dtypes, when saturating and when not."""
    dtype = ML_DTYPES[fmt]
    largest = np.float32(fmt.largest)
    inside = np.clip(x, -largest, largest)  # keeps NaN; ml_dtypes itself does not saturate
    result = {"saturating": differences(ours(x, fmt), converted(inside, dtype))}
    if overflowing(fmt):
        result["overflowing"] = differences(ours(x, overflowing(fmt)), converted(x, dtype))
    return result


def compare_with_gfloat(x: np.ndarray, fmt, rule=Nearest()) -> dict[str, np.ndarray]:  # noqa: B008
    """Where a deterministic rule differs from gfloat, when saturating and when not."""
    with np.errstate(invalid="ignore", over="ignore"):  # signalling NaNs; e8m0 below its range
        wide = x.astype(np.float64)
        theirs = round_ndarray(info(fmt), wide, MODES[rule], sat=True).astype(np.float32)
        result = {"saturating": differences(ours(x, fmt, rule), theirs)}
        if overflowing(fmt):
            theirs = round_ndarray(info(fmt), wide, MODES[rule], sat=False).astype(np.float32)
            result["overflowing"] = differences(ours(x, overflowing(fmt), rule), theirs)
    return result
