"""Models of random weights under realistic logits: the work of a large model's step, without downloading one.

A random model's logits are nearly flat, which no trained model's are, and the cost of a filtered head depends on them.
So the value of the last hidden state is replaced by hidden states replayed from a real model
(`benchmarks.heads.replay`), and the head's weight is the replay's; the gradient passes to the backbone as if nothing
had happened. Which hidden state a token gets follows from its id, so that it is the same in every layout, and ids are
drawn so that the tokens of a sequence get consecutive ones.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.heads.replay import LENGTHS, replay
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.attention.models import attention_for
from fused_dpo_engine.config.options import ModelOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.model.loading import choose_dtype
from fused_dpo_engine.model.policy import Policy

PREFIX = "random:"
MIX = "hh_helpful"
"""Lengths that are taken unless others are named."""
REPLAYED = 4096
"""Hidden states that are replayed, where the vocabulary has 16 ids for each."""


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def model_config(name: str) -> LlamaConfig:
    """Make the configuration behind `random:NAME`; llama-1b has the shape of Llama-3.2-1B.

    Raises:
        ValueError: there is none of the name.
    """
    configs = {
        "llama-1b": lambda: _llama(2048, 16, 32, 8, 8192, 128256),
        "llama-tiny": lambda: _llama(64, 2, 4, 2, 128, 16384),
    }
    if name not in configs:
        raise ValueError(f"no random model {name!r}; there are {', '.join(PREFIX + known for known in configs)}.")
    return configs[name]()


def token_pairs(name: str, mix: str, count: int, max_length: int) -> list[TokenPair]:
    """Draw the first `count` pairs of a mix of real lengths, at most `max_length` tokens a sequence, with random ids.

    Raises:
        ValueError: there is no such mix, or it has fewer pairs.
    """
    if mix not in LENGTHS:
        raise ValueError(f"pairs of a random model take their lengths from one of {', '.join(LENGTHS)}, got {mix!r}.")
    lengths = [row for row in LENGTHS[mix] if row[0] + max(row[1:]) <= max_length][:count]
    if len(lengths) < count:
        raise ValueError(f"{mix} has {len(lengths)} pairs of at most {max_length} tokens a sequence, not {count}.")
    vocabulary = model_config(name).vocab_size or 0
    rows = min(REPLAYED, vocabulary // 16)
    random = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        consecutive = (random.integers(rows) + np.arange(length)) % rows
        return (consecutive + rows * random.integers(vocabulary // rows, size=length)).astype(np.int32)

    pairs = []
    for index, (prompt, chosen, rejected) in enumerate(lengths):
        start = tokens(prompt)
        chosen_ids, rejected_ids = (np.concatenate((start, tokens(length))) for length in (chosen, rejected))
        pairs.append(TokenPair(prompt, chosen_ids, rejected_ids, f"{mix}:{index}"))
    return pairs


class _Replaced(torch.autograd.Function):
    """Other values, the same gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, values: Tensor, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return values[rows].to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None, None


def _replace_hidden(values: Tensor) -> Any:
    """Make a forward hook that gives every token the hidden state of its id modulo their number."""

    def hook(module: Any, arguments: Any, inputs: dict[str, Tensor], output: Any) -> Any:
        output.last_hidden_state = _Replaced.apply(output.last_hidden_state, values, inputs["input_ids"] % len(values))
        return output

    return hook


def build_random_policy(
    options: ModelOptions, device: torch.device, *, packing: bool = True, hidden_file: Path | None = None
) -> Policy:
    """Build the policy of `random:NAME`, the same in every call; fp32 weights computed in `options.dtype`."""
    config = model_config(options.model.removeprefix(PREFIX))
    torch.manual_seed(0)
    with device:
        attention = ATTENTION_NAME if packing else "sdpa"
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    vocabulary, hidden_size = model.lm_head.weight.shape
    rows = min(REPLAYED, vocabulary // 16)
    problem = replay(rows, hidden_size, vocabulary, device=device.type, hidden_file=hidden_file)
    model.lm_head.weight.data.copy_(problem.weight)
    model.base_model.register_forward_hook(_replace_hidden(problem.hidden), with_kwargs=True)
    compute_dtype = choose_dtype(options, device)
    attention_name = attention_for(model, device, compute_dtype, options.attention) if packing else "sdpa"
    return Policy(
        model.train(),
        compute_dtype,
        attention_name=attention_name,
        grad_mode=None if options.grad_mode == "auto" else options.grad_mode,
    )
