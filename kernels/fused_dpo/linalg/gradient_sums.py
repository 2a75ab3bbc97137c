"""Sums that become the gradients of a head: widened as the operands are, in fp32, rounded once on the way out."""

import torch
from torch import Tensor

from fused_dpo.head import HeadGrads, Needs
from fused_dpo.linalg.matmul import add_matmul_fp32, matmul_precision
from fused_dpo.linalg.operands import Operands
from fused_dpo.vocab_parallel.collectives import sum_over_ranks

FINISHED_ROWS, FINISHED_ROWS_ON_CUDA = 256, 2048
"""Rows that are brought through the adapter and rounded at a time: nothing there is as large as the batch. On CUDA each
time costs its launches."""


class GradientSums:
    """Where the backward adds up: one sum for all scored rows, one for a slice of the vocabulary at a time.

    Of the widened columns only those are kept that an asked-for gradient needs: a's gradient goes through those of b,
    and so does that of the hidden states.

    Attributes:
        hidden_columns, weight_columns: which of the operands' K columns the two sums have.
        dhidden_sum: [scored rows, columns].
        dweight_sum: [slice, columns], of the slice begun last.
        dbias_sum: [slice], of the slice begun last; None if not asked for.
        dweight, dbias, dlora_b: the results, None if not asked for; every row is written once, by its slice.
    """

    def __init__(
        self,
        operands: Operands,
        slice_width: int,
        needs: Needs,
        *,
        empty: bool,
        dweight: Tensor | None = None,
    ) -> None:
        """Make sums for slices of at most `slice_width`; `empty` if there will be none, as nothing is scored.

        The weight's gradient is written to `dweight`, if there is memory for it already.
        """
        self.operands = operands
        self.needs = needs
        head, D, rank = operands.head, operands.D, operands.rank
        self.hidden_columns = slice(0 if needs.hidden else D, D + rank if needs.hidden or needs.lora_a else D)
        self.weight_columns = slice(0 if needs.weight else D, D + rank if needs.lora_b else D)
        self.dhidden_sum = self._zeros(operands.rows.numel(), self.hidden_columns.stop - self.hidden_columns.start)
        # Where the gradient is as wide and as precise as its sums, they are the gradient.
        self._in_place = self.weight_columns == slice(0, D) and head.weight.dtype == operands.acc_dtype
        self._weight = self._zeros(
            0 if self._in_place else slice_width, self.weight_columns.stop - self.weight_columns.start
        )
        self._bias = self._zeros(slice_width) if head.bias is not None and needs.bias else None
        self.dweight_sum, self.dbias_sum = self._weight, self._bias
        allocate = torch.zeros_like if empty else torch.empty_like
        contiguous = torch.contiguous_format
        self.dweight = dweight
        if dweight is None and needs.weight:
            self.dweight = allocate(head.weight, memory_format=contiguous)
        self.dbias = None
        if head.bias is not None and needs.bias:
            self.dbias = allocate(head.bias, memory_format=contiguous)
        self.dlora_b = None
        if head.lora is not None and needs.lora_b:
            self.dlora_b = allocate(head.lora[1], memory_format=contiguous)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.operands.acc_dtype, device=self.operands.hidden.device)

    def begin_slice(self, start: int, stop: int) -> None:
        """Start the sums of vocabulary rows `start:stop`."""
        gradient = self.dweight if self._in_place else None
        self.dweight_sum = (self._weight[: stop - start] if gradient is None else gradient[start:stop]).zero_()
        self.dbias_sum = None if self._bias is None else self._bias[: stop - start].zero_()

    def end_slice(self, start: int, stop: int) -> None:
        """Write the sums of vocabulary rows `start:stop` out."""
        D, rank = self.operands.D, self.operands.rank
        if self.dweight is not None and not self._in_place:
            self.dweight[start:stop] = self.dweight_sum[:, :D]
        if self.dlora_b is not None:
            self.dlora_b[start:stop] = self.dweight_sum[:, -rank:]
        if self.dbias is not None and self.dbias_sum is not None:
            self.dbias[start:stop] = self.dbias_sum

    def add_hidden(self, out: Tensor, dz: Tensor, weight: Tensor, start: int, stop: int) -> None:
        """Add `dz @ [weight | b[start:stop]]` to `out`, the columns that `dhidden_sum` has; `dz` in compute dtype."""
        D, rank, head = self.operands.D, self.operands.rank, self.operands.head
        if self.needs.hidden:
            add_matmul_fp32(out[:, :D], dz, weight)
        if head.lora is not None and out.shape[1]:
            add_matmul_fp32(out[:, -rank:], dz, head.lora[1][start:stop])

    def finish(self) -> HeadGrads:
        """Add the hidden states' sums of all ranks, bring them through the adapter, and round."""
        sum_over_ranks(self.dhidden_sum, self.operands.shard)
        operands, hidden, rows = self.operands, self.operands.hidden, self.operands.rows
        head, D, rank = operands.head, operands.D, operands.rank
        through_b = self.dhidden_sum[:, self.dhidden_sum.shape[1] - rank :] if rank else None
        dlora_a = self._zeros(rank, D) if head.lora is not None and self.needs.lora_a else None
        dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if self.needs.hidden else None
        at_once = FINISHED_ROWS_ON_CUDA if hidden.is_cuda else FINISHED_ROWS
        for start in range(0, rows.numel(), at_once):
            block = rows[start : start + at_once]
            grad = self.dhidden_sum[start : start + at_once, :D]
            if through_b is not None and head.lora is not None and (self.needs.hidden or self.needs.lora_a):
                a, _, scale = head.lora
                dthrough_a = scale * through_b[start : start + at_once]
                with matmul_precision(operands.acc_dtype):
                    if dlora_a is not None:
                        dlora_a.addmm_(dthrough_a.T, hidden[block].to(operands.acc_dtype))
                    if self.needs.hidden:
                        grad.addmm_(dthrough_a, a.to(operands.dtype).to(operands.acc_dtype))
            if dhidden is not None:
                dhidden[block] = grad.to(hidden.dtype)
        if dlora_a is not None and head.lora is not None:
            dlora_a = dlora_a.to(head.lora[0].dtype)
        return HeadGrads(dhidden, self.dweight, self.dbias, dlora_a, self.dlora_b)
