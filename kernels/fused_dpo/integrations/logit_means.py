"""The mean of logits that were never made, which some trainers log."""

import torch
from torch import Tensor

from fused_dpo.head import LMHead


@torch.no_grad()
def mean_logits(hidden: Tensor, head: LMHead, counts: Tensor | None = None) -> Tensor:
    """Compute the mean over rows and vocabulary of the logits, from the means of hidden states and head.

    Logits are linear in both: their mean is `mean(hidden) @ mean(weight) + mean(bias)`, times scale over temperature.

    Args:
        hidden: [T, D], or [..., D].
        head: what makes the logits of them. A softcap is not linear: then the result is NaN, as a number for the logits
            before it would be mistaken for theirs.
        counts: integers [T], how often each row counts; None for once each.

    Returns:
        fp32 [], without gradient; NaN of no rows.

    Numerics:
        Sums in float64, of the hidden states and the weight as they are stored.
    """
    head_device = head.weight.device
    if head.softcap is not None:
        return torch.full((), torch.nan, device=head_device)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if counts is None:
        row = hidden.mean(0, dtype=torch.float64)
    else:
        row = (hidden * counts[:, None].to(hidden.dtype)).sum(0, dtype=torch.float64) / counts.sum()
    row = row.to(head_device)
    mean = row @ head.weight.mean(0, dtype=torch.float64)
    if head.lora is not None:
        a, b, scale = head.lora
        mean = mean + scale * (a.double() @ row) @ b.mean(0, dtype=torch.float64)
    if head.bias is not None:
        mean = mean + head.bias.mean(dtype=torch.float64)
    return (mean * (head.logit_scale / head.temperature)).float()
