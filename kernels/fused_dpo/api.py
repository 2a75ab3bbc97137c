"""The public functions: hidden states and a language-model head in, log-probs out."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from fused_dpo.filtering import Filtering
from fused_dpo.head import LMHead
from fused_dpo.ops.sequence_sum import sequence_sum
from fused_dpo.ops.token_logps import nothing_filtered, token_logps
from fused_dpo.options import KernelOptions
from fused_dpo.oracle import reference_token_logps
from fused_dpo.stats import FilterStats, TokenStats
from fused_dpo.transforms import refuse_transforms
from fused_dpo.validation import Scoring, check_scoring, choose_filter_eps, choose_implementation
from fused_dpo.vocab_parallel.shard import local_head

_SOFTMAX_STATS = frozenset(TokenStats._fields)
"""Stats that cost work in the pass over the head."""


class TokenLogps(NamedTuple):
    """Per-token results, each in the shape of the labels; 0 where a row is not scored."""

    logps: Tensor
    """Log-prob of the label that the row predicts, in nats. Differentiable."""
    entropy: Tensor | None = None
    """Entropy of the row's distribution in nats, if asked for. Not differentiable."""
    mean_logit: Tensor | None = None
    """Mean of the row's V logits, if asked for. Not differentiable."""
    is_top1: Tensor | None = None
    """bool: no token is likelier than the label, if asked for. Of several equal maxima every one is top-1; in
    `logits.argmax(-1) == labels` it is the first alone."""
    log_sum_sq_probs: Tensor | None = None
    """`log sum_v p_v^2` of the row's distribution in nats, if asked for: from -log V (flat) to 0 (one token has all).
    Not differentiable."""
    tail: Tensor | None = None
    """Mass of the tokens that the filter calls small, if asked for: see `FilterStats`. 0 with exact gradients."""
    kept_fraction: Tensor | None = None
    """Fraction of the vocabulary that it does not, if asked for. 1 with exact gradients."""


