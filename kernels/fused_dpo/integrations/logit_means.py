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
    return logits_of_mean(mean_row(hidden, counts), head)


@torch.no_grad()
def mean_row(hidden: Tensor, counts: Tensor | None = None) -> Tensor:
    """Compute the mean of hidden states over their rows, float64 [D]; arguments as in `mean_logits`."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if counts is None:
        return hidden.mean(0, dtype=torch.float64)
    return (hidden * counts[:, None].to(hidden.dtype)).sum(0, dtype=torch.float64) / counts.sum()


@torch.no_grad()
def logits_of_mean(row: Tensor, head: LMHead) -> Tensor:
    """Compute the mean logit of mean rows, float64 [..., D] -> fp32 [...]; the weight is read once for all of them."""
    if head.process_group is not None:
        raise NotImplementedError("the mean of all logits is not computed of a head that is split over ranks.")
    row = row.to(head.weight.device)
    if head.softcap is not None:
        return row.new_full(row.shape[:-1], torch.nan, dtype=torch.float32)
    mean = row @ head.weight.mean(0, dtype=torch.float64)
    if head.lora is not None:
        a, b, scale = head.lora
        mean = mean + scale * (row @ a.double().mT) @ b.mean(0, dtype=torch.float64)
    if head.bias is not None:
        mean = mean + head.bias.mean(dtype=torch.float64)
    return (mean * (head.logit_scale / head.temperature)).float()
