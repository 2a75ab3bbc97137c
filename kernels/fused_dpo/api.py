"""The public functions: hidden states and a language-model head in, log-probs out."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from fused_dpo.autograd import sequence_sum, token_logps
from fused_dpo.head import LMHead
from fused_dpo.options import KernelOptions
from fused_dpo.reference import reference_token_logps
from fused_dpo.stats import TokenStats
from fused_dpo.validation import Scoring, check_scoring, choose_implementation


class TokenLogps(NamedTuple):
    """Per-token results, each in the shape of the labels; 0 where a row is not scored."""

    logps: Tensor
    """Log-prob of the label that the row predicts, in nats. Differentiable."""
    entropy: Tensor | None = None
    """Entropy of the row's distribution in nats, if asked for. Not differentiable."""
    mean_logit: Tensor | None = None
    """Mean of the row's V logits, if asked for. Not differentiable."""
    is_top1: Tensor | None = None
    """bool: no token is likelier than the label, if asked for."""


def fused_dpo_logps(
    hidden_states: Tensor,
    lm_head: Tensor | LMHead,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    average: bool = False,
    ignore_index: int = -100,
    grad_mode: str | None = None,
    options: KernelOptions | None = None,
) -> Tensor:
    """Log-prob of every sequence, straight from hidden states and head: `log π(y|x) = Σ_t log π(y_t | x, y_<t)`.

    What it computes, without ever holding the logits::

        logits = (hidden_states @ lm_head.T)[:, :-1].float()
        token_logps = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        logps = token_logps.masked_fill(labels[:, 1:] == ignore_index, 0).sum(-1)

    Args:
        hidden_states: `[B, S, D]` (padded) or `[T, D]` (packed): the last hidden states of the model, after its final
            norm. bf16, fp16, fp32 or float64; any strides.
        lm_head: the weight `[V, D]`, or an `LMHead` for bias, scale, softcap, temperature or a low-rank adapter;
            `head_of(model)` reads one from a Hugging Face model. Of the dtype of the hidden states; under
            `torch.autocast` the weight may stay fp32 and takes part in autocast's dtype.
        labels: integers `[B, S]` or `[T]`, `ignore_index` wherever a token is not scored (prompt, padding).
        cu_seqlens: int32 `[N+1]`, offsets of the packed sequences, from 0 to T. Empty sequences are fine.
        shift: True for Hugging Face's labels (label i is token i, predicted by row i-1; the shift never crosses from
            one sequence to the next), False where row i already stands beside the label it predicts.
        average: divide by the number of scored tokens (at least 1).
        ignore_index: the label that is not scored, also when it lies within `[0, V)`.
        grad_mode: `"exact"`, or None for the default, which is exact.
        options: see `KernelOptions`.

    Returns:
        fp32 `[B]` or `[N]` (float64 for float64 inputs), in nats. A sequence without a scored token gives exactly 0 and
        a zero gradient.

    Raises:
        ValueError: shapes, devices or values that do not fit, labels outside `[0, V)` (found at once on a CPU or with
            `FUSED_DPO_DEBUG=1`; on an accelerator the sequence's log-prob is NaN instead, to spare a synchronisation).
        TypeError: dtypes that do not fit.
        NotImplementedError: sharded weights, and double backward.

    Numerics:
        Logits are accumulated and exponentiated in fp32, never rounded below; sums over a sequence are taken in
        float64 and rounded once. Bit-equal from run to run, and batch-invariant: a sequence's log-prob has the same
        bits whatever else is in the batch, packed or padded, with or without gradient. Gradients are accumulated in
        fp32 and rounded once to the dtype of their input; only those required are computed.

    Memory:
        Saved for backward: the inputs and 8 bytes a row. Peak beyond inputs and gradients: `options.workspace_mib`, a
        few numbers a row, and in the backward 4·D bytes a scored row (8·D for float64).

    Source:
        Rafailov et al., 2023, Direct Preference Optimization, arXiv 2305.18290, equation 7 takes these log-probs.
    """
    scoring, logps, _ = _score(
        hidden_states, lm_head, labels, cu_seqlens, shift, ignore_index, grad_mode, options, want_stats=False
    )
    sums = sequence_sum(logps, scoring.cu_seqlens)
    if not average:
        return sums
    counts = sequence_sum((scoring.target >= 0).to(sums.dtype), scoring.cu_seqlens)
    return sums / counts.clamp(min=1)


def fused_token_logps(
    hidden_states: Tensor,
    lm_head: Tensor | LMHead,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    with_stats: Collection[str] = (),
    grad_mode: str | None = None,
    options: KernelOptions | None = None,
) -> TokenLogps:
    """Log-prob of every token, and on request what the distribution around it looks like.

    Args, errors, numerics and memory as in `fused_dpo_logps`, and:

    Args:
        with_stats: names out of `"entropy"`, `"mean_logit"`, `"is_top1"` to compute in the same pass over the head.

    Returns:
        A `TokenLogps` of fp32 tensors in the shape of `labels`. With `shift=True` entry i belongs to the token that
        row i predicts, label i+1, so the last entry of every sequence is 0.
    """
    known = TokenLogps._fields[1:]
    for name in with_stats:
        if name not in known:
            raise ValueError(f"with_stats takes names out of {known}, got {name!r}.")
    scoring, logps, stats = _score(
        hidden_states, lm_head, labels, cu_seqlens, shift, ignore_index, grad_mode, options, want_stats=bool(with_stats)
    )
    shape = scoring.labels_shape
    if stats is None:
        return TokenLogps(logps.view(shape))
    return TokenLogps(
        logps.view(shape),
        stats.entropy.view(shape) if "entropy" in with_stats else None,
        stats.mean_logit.view(shape) if "mean_logit" in with_stats else None,
        (stats.is_top1 > 0).view(shape) if "is_top1" in with_stats else None,
    )


def _score(
    hidden_states: Tensor,
    lm_head: Tensor | LMHead,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    grad_mode: str | None,
    options: KernelOptions | None,
    *,
    want_stats: bool,
) -> tuple[Scoring, Tensor, TokenStats | None]:
    """Flat per-token log-probs [T] by the implementation that the options name."""
    if grad_mode not in (None, "exact"):
        raise ValueError(f"grad_mode must be None or 'exact', got {grad_mode!r}.")
    options = options or KernelOptions()
    scoring = check_scoring(
        hidden_states,
        lm_head,
        labels,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        options=options,
    )
    impl = choose_implementation(options.impl, scoring.hidden)
    if impl == "reference":
        with torch.autocast(scoring.hidden.device.type, enabled=False):
            logps, stats = reference_token_logps(scoring.hidden, scoring.target, options.row_index, scoring.head)
    else:
        logps, stats = token_logps(
            scoring.hidden,
            scoring.target,
            options.row_index,
            scoring.head,
            impl,
            options.workspace_mib,
            want_stats=want_stats,
        )
    return scoring, logps, stats
