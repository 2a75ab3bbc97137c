"""Log-probs of the frozen reference, scored once before training by the very code that trains."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.policy import Policy


@dataclass
class ReferenceLogps:
    """Reference log-probs of pairs, by their index; NaN where a pair has not been scored."""

    logps: Tensor
    """fp32 [pairs, 2] on the host: chosen, rejected."""

    def of(self, batch: PairBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Take the log-probs [B] of the batch's chosen responses, and of its rejected ones."""
        logps = self.logps[batch.pair_indices].to(device, non_blocking=True)
        return logps[:, 0], logps[:, 1]


@torch.no_grad()
def score_reference(
    policy: Policy,
    pairs: Sequence[TokenPair],
    batches: Iterable[PairBatch],
    total: int,
    progress: bool,
    ranks: Ranks | None = None,
    keep: Callable[[list[int], Tensor], None] | None = None,
) -> ReferenceLogps:
    """Score the pairs of `batches` with the policy's model, its adapters off.

    Given the batches that training will see, policy and reference compute the same thing in the same shapes: the
    rewards of the first pass are exactly 0 before the first update.

    Args:
        policy: holds the reference model, or the policy before its first update.
        pairs: all pairs, to which the batches' indices refer.
        batches: of pairs; of this process's share.
        total: number of pairs in the batches, for the progress bar.
        progress: show one.
        ranks: processes that have the other shares; None for one alone.
        keep: takes the indices and log-probs [n, 2] of every pass as it is done, those that are no numbers left out.

    Raises:
        UserError: a log-prob is not a number.
    """
    ranks = ranks or Ranks()
    result = torch.full((len(pairs), 2), torch.nan)
    bad: list[int] = []
    with policy.as_reference(), tqdm(total=total, desc="reference", unit="pair", disable=not progress) as bar:
        for batch in batches:
            logps = policy(batch.to(policy.device)).logps.view(-1, 2).cpu()
            result[batch.pair_indices] = logps
            good = logps.isfinite().all(1)
            fine = [index for index, is_good in zip(batch.pair_indices, good.tolist(), strict=True) if is_good]
            bad += [index for index in batch.pair_indices if index not in fine]
            if keep is not None:
                keep(fine, logps[good])
            if bad and ranks.size == 1:
                break
            bar.update(batch.num_pairs)
    # Other ranks wait in every pass, so that all go to the end and fail together.
    everywhere = sorted({index for share in ranks.gather_objects(bad) for index in share})
    if everywhere:
        where = ", ".join(pairs[index].where for index in everywhere[:3])
        raise UserError(f"the reference gives no finite log-prob to {where}; its weights may be damaged.")
    return ReferenceLogps(ranks.fill_in(result))
