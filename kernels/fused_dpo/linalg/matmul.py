"""Matrix products with fp32 (or float64) results whose precision does not depend on anybody's global flag."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused_dpo.hardware import has_bf16_units


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Tell what a sum over the vocabulary or the tokens is kept in: float64 for float64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiplied_in_bf16(operand_dtype: torch.dtype) -> bool:
    """Tell whether a CPU rounds operands of that dtype to bf16 on their way into a product with a fp32 result."""
    return operand_dtype == torch.bfloat16 and has_bf16_units(torch.device("cpu"))


@contextmanager
def matmul_precision(operand_dtype: torch.dtype) -> Iterator[None]:
    """Make products of fp32 tensors, within the block, exact in operands of `operand_dtype` and accumulated in fp32.

    For `torch.bfloat16` on a CPU with bf16 units the operands are rounded to bf16 on their way in, which loses nothing
    where they hold bf16 values already, and the result stays fp32 (oneDNN; 2.3 times the rate of fp32 products,
    measured on AVX512-BF16). For every other dtype the product is full fp32: TF32 and bf16 short cuts that a user
    switched on for the rest of the program (`torch.set_float32_matmul_precision`) do not reach it.

    The setting is per process, as torch offers no other: a thread that multiplies fp32 matrices at the same time sees
    it too.
    """
    backends: Any = torch.backends
    switches = (backends.mkldnn.matmul, backends.cuda.matmul)
    # A switch that only repeats the one above it goes back to following it ("none"), instead of being pinned to it.
    above = backends.mkldnn.fp32_precision, backends.fp32_precision
    before = ["none" if s.fp32_precision == a else s.fp32_precision for s, a in zip(switches, above, strict=True)]
    switches[0].fp32_precision = "bf16" if multiplied_in_bf16(operand_dtype) else "ieee"
    switches[1].fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@contextmanager
def fp32_sums() -> Iterator[None]:
    """Make cuBLAS, within the block, add up products of half-precision tensors in fp32, also where it splits them.

    Where a user lets fp16 be added up in fp16, torch refuses to give such a product a result in fp32.
    """
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_accumulation
    split_k = matmul.allow_bf16_reduced_precision_reduction_split_k  # which an assignment of one bool would allow
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_accumulation = (False, split_k), False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before[0], split_k
        matmul.allow_fp16_accumulation = before[1]


def as_operand(tensor: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Round `tensor` to `compute_dtype`, and hold it in the dtype that the products here take.

    That is fp32 (or float64), except bf16 on CUDA, where the hardware multiplies bf16 into fp32 directly.
    """
    if compute_dtype == torch.bfloat16 and tensor.is_cuda:
        return tensor.to(compute_dtype)
    return tensor.to(compute_dtype).to(accumulation_dtype(compute_dtype))


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write `a @ b` into `out`, in fp32 (or float64); operands as from `as_operand`, or fp32, rounded here on CUDA."""
    if b.dtype == torch.bfloat16:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


def accumulate_product(accumulator: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add `a @ b` to `accumulator`, in fp32 (or float64); operands as in `product`."""
    if b.dtype == torch.bfloat16:
        return torch.addmm(accumulator, a.to(b.dtype), b, out_dtype=torch.float32, out=accumulator)
    return accumulator.addmm_(a, b)


def in_range(upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Bring gradients into the range of the dtype that dz is held in.

    Returns `upstream` fp32 [rows] divided by a unit, and the unit; None for a unit of 1. fp16 ends at 6e-8, so there
    the largest gradient that is finite becomes 1.
    """
    if dtype != torch.float16 or not upstream.numel():
        return upstream, None
    unit = torch.where(upstream.isfinite(), upstream.abs(), 0.0).amax().clamp_(min=torch.finfo(torch.float32).tiny)
    return upstream / unit, unit


def matmul_fp32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply plain tensors, `a @ b`, accumulated and returned in fp32; `b` is taken in the dtype of `a`."""
    b = b.to(a.dtype)
    if has_fp32_result(a):
        with fp32_sums():
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
    with matmul_precision(torch.float32):
        return torch.mm(a.float(), b.float(), out=out)


def add_matmul_fp32(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `sums` in fp32, the product never by itself in memory; operands as in `matmul_fp32`."""
    b = b.to(a.dtype)
    if has_fp32_result(a):
        with fp32_sums():
            torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
        return
    with matmul_precision(torch.float32):
        sums.addmm_(a.float(), b.float())


def has_fp32_result(a: Tensor) -> bool:
    """Tell whether half-precision tensors such as `a` have a product with a fp32 result: not on CPUs."""
    return a.is_cuda and a.dtype != torch.float32
