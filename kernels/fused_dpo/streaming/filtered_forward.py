"""Screen in plain torch on any device: the first part of what `fused_dpo.filtering` describes.

On a CPU with bf16 units and bf16 inputs the screen is coarse, unless the head has more than a weight and an adapter, or
is split over ranks: its logits are rounded to bf16, which is twice as fast. They choose the columns and weigh the tail
of what is not above `eps`, and nothing else: logits above it are computed again, accumulated in fp32. Elsewhere the
screen's logits are accumulated in fp32, and the log-probs are exact.

Under a coarse screen the theorem's first statement holds up to a factor of 1.5, which is what the rounding of the
logits can move a probability by (largest logit <= COARSE_RANGE, else the block is exact).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_dpo.filtering import EVERYTHING, Filtering, vocabulary_size
from fused_dpo.head import HeadInputs
from fused_dpo.linalg.operands import Operands
from fused_dpo.linalg.sizes import ceil_div
from fused_dpo.stats import SoftmaxState, TokenStats
from fused_dpo.streaming.kept_products import KeptProducts, targets_among
from fused_dpo.streaming.online_softmax import OnlineSoftmax, Softmax
from fused_dpo.streaming.screener import BLOCK_ROWS, Screener, block_spans, exponents, largest_of
from fused_dpo.vocab_parallel.collectives import sum_over_ranks

COARSE_RANGE = 64.0
"""Largest logit that a bf16 screen is trusted with: its rounding there is at most 0.125."""


class _Rows(NamedTuple):
    """What the forward finds of each scored row, and of each block."""

    target: Tensor
    softmax: Softmax
    tails: Tensor
    fractions: Tensor
    screen: Tensor


def filtered_forward(
    inputs: HeadInputs,
    filtering: Filtering,
    *,
    cu_seqlens: Tensor,
    screen_shape: tuple[int, int, int],
    want_stats: bool,
) -> tuple[Tensor, SoftmaxState, TokenStats | None, Tensor]:
    """Compute log-prob, softmax state and screen of every row; errors as in `streaming_forward`.

    Args:
        inputs: see `HeadInputs`.
        filtering: what is above `eps` in its block.
        cu_seqlens: int64 [N+1] of the sequences: a block never straddles two of them, so that a sequence's log-prob
            depends on nothing but the sequence.
        screen_shape: of the screen to return; it may have more rows than there are blocks.
        want_stats: also fill a `TokenStats`.

    Returns:
        `logps` [T], the state [5, T], the stats, and the screen [blocks, 2, V], see `fused_dpo.filtering`.
    """
    hidden, target, rows, head, workspace_mib, shard = inputs
    operands = Operands(hidden, rows, head, shard)
    screener = Screener(operands, workspace_mib)
    spans = block_spans(rows, cu_seqlens, min(screener.rows, BLOCK_ROWS))
    softmax = Softmax(torch.zeros(6 if want_stats else 3, len(rows), dtype=operands.acc_dtype, device=hidden.device))
    screen = torch.zeros(screen_shape, dtype=torch.uint8, device=hidden.device)
    of_rows = _Rows(target[rows], softmax, torch.zeros_like(softmax.peak), torch.ones_like(softmax.peak), screen)
    if screener.coarse:
        looking = _CoarseLook(screener, of_rows, filtering, workspace_mib, want_stats=want_stats)
    else:
        looking = _CloseLook(screener, of_rows, filtering, want_stats=want_stats)
    block = 0
    for group in screener.groups(spans):
        looking(group, block)
        block += len(group)

    T = hidden.shape[0]

    def to_rows(values: Tensor) -> Tensor:
        return values.new_zeros(T).index_copy_(0, rows, values)

    stats = TokenStats(*map(to_rows, softmax.stats(operands.vocabulary))) if want_stats else None
    logps = softmax.logps()
    columns = softmax.peak, softmax.total, -torch.expm1(logps), of_rows.tails, of_rows.fractions
    return to_rows(logps), SoftmaxState(torch.stack([to_rows(values) for values in columns])), stats, screen


def _note(screen: Tensor, p: Tensor, targets: Tensor, eps: float) -> Tensor:
    """Fill the `screen` [2, V] of a block with probabilities `p` [n, V]; returns the columns above `eps`, bool [V].

    Targets are among them.
    """
    largest = largest_of(p)
    screen[0] = exponents(largest)
    screen[1] = exponents(p.new_full((1, len(p)), 1 / len(p)) @ p).squeeze(0)
    keep = largest > eps
    keep[targets[targets < p.shape[1]]] = True
    return keep


class _CloseLook:
    """Screens groups of blocks by the logits that the softmax is made of."""

    def __init__(self, screener: Screener, of_rows: _Rows, filtering: Filtering, *, want_stats: bool) -> None:
        self.screener, self.of_rows, self.filtering = screener, of_rows, filtering
        operands, peak = screener.operands, of_rows.softmax.peak
        self.shard = operands.shard
        rows = min(screener.rows, len(peak))
        self._online = OnlineSoftmax(len(screener.bounds), rows, peak.dtype, peak.device, want_stats=want_stats)

    def __call__(self, group: list[tuple[int, int]], block: int) -> None:
        """Screen the group's blocks of rows, of which `block` is the first."""
        of_rows, shard = self.of_rows, self.shard
        origin, end = group[0][0], group[-1][1]
        p = self._probabilities(origin, end)
        keeps = []
        for place, (start, stop) in enumerate(group, block):
            local = p[start - origin : stop - origin]
            keeps.append(_note(of_rows.screen[place], local, of_rows.target[start:stop], self.filtering.eps))
            if shard is None or shard.first == 0:
                keeps[-1][0] = True  # as in a coarse screen, where there is always one to look at
        tails = [
            p[start - origin : stop - origin] @ (~keep).to(p.dtype)
            for (start, stop), keep in zip(group, keeps, strict=True)
        ]
        counts = torch.stack([keep.sum() for keep in keeps]).to(p.dtype)
        *tails, counts = sum_over_ranks(torch.cat((*tails, counts)), shard).split([*map(len, tails), len(keeps)])
        V = vocabulary_size(p, shard)
        for (start, stop), tail, count in zip(group, tails, counts, strict=True):
            # NaN is not below the guard; gathering more than half of the columns costs more than taking all of them.
            if bool(tail.mean() <= self.filtering.tail_guard) and int(count) <= V // 2:
                of_rows.fractions[start:stop] = count / V
                of_rows.tails[start:stop] = tail
            else:
                of_rows.screen[block, 0] = EVERYTHING
            block += 1

    def _probabilities(self, origin: int, end: int) -> Tensor:
        """Compute the softmax of scored rows, and their probabilities [rows, V]."""
        target, local = self.of_rows.target[origin:end], slice(end - origin)
        tiles = enumerate(self.screener.tiles(origin, end))
        peaks = [self._online.fold(tile, z, *targets_among(columns, target), local) for tile, (columns, z) in tiles]
        softmax = self._online.merge(len(peaks), local, self.shard)
        self.of_rows.softmax.values[:, origin:end] = softmax.values
        return self.screener.probabilities(peaks, softmax.peak, softmax.total)