def fused_dpo_logps(
    hidden_states: Tensor,
    lm_head: Tensor | LMHead,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    average: bool = False,
    ignore_index: int = -100,
    row_index: Tensor | None = None,
    grad_mode: str | None = None,
    options: KernelOptions | None = None,
) -> Tensor:
    """Compute the log-prob of every sequence from hidden states and head: `log π(y|x) = Σ_t log π(y_t | x, y_<t)`.

    What it computes, without ever holding the logits::

        logits = (hidden_states @ lm_head.T)[:, :-1].float()
        token_logps = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        logps = token_logps.masked_fill(labels[:, 1:] == ignore_index, 0).sum(-1)

    Args:
        hidden_states: `[B, S, D]` (padded) or `[T, D]` (packed, or `[1, T, D]` with labels `[1, T]`): the last hidden
            states of the model, after its final norm. bf16, fp16, fp32 or float64; any strides.
        lm_head: the weight `[V, D]`, or an `LMHead` for bias, scale, softcap, temperature or a low-rank adapter;
            `head_of(model)` reads one from a Hugging Face model. Of the dtype of the hidden states; under
            `torch.autocast` the weight may stay fp32 and takes part in autocast's dtype. With `LMHead.process_group`
            the weight is this rank's rows of a vocabulary that is split over ranks, V is that of all of them, and every
            rank makes the same call with the same hidden states and labels.
        labels: integers `[B, S]` or `[T]`, `ignore_index` wherever a token is not scored (prompt, padding).
        cu_seqlens: int32 `[N+1]`, offsets of the packed sequences, from 0 to T. Empty sequences are fine.
        shift: True for Hugging Face's labels (label i is token i, predicted by row i-1; the shift never crosses from
            one sequence to the next), False where row i already stands beside the label it predicts.
        average: divide by the number of scored tokens (at least 1).
        ignore_index: the label that is not scored, also when it lies within `[0, V)`.
        row_index: int64 `[R]`, ascending: the rows (of the flattened hidden states) that predict a scored label, for
            callers who know them on the host. Saves a device synchronisation on CUDA. Rows left out are not scored.
        grad_mode: `"exact"`; `"filtered"`, which computes the gradient of each block of rows from the tokens that
            matter to it, within `options.filter_eps` and `options.tail_guard` (screen, keep, correct: the algorithm and
            its error bound are in `fused_dpo.filtering`); or None: filtered for bf16 and fp16, exact for fp32, float64
            and `impl="reference"`.
        options: see `KernelOptions`.

    Returns:
        fp32 `[B]` or `[N]` (float64 for float64 inputs), in nats. A sequence without a scored token gives exactly 0 and
        a zero gradient.

    Raises:
        ValueError: shapes, devices or values that do not fit, labels outside `[0, V)` (found at once on a CPU or with
            `FUSED_DPO_DEBUG=1`; on an accelerator the sequence's log-prob is NaN instead, to spare a synchronisation);
            there also ranks of a split head that were given different calls.
        TypeError: dtypes that do not fit.
        NotImplementedError: DTensors without a `process_group`; and, but for `impl="reference"`, double backward,
            forward-mode derivatives and what `torch.func` differentiates. `vmap` without gradients works: one call of a
            kernel for each element.

    Numerics:
        Logits are accumulated and exponentiated in fp32, never rounded below; sums over a sequence are taken in
        float64 and rounded once. Bit-equal from run to run, and batch-invariant: a sequence's log-prob has the same
        bits whatever else is in the batch, packed or padded, with or without gradient; but `impl="streaming"` on CUDA,
        which float64 takes there, leaves sums of rows to torch, and their order to it. Gradients are accumulated in
        fp32 and rounded once to the dtype of their input; only those required are computed. With filtered gradients on
        a CPU with bf16 units, tokens of tiny probability take part in the log-sum-exp with logits rounded to bf16,
        unless the head has a bias, a scale, a softcap or a temperature. A row without upstream gradient adds nothing,
        whatever its hidden states are on a CPU, and on CUDA if these are finite: there zero times NaN is NaN.

        A head split over ranks has the log-probs of one process, bit for bit, where ranks meet between two tiles: at
        multiples of 4096 tokens on CUDA, between two slices of the vocabulary with streaming. The gradients of weight,
        bias and the adapter's b then are those of one process too; on CUDA as far as the library's matmul gives an
        entry the same bits in a product with fewer columns. Elsewhere other tiles round otherwise, by a few units in
        the last place of the largest. Gradients of the hidden states and of the adapter's a are summed over the ranks
        in fp32, and are the same on all of them. Ranks never screen with rounded logits.

    Memory:
        Saved for backward: the inputs and 12 bytes a row; with filtered gradients 20 bytes a row, and 2·V bytes a
        block of up to 128 rows of one sequence, scored or not; with `options.reuse_exponentials` the memory of the
        weight's gradient, and 4 bytes a kept row and tile of 128 or 256 columns. Peak beyond inputs and gradients:
        `options.workspace_mib`, a few numbers a row, and in the backward 4·D bytes a scored row (8·D for float64); with
        filtered gradients another V bytes a block, on CUDA 5·V bytes a block and V/64 bytes a row. With streaming the
        forward has 8 bytes (20 with stats) a scored row and slice of up to 2048 tokens. Of a split head V is the rows
        here.

    Communication of a split head, over R scored rows:
        4·R bytes for the largest logits and 32·R for the rest of the forward, 4·R·(D + r) for the gradient of the
        hidden states in the backward; filtered also 16·R and a few bytes a block.

    Source:
        Rafailov et al., 2023, Direct Preference Optimization, arXiv 2305.18290, equation 7 takes these log-probs.
    """
    scoring, logps, _, _ = _score(
        hidden_states, lm_head, labels, cu_seqlens, shift, ignore_index, row_index, grad_mode, options, want_stats=False
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
    row_index: Tensor | None = None,
    with_stats: Collection[str] = (),
    grad_mode: str | None = None,
    options: KernelOptions | None = None,
) -> TokenLogps:
    """Compute the log-prob of every token, and on request what the distribution around it looks like.

    Args, errors, numerics and memory as in `fused_dpo_logps`, and:

    Args:
        with_stats: names out of `"entropy"`, `"mean_logit"`, `"is_top1"`, `"log_sum_sq_probs"` to compute in the same
            pass over the head, and of `"tail"`, `"kept_fraction"`, which are known anyway.

    Returns:
        A `TokenLogps` of tensors in the shape of `labels`: fp32 (float64 for float64 inputs), but for `is_top1`, which
        is bool, and True for every one of several equal maxima. With `shift=True` entry i belongs to the token that row
        i predicts, label i+1, so the last entry of every sequence is 0.

    Numerics:
        `log_sum_sq_probs` never overflows, and is within 3e-7 of float64's, times log V or the largest logit's
        magnitude, whichever is larger; in float64 within 1e-12 times that. Wherever log-probs are computed with rounded
        numbers (an adapter's inner product in half precision, the tokens of tiny probability under a coarse screen of
        filtered gradients), so is this.

    Source:
        Zhou et al., 2024, WPO, arXiv 2406.11827, weighs a sequence by exp of the sum or mean of `logps -
        log_sum_sq_probs` over its tokens.
    """
    known = TokenLogps._fields[1:]
    for name in with_stats:
        if name not in known:
            raise ValueError(f"with_stats takes names out of {known}, got {name!r}.")
    scoring, logps, stats, filter_stats = _score(
        hidden_states,
        lm_head,
        labels,
        cu_seqlens,
        shift,
        ignore_index,
        row_index,
        grad_mode,
        options,
        want_stats=not _SOFTMAX_STATS.isdisjoint(with_stats),
    )
    named = {**(stats._asdict() if stats else {}), **filter_stats._asdict()}
    chosen = {name: named[name].view(scoring.labels_shape) for name in with_stats}
    if "is_top1" in chosen:
        chosen["is_top1"] = chosen["is_top1"] > 0
    return TokenLogps(logps.view(scoring.labels_shape), **chosen)


