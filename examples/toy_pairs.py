"""Pairs of random tokens in the shape that training loops take: a prompt, a chosen and a rejected response each."""

import torch
from torch import Tensor

IGNORED = -100
"""The label of what is not scored: prompts and padding."""


def toy_pairs(vocabulary: int, count: int = 8) -> list[dict[str, list[int]]]:
    """Draw pairs whose responses have different lengths."""
    random = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=random).tolist()

    return [
        {"prompt": draw(6 + i % 3), "chosen": draw(4 + 2 * i % 5), "rejected": draw(9 - 3 * i % 5)}
        for i in range(count)
    ]


def collate(pairs: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad a batch [2B, S], chosen sequences first, each with its prompt."""
    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    width = max(len(prompt + response) for prompt, response in rows)

    def pad(filled: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in filled])

    return {
        "input_ids": pad([prompt + response for prompt, response in rows], 0),
        "attention_mask": pad([[1] * len(prompt + response) for prompt, response in rows], 0),
        "labels": pad([[IGNORED] * len(prompt) + response for prompt, response in rows], IGNORED),
    }
