"""Compare an attention backend with SDPA a segment, values and gradients, on the user's device."""

import math

import torch
from torch import Tensor

from fused_dpo_engine.attention.call import AttentionCall, Backend
from fused_dpo_engine.attention.choice import AttentionNeeds
from fused_dpo_engine.attention.plan import Segment, plan_attention
from fused_dpo_engine.attention.segments import segment_attention
from fused_dpo_engine.errors import UserError, first_line

ANOTHER = "Others are --attention varlen, flex and sdpa."


def verify_backend(
    name: str, backend: Backend, needs: AttentionNeeds, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare a backend with `segment_attention` in fp32 on a small shared plan, values and gradients, on this device.

    What a release of a kernel may do otherwise (a diagonal aligned top-left, a window one wider) is silent elsewhere.
    Segments and window are longer than a kernel's tiles, and the softcap is low enough for scores of size 1 to show it.

    Raises:
        UserError: they differ by more than the rounding of `dtype`, or the backend fails.
    """
    window = None if needs.window is None else min(needs.window, 150)
    softcap = None if needs.softcap is None else min(needs.softcap, 2.0)
    plan = plan_attention([Segment(0, 500, 0, 0), Segment(500, 560, 0, 400), Segment(560, 900, 2, 0)]).to(device)
    random = torch.Generator().manual_seed(0)
    heads = (needs.num_heads, needs.num_kv_heads, needs.num_kv_heads)
    widths = (needs.head_dim, needs.head_dim, needs.value_dim)
    rows = plan.num_rows
    tensors = [torch.randn(1, h, rows, w, generator=random).to(dtype) for h, w in zip(heads, widths, strict=True)]
    sinks = torch.randn(needs.num_heads, generator=random).to(device) if needs.sinks else None
    call = AttentionCall(1 / math.sqrt(needs.head_dim), window, softcap, sinks)
    upstream = torch.randn(1, rows, needs.num_heads, needs.value_dim, generator=random)

    def run(function: Backend, kind: torch.dtype) -> list[Tensor]:
        q, k, v = (tensor.to(device, kind).requires_grad_() for tensor in tensors)
        with torch.enable_grad():
            out = function(q, k, v, plan, call)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(device, kind))]

    bound = 4 * torch.finfo(dtype).eps
    true_ones = run(segment_attention, torch.float32)
    try:
        got_ones = run(backend, dtype)
    except Exception as error:  # a kernel of another device, a compiler that fails, other arguments
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"attention backend {name} fails on this device: {reason} {ANOTHER}") from error
    for what, got, true in zip(("output", "query", "key", "value"), got_ones, true_ones, strict=True):
        error = float((got.float() - true).norm() / true.norm())
        if not error <= bound:
            kind = what if what == "output" else f"gradient of the {what}"
            raise UserError(
                f"attention backend {name} does not compute what it should on this device: relative error {error:.2g} "
                f"of the {kind} (bound {bound:.2g}). {ANOTHER}"
            )
