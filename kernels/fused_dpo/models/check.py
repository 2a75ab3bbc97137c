"""Compare a head as it is read with the model's own logits."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fused_dpo.api import fused_token_logps
from fused_dpo.head import LMHead
from fused_dpo.models.fused_head import FusedHead
from fused_dpo.models.head import head_of
from fused_dpo.models.parts import backbone_of, causal_model

_ROWS = 8
_EXACT = 1e-3
"""Bound in nat where logits are not rounded: fp32 sums of thousands of products differ by 1e-5, and what can be read
wrongly (a scale, a softcap, a bias, an adapter) was off by 0.01 or more in every family that was tried."""


@torch.no_grad()
def check_head(model: nn.Module, input_ids: Tensor) -> float:
    """Compare log-probs from `head_of` and `backbone_of` with those of the model's own logits.

    No list of models is ever complete; this asks the model. Of each of the first rows of one sequence the likeliest
    token, the least likely one and the one of `input_ids` are scored both ways. Modes, gradients and caches of the
    model are left as they were; it computes in eval mode, twice, on at most 8 tokens.

    Args:
        model: as `head_of` takes it; with prompt learning the model below it, without virtual tokens. An
            encoder-decoder is given `input_ids` on both sides, and its own last decoder states are taken.
        input_ids: integers `[S]` or `[B, S]` on the model's device; the first 8 of the first sequence are taken.

    Returns:
        The largest difference, in nats.

    Raises:
        ValueError: it exceeds the bound, so that training with this head would train another model; or no tokens.
        TypeError, NotImplementedError: see `head_of` and `backbone_of`.

    Numerics:
        The bound is 1e-3 nat, or `8 u max|logit|` where that is more, with u the unit roundoff of the dtype that the
        model computes in (2^-8 for bfloat16): its own logits are rounded by their product and by up to three
        operations of scale and softcap, in the label's logit and in the log-sum-exp.
    """
    causal = causal_model(model)
    head_of(causal)  # in the mode that it is in: dropout on the head is refused in training
    if not input_ids.numel():
        raise ValueError(f"check_head needs at least one token, got input_ids {list(input_ids.shape)}.")
    ids = input_ids.reshape(-1, input_ids.shape[-1])[:1, :_ROWS]
    with _eval_mode(causal):
        hidden, logits = _both(causal, ids)
        hidden = hidden[0, -ids.shape[1] :]
        logits = logits[0, -ids.shape[1] :]
        own = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        labels = torch.cat((own.argmax(-1), own.argmin(-1), ids[0].clamp(max=own.shape[-1] - 1)))
        head = FusedHead(causal)
        try:
            ours = head.run(_logps, hidden.repeat(3, 1), labels=labels)
        finally:
            if not head.shared:
                head.remove()
        expected = own.repeat(3, 1).gather(-1, labels[:, None])[:, 0]
    error = float((ours - expected).abs().max())
    bound = max(_EXACT, 8 * _unit_roundoff(hidden) * float(logits.abs().max()))
    if not error <= bound:
        raise ValueError(
            f"the head of {type(causal).__name__} is not read as the model applies it: log-probs differ from its own "
            f"logits' by {error:.3g} nat, more than rounding explains (bound {bound:.2g}); please report this model, "
            f"and pass an LMHead made by hand, with the weight, bias, logit_scale and softcap of its forward."
        )
    return error


def _both(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute hidden states as the head takes them, and the model's own logits."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        output = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True, use_cache=False)
        return output.decoder_hidden_states[-1], output.logits
    hidden = _call(backbone_of(model), ids).last_hidden_state
    return hidden, _call(model, ids).logits


def _call(module: nn.Module, ids: Tensor) -> Any:
    parameters = inspect.signature(module.forward).parameters
    no_cache = "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return module(input_ids=ids, **({"use_cache": False} if no_cache else {}))


def _logps(head: LMHead, hidden: Tensor, *, labels: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(head.weight.dtype)  # some models leave their norm's fp32
    offsets = torch.tensor([0, len(labels)], dtype=torch.int32, device=labels.device)
    return fused_token_logps(hidden, head, labels, cu_seqlens=offsets, shift=False).logps


def _unit_roundoff(hidden: Tensor) -> float:
    """Relative error of one rounding of the model's own logits."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    reduced = {"high": 2.0**-11, "medium": 2.0**-8}.get(torch.get_float32_matmul_precision(), 0.0)
    return max(torch.finfo(dtype).eps / 2, reduced if dtype == torch.float32 else 0.0)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off within the block; each module then has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
