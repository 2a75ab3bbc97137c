"""Sums of numbers from 0 on that have the same bits in any order: in integers, which add exactly.

The softmax's total is one of many tiles, summed over tiles and, where the vocabulary is split, over ranks. In floating
point each grouping of the tiles would round otherwise.
"""

import torch
from torch import Tensor

UNIT_BITS, FINER_BITS = 40, 50
"""A number is a multiple of 2^-40, and in float64 another of 2^-90. The total of a softmax is at least 1, as the peak's
own exponential is, so what is lost lies below its rounding. Sums below 2^22 fit: no vocabulary has as many tokens."""


def to_fixed(values: Tensor) -> Tensor:
    """Take numbers of at least 0 apart, to int64 [2 or 3, ...]: multiples of both units, and 1 where one is not finite.

    What they are taken apart to may be added up, at most 2^12 of them.
    """
    finite = values.isfinite()
    scaled = values.masked_fill(~finite, 0.0) * 2.0**UNIT_BITS
    units = scaled.to(torch.int64)
    parts = [units]
    if values.dtype == torch.float64:
        parts.append(((scaled - units.to(values.dtype)) * 2.0**FINER_BITS).to(torch.int64))
    return torch.stack([*parts, (~finite).to(torch.int64)])


def from_fixed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Put sums of what `to_fixed` returns together again; NaN where a term was not finite."""
    units, *finer, broken = parts
    values = units.to(dtype) * 2.0**-UNIT_BITS
    for part in finer:
        values += part.to(dtype) * 2.0 ** -(UNIT_BITS + FINER_BITS)
    return values.masked_fill_(broken > 0, torch.nan)
