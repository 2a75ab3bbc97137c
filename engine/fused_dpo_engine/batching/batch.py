"""What a micro-batch of pairs is to the trainer, however its tokens are laid out."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_dpo_engine.attention.call import Backend
from fused_dpo_engine.data.pairs import TokenPair

Batch = TypeVar("Batch", bound="PairBatch")


class HeadCall(NamedTuple):
    """What the head is asked: the first arguments of `fused_dpo.fused_token_logps`, and those that go by name."""

    hidden_states: Tensor
    labels: Tensor
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PairBatch(ABC):
    """B pairs in one forward pass, in a layout that knows what the model takes and what of its output is scored."""

    pair_indices: list[int]
    """Which pairs, in the order of the results `[chosen 0, rejected 0, chosen 1, ...]`."""
    input_ids: Tensor
    """int64, every token slot that the model computes."""
    chosen_lengths: Tensor
    """int64 [B], scored tokens of the chosen responses."""
    rejected_lengths: Tensor
    """int64 [B]."""
    margins: Tensor
    """fp32 [B], differences of scores, 0 where there are none."""
    rankings: Tensor
    """int64 [B], the same number for the pairs of one ranking, another one for every other pair."""
    scored_lengths: list[int]
    """[2B], the same lengths on the host, in the order of the results."""
    num_tokens: int
    """Tokens of all 2B sequences, each counted in full: the same for the same pairs, however they are laid out."""
    num_padding: int = 0
    """Slots that hold no token."""

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.pair_indices)

    @property
    def num_slots(self) -> int:
        """Token slots that the model computes."""
        return self.input_ids.numel()

    @property
    @abstractmethod
    def offsets(self) -> Tensor:
        """int64 [2B+1], where each sequence begins among the flattened log-probs of tokens."""

    @abstractmethod
    def model_inputs(self, attention: Backend) -> dict[str, Any]:
        """Give the arguments of the model's backbone; `attention` computes packed rows."""

    @abstractmethod
    def head_call(self, hidden: Tensor) -> HeadCall:
        """Take what the head scores from the backbone's hidden states, [2B, S, D] or [1, T, D]."""

    def spread(self, values: Tensor) -> Tensor:
        """Give every scored token of the 2B sequences its value, from those that the head computed."""
        return values

    @abstractmethod
    def lay_out(self, values: Tensor, token_logps: Tensor) -> Tensor:
        """Lay out one value for each scored token, in the order of the results, as `token_logps` are laid out."""

    def to(self: Batch, device: torch.device) -> Batch:
        """Move the batch's tensors to `device`, without waiting where the device allows it."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=True) if hasattr(value, "to") else value
        return type(self)(**moved)


def margins_and_rankings(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """Tabulate what the loss takes of each pair beside its log-probs, both [B]."""
    rankings = [-1 - place if pair.ranking is None else pair.ranking for place, pair in enumerate(pairs)]
    return torch.tensor([pair.margin for pair in pairs]), torch.tensor(rankings)
