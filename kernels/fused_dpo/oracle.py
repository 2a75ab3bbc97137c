"""The oracle: full logits, plain torch, differentiable any number of times."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_dpo.head import LMHead
from fused_dpo.stats import TokenStats
from fused_dpo.transforms import is_batched


def reference_token_logps(
    hidden: Tensor, target: Tensor, row_index: Tensor | None, head: LMHead
) -> tuple[Tensor, TokenStats]:
    """Compute per-token log-probs through the full `[R, V]` logits.

    `logps = log_softmax(logits.float()).gather(target)` on the scored rows. Half-precision inputs are converted to fp32
    before the matmul, float64 stays: against float64 inputs this is the truth the other implementations are held to.

    fp32 products follow torch's global matmul precision, forward and backward: leave it at "highest" for an oracle.

    Memory: about 4 x R x V numbers in fp32 with gradients. For tests and small problems.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = _rows_to_compute(target) if row_index is None else row_index
    V = head.weight.shape[0]
    row_target = target[rows]
    not_scored = row_target < 0
    h = hidden[rows].masked_fill(not_scored[:, None], 0).to(dtype)
    # Rounded to the compute dtype first: under autocast a fp32 weight takes part as its half-precision value.
    logits = h @ head.weight.to(hidden.dtype).to(dtype).T
    if head.lora is not None:
        a, b, scale = head.lora
        logits = logits + scale * (h @ a.to(hidden.dtype).to(dtype).T) @ b.to(hidden.dtype).to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature

    logps = F.log_softmax(logits, dim=-1)
    picked = logps.gather(1, row_target.clamp(0, V - 1)[:, None]).squeeze(1)
    picked = picked.masked_fill(row_target >= V, torch.nan)

    detached = logps.detach()
    entropy = -(detached.exp() * detached.nan_to_num(neginf=0.0)).sum(-1)
    is_top1 = picked.detach() >= detached.amax(-1)  # every one of several equal maxima
    # Sums of torch's own: those within its softmax are taken one by one, and lose a digit over large vocabularies.
    weights = (logits.detach() - logits.detach().amax(-1, keepdim=True)).exp()
    log_sum_sq_probs = (weights.square().sum(-1) / weights.sum(-1).square()).log()
    stats = TokenStats(entropy, logits.detach().mean(-1), is_top1.to(dtype), log_sum_sq_probs)

    def spread(values: Tensor) -> Tensor:
        """Put values of scored rows back among all rows, 0 elsewhere."""
        return values.new_zeros(target.shape).index_copy(0, rows, values.masked_fill(not_scored, 0))

    # Adding an empty slice's sum keeps the result attached to the graph when no row is scored.
    return spread(picked) + hidden[:0].sum().to(dtype), TokenStats(*map(spread, stats))


def _rows_to_compute(target: Tensor) -> Tensor:
    """Find the scored rows; all of them where `vmap` runs over targets, as their number may differ."""
    if is_batched(target):
        return torch.arange(target.shape[0], device=target.device)
    return (target >= 0).nonzero().squeeze(1)
