"""Attention over packed rows, registered with transformers under the name `fused_dpo`.

transformers hands every keyword argument of `model(...)` that it does not know to the attention function, also through
gradient checkpointing and peft: that is how the plan of a batch and the backend get here. It makes the masks before it,
by a function of the same name that sees none of these arguments: `packed_call` tells it that no mask is wanted, as what
a token may see follows from the plan alone. Any other call of the model has its masks and caches as it would have under
SDPA, so that a model that trains packed still generates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fused_dpo_engine.attention.call import AttentionCall, Backend
from fused_dpo_engine.attention.plan import AttentionPlan
from fused_dpo_engine.attention.segments import masked_attention, segment_attention
from fused_dpo_engine.errors import UnsupportedModelError

ATTENTION_NAME = "fused_dpo"


class _Calls(local):
    """What this thread is about to do; a context variable would say it too, but `torch.compile` cannot read one.

    Nor can it of torch 2.11 where the class has a value too: it then takes that of the class.
    """

    def __init__(self) -> None:
        self.packed = False


_calls = _Calls()


@contextmanager
def packed_call() -> Iterator[None]:
    """Build no masks within the block, where the model is called with a plan."""
    before, _calls.packed = _calls.packed, True
    try:
        yield
    finally:
        _calls.packed = before


def mask_beside_plan(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the mask that SDPA takes, [B, 1, T, S], or None if causality says it all; within `packed_call` always None.

    Args and kwargs are those of `transformers.masking_utils.sdpa_mask`.
    """
    return None if _calls.packed else sdpa_mask(*args, **kwargs)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    fused_dpo_plan: AttentionPlan | None = None,
    fused_dpo_backend: Backend = segment_attention,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal self-attention of every segment of the packed row over its shared prefix and itself.

    Without a plan it is the attention of an ordinary call: padded on either side, with a cache, or of a layer that sees
    in both directions. Dropout is not applied: policy and reference have to see the same function.

    Args:
        module: the attention layer.
        query: [B, H, T, head dim].
        key: [B, H_kv, S, head dim], H a multiple of H_kv; S is T but with a cache.
        value: [B, H_kv, S, value dim].
        attention_mask: None with a plan; otherwise bool [B, 1 or H, T, S], True where a token is seen, or a number to
            add to each score; None if the last T of S tokens see themselves and all before them.
        scaling: factor on the scores; None for 1/sqrt(head dim).
        dropout: ignored.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; a mask has it in it.
        softcap: bound of the scores, `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: attention sinks [H] (gpt-oss).
        is_causal: False if a token sees those after it too; None for what the layer says.
        fused_dpo_plan: the segments of a packed row; then B = 1.
        fused_dpo_backend: what computes them.

    Returns:
        [B, T, H, value dim], and None for the attention weights.

    Raises:
        ValueError: the plan is of another row, or there is a mask beside it.
        UnsupportedModelError: a plan for a layer that sees in both directions.
    """
    causal = getattr(module, "is_causal", True) is not False if is_causal is None else is_causal
    call = AttentionCall(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    if fused_dpo_plan is None:
        return masked_attention(query, key, value, attention_mask, call, causal=causal), None
    if attention_mask is not None:
        raise ValueError("a plan takes no attention_mask beside it; pass attention_mask=None, within packed_call().")
    if not causal:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends in both directions; only causal models are packed."
        )
    if query.shape[0] != 1 or query.shape[2] != fused_dpo_plan.num_rows:
        raise ValueError(
            f"the plan covers one row of {fused_dpo_plan.num_rows} tokens, the batch has {query.shape[0]} of "
            f"{query.shape[2]}."
        )
    return fused_dpo_backend(query, key, value, fused_dpo_plan, call), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, mask_beside_plan)
