"""Which implementation runs in the operators, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from fused_dpo.head import HeadGrads, LMHead, LowRankAdapter
from fused_dpo.streaming.exact import streaming_backward, streaming_forward
from fused_dpo.streaming.filtered import filtered_backward, filtered_forward
from fused_dpo.streaming.screener import screen_shape


class Filtering(NamedTuple):
    """Columns that the gradients may leave out; see `KernelOptions` for both numbers. `eps` 0 is the exact path."""

    eps: float
    tail_guard: float


def head_of_parts(
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> LMHead:
    """Put a head together again from what an operator takes."""
    lora = None if lora_a is None or lora_b is None else LowRankAdapter(lora_a, lora_b, lora_scale)
    return LMHead(weight, bias, logit_scale, softcap or None, temperature, lora)


def exact(impl: str) -> tuple[Callable[..., Any], Callable[..., HeadGrads]]:
    """Exact forward and backward by name. Triton is imported on the first call that runs it."""
    if impl == "streaming":
        return streaming_forward, streaming_backward
    from fused_dpo.gpu.backward import triton_backward
    from fused_dpo.gpu.forward import triton_forward

    if impl == "library":
        from fused_dpo.gpu.library import library_dlogits, library_scan

        return partial(triton_forward, scan=library_scan), partial(triton_backward, form_dlogits=library_dlogits)
    return triton_forward, triton_backward


def filtered(impl: str) -> tuple[Callable[..., Any], Callable[..., HeadGrads]]:
    """Filtered forward and backward by name."""
    if impl == "streaming":
        return filtered_forward, partial(filtered_backward, exact_backward=streaming_backward)
    from fused_dpo.gpu.filtered.backward import triton_filtered_backward
    from fused_dpo.gpu.filtered.forward import triton_filtered_forward

    if impl == "library":
        from fused_dpo.gpu.library import library_scan

        return partial(triton_filtered_forward, scan=library_scan), triton_filtered_backward
    return triton_filtered_forward, triton_filtered_backward


def scored_rows(target: Tensor, row_index: Tensor | None) -> Tensor:
    """Contiguous: kernels read them by position."""
    return (target >= 0).nonzero().squeeze(1) if row_index is None else row_index.contiguous()


def shape_of_screen(
    hidden: Tensor, head: LMHead, row_index: Tensor | None, cu_seqlens: Tensor, impl: str, workspace_mib: int
) -> tuple[int, int, int]:
    """Shape of the screen, by shapes alone: as if all rows were scored, so that nothing has to be read for it."""
    rows = hidden.shape[0] if row_index is None else row_index.shape[0]
    if impl == "streaming":
        return screen_shape(hidden, head, rows, cu_seqlens.shape[0] - 1, workspace_mib)
    from fused_dpo.gpu.filtered.blocks import triton_screen_shape

    return triton_screen_shape(hidden, head, rows)
