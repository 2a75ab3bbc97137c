"""Which implementation runs in the operators, by name, and with which tile shapes.

Triton is imported by the first call that runs it, so everything of `fused_dpo.gpu` is imported inside functions.
"""

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from fused_dpo.filtering import Filtering
from fused_dpo.head import HeadGrads, HeadInputs, Needs
from fused_dpo.stats import SoftmaxState, TokenStats
from fused_dpo.streaming.exact import streaming_backward, streaming_forward
from fused_dpo.streaming.filtered_backward import filtered_backward
from fused_dpo.streaming.filtered_forward import filtered_forward
from fused_dpo.streaming.screener import screen_shape

if TYPE_CHECKING:
    from fused_dpo.gpu.exponentials import Exponentials


def run_exact_forward(
    impl: str, inputs: HeadInputs, *, want_stats: bool, exponentials: "Exponentials | None" = None
) -> tuple[Tensor, SoftmaxState, TokenStats | None]:
    """Run the exact forward of an implementation; with `exponentials`, of triton's, save them there."""
    if impl == "streaming":
        return streaming_forward(inputs, want_stats=want_stats)
    from fused_dpo.gpu.forward import fused_scan, triton_forward

    if impl == "library":
        from fused_dpo.gpu.library import library_scan

        return triton_forward(inputs, library_scan, want_stats=want_stats)
    from fused_dpo.gpu.autotune import choose_config
    from fused_dpo.gpu.exponentials import forward_config

    hidden, head = inputs.hidden, inputs.head
    if exponentials is None:
        config = choose_config(hidden, head, want_stats=want_stats)
    else:
        config = forward_config(hidden, head)
    return triton_forward(inputs, partial(fused_scan, config=config, exponentials=exponentials), want_stats=want_stats)


def run_exact_backward(
    impl: str,
    dlogps: Tensor,
    inputs: HeadInputs,
    state: SoftmaxState,
    *,
    needs: Needs,
    exponentials: "Exponentials | None" = None,
) -> HeadGrads:
    """Run the exact backward of an implementation; the weight's gradient is written over `exponentials`, if given."""
    if impl == "streaming":
        return streaming_backward(dlogps, inputs, state, needs=needs)
    from fused_dpo.gpu.backward import DLogits, triton_backward

    if impl == "library":
        from fused_dpo.gpu.library import library_dlogits

        return triton_backward(dlogps, inputs, state, library_dlogits, needs=needs)
    from fused_dpo.gpu.autotune import choose_config
    from fused_dpo.gpu.backward_from_exponentials import DLogitsOfExponentials

    config = choose_config(inputs.hidden, inputs.head, want_stats=False)
    if exponentials is None:
        return triton_backward(dlogps, inputs, state, partial(DLogits, config=config), needs=needs)
    form_dlogits = partial(DLogitsOfExponentials, exponentials, config=config)
    return triton_backward(dlogps, inputs, state, form_dlogits, needs=needs, dweight=exponentials.gradient)


def run_filtered_forward(
    impl: str,
    inputs: HeadInputs,
    filtering: Filtering,
    cu_seqlens: Tensor,
    shape: tuple[int, int, int],
    *,
    want_stats: bool,
) -> tuple[Tensor, SoftmaxState, TokenStats | None, Tensor]:
    """Run the filtered forward of an implementation, for a screen of `shape`."""
    if impl == "streaming":
        return filtered_forward(inputs, filtering, cu_seqlens=cu_seqlens, screen_shape=shape, want_stats=want_stats)
    from fused_dpo.gpu.filtered.blocks import screening_config
    from fused_dpo.gpu.filtered.forward import triton_filtered_forward
    from fused_dpo.gpu.forward import Scan, fused_scan
    from fused_dpo.gpu.library import library_scan

    scan: Scan = library_scan
    if impl == "triton":
        scan = partial(fused_scan, config=screening_config(inputs.hidden, inputs.head, want_stats=want_stats))
    return triton_filtered_forward(inputs, filtering, scan, screen_shape=shape, want_stats=want_stats)


def run_filtered_backward(
    impl: str,
    dlogps: Tensor,
    inputs: HeadInputs,
    state: SoftmaxState,
    screen: Tensor,
    filtering: Filtering,
    cu_seqlens: Tensor,
    *,
    needs: Needs,
) -> HeadGrads:
    """Run the filtered backward of an implementation; `library` has triton's, which multiplies what is kept alone."""
    if impl == "streaming":
        return filtered_backward(dlogps, inputs, state, screen, filtering, cu_seqlens=cu_seqlens, needs=needs)
    from fused_dpo.gpu.filtered.backward import triton_filtered_backward

    return triton_filtered_backward(dlogps, inputs, state, screen, filtering, needs=needs)


def shape_of_screen(impl: str, inputs: HeadInputs, num_rows: int, cu_seqlens: Tensor) -> tuple[int, int, int]:
    """Tell the shape of a screen for at most `num_rows` scored rows, by shapes alone: nothing has to be read for it."""
    hidden, head = inputs.hidden, inputs.head
    if impl == "streaming":
        return screen_shape(hidden, head, num_rows, cu_seqlens.shape[0] - 1, inputs.workspace_mib, inputs.shard)
    from fused_dpo.gpu.filtered.blocks import triton_screen_shape

    return triton_screen_shape(hidden, head, num_rows)