class _CoarseLook:
    """Screens groups of blocks by rounded logits, and makes the softmax of what they do not drop."""

    def __init__(
        self, screener: Screener, of_rows: _Rows, filtering: Filtering, workspace_mib: int, *, want_stats: bool
    ) -> None:
        self.screener, self.of_rows, self.filtering, self.want_stats = screener, of_rows, filtering, want_stats
        self.kept = KeptProducts(screener.operands, workspace_mib)
        chunks, peak = ceil_div(screener.operands.V, self.kept.width), of_rows.softmax.peak
        rows = min(BLOCK_ROWS, len(peak))
        self._online = OnlineSoftmax(chunks, rows, peak.dtype, peak.device, want_stats=want_stats)

    def __call__(self, group: list[tuple[int, int]], block: int) -> None:
        """Screen the group's blocks of rows, of which `block` is the first."""
        origin, end = group[0][0], group[-1][1]
        z, p = self.screener.look(origin, end)
        for place, (start, stop) in enumerate(group, block):
            local = slice(start - origin, stop - origin)
            self._block(slice(start, stop), self.of_rows.screen[place], z[local], p[local])

    def _block(self, span: slice, screen: Tensor, z: Tensor, p: Tensor) -> None:
        """Screen one block by its coarse logits `z` and probabilities `p` [n, V], which are overwritten."""
        of_rows, dtype, V = self.of_rows, self.of_rows.softmax.peak.dtype, z.shape[1]
        targets = of_rows.target[span]
        keep = _note(screen, p, targets, self.filtering.eps)
        keep[0] = True  # there is always one to look at
        index = keep.nonzero().squeeze(1)
        p_top, place = p.index_select(1, index).max(1)
        z_top = z.gather(1, index[place][:, None]).squeeze(1).to(dtype)
        tail = p.index_fill_(1, index, 0.0).sum(1).to(dtype)
        # Where a row's largest is not above eps, its largest logit may be among the dropped.
        trusted = bool((z_top.abs().amax() <= COARSE_RANGE) & (p_top.amin() > self.filtering.eps))
        # NaN is not below the guard; gathering more than half of the columns costs more than taking all of them.
        trusted = trusted and bool(tail.mean() <= self.filtering.tail_guard) and index.numel() <= V // 2
        if trusted:
            of_rows.fractions[span] = index.numel() / V
            of_rows.tails[span] = tail
        else:
            screen[0] = EVERYTHING
            keep.fill_(True)
        of_rows.softmax.values[:, span] = self._softmax_of(keep, span, targets).values
        if not trusted:
            return
        # The screen's probabilities are in units of its own softmax; its largest entry tells what those are.
        unit = (z_top - of_rows.softmax.peak[span]).exp() / p_top.to(dtype)
        of_rows.softmax.add_tail(span, unit * tail)
        if self.want_stats:
            of_rows.softmax.add_tail_stats(span, z[:, ~keep].to(dtype), p[:, ~keep].to(dtype), unit)

    def _softmax_of(self, keep: Tensor, span: slice, targets: Tensor) -> Softmax:
        """Compute the softmax of a block's rows over the columns in `keep`, bool [V]."""
        rows, local, chunks = self.kept.hidden(span.start, span.stop), slice(len(targets)), 0
        for columns in self.kept.columns(keep, 0):
            z = self.kept.logits(rows, self.kept.weight(columns), columns, len(targets))
            self._online.fold(chunks, z, *targets_among(columns, targets), local)
            chunks += 1
        return self._online.merge(chunks, local)
