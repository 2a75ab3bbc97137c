"""What a micro-batch of pairs is to the trainer, however its tokens are laid out."""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound="PairBatch")


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """B pairs in one forward pass."""

    pair_indices: list[int]
    """Which pairs, in the order of the results `[chosen 0, rejected 0, chosen 1, ...]`."""
    input_ids: Tensor
    """int64, every token slot that the model computes."""
    chosen_lengths: Tensor
    """int64 [B], scored tokens of the chosen responses."""
    rejected_lengths: Tensor
    """int64 [B]."""
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

    def to(self: Batch, device: torch.device) -> Batch:
        """The batch with its tensors on `device`, copied without waiting where the device allows it."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=True) if hasattr(value, "to") else value
        return type(self)(**moved)
