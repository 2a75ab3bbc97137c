"""Sequence log-probs for code that already holds the logits."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.func import debug_unwrap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False, ignore_index: int = -100) -> Tensor:
    """Compute sequence log-probs from full logits, for code that has them.

    `log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])` summed over the scored tokens of each sequence.

    Args:
        logits: `[B, S, V]`, any floating dtype; they may hold anything where nothing is scored.
        labels: `[B, S]` integers, not shifted; `ignore_index` on prompt and padding.
        average_log_prob: divide by the number of scored tokens, clamped at one.

    Returns:
        `[B]` fp32 (float64 for float64 logits). A sequence with nothing scored gives exactly 0 and zero gradient.

    Raises:
        ValueError: shapes do not match, or a label is neither in `[0, V)` nor `ignore_index`.
        TypeError: logits are not floating point, or labels are.

    Memory: scored rows become fp32 one sequence at a time, and once more in the backward; never all logits at once,
    but in transforms of `torch.func` and forward mode, which keep them.
    One host sync for each sequence, and one to check the labels.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits and labels must have shapes [B, S, V] and [B, S], got {list(logits.shape)} and "
            f"{list(labels.shape)}; pass one unshifted label per input token"
        )
    if not logits.is_floating_point() or labels.is_floating_point():
        raise TypeError(f"logits must be floating point and labels integers, got {logits.dtype} and {labels.dtype}")
    V = logits.shape[-1]
    scored = labels != ignore_index
    bad = scored & ((labels < 0) | (labels >= V))
    if bad.any():
        raise ValueError(
            f"labels must be in [0, V) = [0, {V}) or ignore_index = {ignore_index}, got {labels[bad][0].item()}; "
            "mask padding with ignore_index, and check that tokenizer and model belong together"
        )
    # unbind, not indexing: its backward stacks B gradients once instead of adding up B full-size ones.
    rows = zip(logits.unbind(0), labels.unbind(0), scored.unbind(0), strict=True)
    logps = [_checkpointed_sequence_logp(*row) for row in rows]
    sums = torch.stack(logps) if logps else logits.sum((1, 2), dtype=_wide(logits))
    return sums / scored[:, 1:].sum(1).clamp(min=1) if average_log_prob else sums


def _checkpointed_sequence_logp(logits: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    # torch.func's gradients take no hooks on saved tensors, of which a checkpoint is made, nor forward mode in 2.11.
    in_func = not torch.compiler.is_compiling() and debug_unwrap(logits) is not logits
    if in_func or unpack_dual(logits).tangent is not None:
        return _sequence_logp(logits, labels, scored)
    return checkpoint(  # pyright: ignore[reportReturnType]
        _sequence_logp, logits, labels, scored, use_reentrant=False, preserve_rng_state=False
    )


def _sequence_logp(logits: Tensor, labels: Tensor, scored: Tensor) -> Tensor:
    rows = scored[1:].nonzero().squeeze(1)
    logps = F.log_softmax(logits[rows], dim=-1, dtype=_wide(logits))
    return logps.gather(1, labels[rows + 1, None].long()).sum()


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