def _score(
    hidden_states: Tensor,
    lm_head: Tensor | LMHead,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    row_index: Tensor | None,
    grad_mode: str | None,
    options: KernelOptions | None,
    *,
    want_stats: bool,
) -> tuple[Scoring, Tensor, TokenStats | None, FilterStats]:
    """Compute flat per-token log-probs [T] by the implementation that the options name."""
    options = options or KernelOptions()
    head = local_head(lm_head if isinstance(lm_head, LMHead) else LMHead(lm_head))
    if options.impl != "reference":
        refuse_transforms((hidden_states, *head.differentiable))
    scoring = check_scoring(
        hidden_states,
        head,
        labels,
        cu_seqlens=cu_seqlens,
        shift=shift,
        ignore_index=ignore_index,
        row_index=row_index,
    )
    impl = choose_implementation(options.impl, scoring.hidden)
    filtering = Filtering(choose_filter_eps(grad_mode, impl, scoring.hidden.dtype, options), options.tail_guard)
    if impl == "reference":
        if scoring.shard is not None:
            raise ValueError("impl='reference' takes a head that is whole; leave process_group out, or take another.")
        with torch.autocast(scoring.hidden.device.type, enabled=False):
            logps, stats = reference_token_logps(scoring.hidden, scoring.target, row_index, scoring.head)
        return scoring, logps, stats, nothing_filtered(scoring.target, logps.dtype)
    logps, stats, filter_stats = token_logps(
        scoring.hidden,
        scoring.target,
        scoring.cu_seqlens,
        row_index,
        scoring.head,
        impl,
        options.workspace_mib,
        filtering,
        want_stats=want_stats,
        reuse_exponentials=options.reuse_exponentials,
        shard=scoring.shard,
    )
    return scoring, logps, stats, filter_stats
