"""Ten million random float32 bit patterns to every minifloat: ours, ml_dtypes and gfloat.

    python experiments/conformance/run.py [--patterns N] > experiments/conformance/results.csv

One row for each format, library and overflow rule: how many patterns were compared, how many
results differ, and how many of these are the deviations that docs/numerics.md names.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from conformance import (
    GFLOAT,
    ML_DTYPES,
    compare_with_gfloat,
    compare_with_ml_dtypes,
    patterns,
)

CHUNK = 1_000_000


def named(x: np.ndarray, fmt, library: str) -> np.ndarray:
    """Where docs/numerics.md says that the library deviates."""
    if library == "ml_dtypes" and fmt.specials == "finite":
        return np.isnan(x)
    if not fmt.has_zero:
        if library == "gfloat":
            return x < np.float32(fmt.smallest)
        mantissa, _ = np.frexp(np.where(np.isfinite(x), x, 1))
        return (x == 0) | ((x > fmt.smallest) & (x < 2 * fmt.smallest)) | (mantissa == 0.75)
    return np.zeros(x.shape, dtype=bool)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", type=int, default=10 * CHUNK)
    count = parser.parse_args().patterns
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["format", "library", "overflow", "patterns", "differing", "of these named"])
    compare = {"ml_dtypes": compare_with_ml_dtypes, "gfloat": compare_with_gfloat}
    for fmt in GFLOAT:
        for library in compare:
            if library == "ml_dtypes" and fmt not in ML_DTYPES:
                continue
            differing, explained = Counter(), Counter()
            for seed in range(-(-count // CHUNK)):
                x = patterns(min(CHUNK, count - seed * CHUNK), seed)
                for overflow, unequal in compare[library](x, fmt).items():
                    differing[overflow] += int(unequal.sum())
                    explained[overflow] += int((unequal & named(x, fmt, library)).sum())
            for overflow, number in differing.items():
                table.writerow([fmt, library, overflow, count, number, explained[overflow]])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
