"""A tiny model and three pairs, in the shapes that other people's trainers take."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, PAD = 61, 7
"""PAD is a token like others, so that padding that is taken for a token shows."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PROMPTS = (5, 2, 4)
CHOSEN, REJECTED = (4, 9, 6), (7, 3, 6)


def tiny(family: str = "llama", **settings: Any) -> Any:
    """A model of random weights, with log-probs that differ by nats."""
    torch.manual_seed(0)
    routed = ROUTED if "moe" in family else {}
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SIZES, **routed, **settings), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def responses() -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each sequence, chosen ones first; token 0 is among the scored ones."""
    random = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(1, VOCAB, (n,), generator=random).tolist()

    prompts = [draw(n) for n in PROMPTS]
    made = [(prompt, draw(n)) for lengths in (CHOSEN, REJECTED) for prompt, n in zip(prompts, lengths, strict=True)]
    made[1][1][2] = 0
    return made


def pad(rows: list[list[int]], fill: int, side: str = "right", extra: int = 0) -> Tensor:
    """[N, S] of rows of different lengths."""
    width = max(map(len, rows)) + extra
    return torch.tensor(
        [row + [fill] * (width - len(row)) if side == "right" else [fill] * (width - len(row)) + row for row in rows]
    )


def padded(side: str) -> dict[str, Tensor]:
    """A batch [2B, S] with labels."""
    made = responses()
    return {
        "input_ids": pad([p + r for p, r in made], PAD, side, 1),
        "attention_mask": pad([[1] * len(p + r) for p, r in made], 0, side, 1),
        "labels": pad([[-100] * len(p) + r for p, r in made], -100, side, 1),
    }


def in_one_row() -> dict[str, Tensor]:
    """The same sequences behind each other [1, T]."""
    made = responses()
    return {
        "input_ids": torch.tensor([[token for p, r in made for token in p + r]]),
        "labels": torch.tensor([[label for p, r in made for label in [-100] * len(p) + r]]),
        "position_ids": torch.tensor([[position for p, r in made for position in range(len(p + r))]]),
    }
