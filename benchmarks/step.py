"""One DPO step of a model on real pairs: packed with the fused head against the full logits that trainers build.

    python -m benchmarks.step --model DIR --data FILE [--pairs N] [--tokens-per-batch N] [--dtype bfloat16] [--out FILE]

Three ways over the same pairs, each in a process of its own:
  fused          packed, `fused_dpo_logps`
  packed logits  the same packed forward, then full logits and a log-softmax in fp32
  padded logits  padded `[chosen; rejected]` batch with an attention mask, full logits, log-softmax in fp32
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import console, environment, isolated, peak_growth_mib, timed
from fused_dpo import DPOLoss, head_of
from fused_dpo_engine.config import LoraOptions, ModelOptions
from fused_dpo_engine.data import read_rows
from fused_dpo_engine.packing import PackedBatch, pack, pack_all
from fused_dpo_engine.pairs import TokenPair
from fused_dpo_engine.policy import Policy, build_policy, load_tokenizer
from fused_dpo_engine.tokenization import tokenize_pairs


def fused(policy: Policy, batch: PackedBatch, _pairs: list[TokenPair]) -> Tensor:
    """Ours."""
    return policy(batch)


def packed_logits(policy: Policy, batch: PackedBatch, _pairs: list[TokenPair]) -> Tensor:
    """The packed forward with the naive head: logits of every token of the batch."""
    with policy.autocast():
        hidden = policy.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            fused_dpo_plan=batch.attention,
        ).last_hidden_state[0]
        logits = F.linear(hidden, head_of(policy.model).weight)
    token_logps = F.log_softmax(logits.float(), dim=-1)[batch.scored_rows].gather(1, batch.targets[:, None]).squeeze(1)
    lengths = batch.cu_scored.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths)).index_add(0, sequence, token_logps)


def padded_logits(policy: Policy, _batch: PackedBatch, pairs: list[TokenPair]) -> Tensor:
    """A padded batch through the model's own forward, as trainers without packing do it."""
    sequences = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    prompts = [pair.prompt_length for pair in pairs for _ in range(2)]
    width = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    attention_mask = torch.zeros_like(input_ids)
    for row, (ids, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        tokens = torch.from_numpy(ids).long()
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt : len(ids)] = tokens[prompt:]
    with policy.autocast():
        logits = policy.causal_lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    token_logps = F.log_softmax(logits[:, :-1].float(), dim=-1)
    picked = token_logps.gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
    return picked.masked_fill(labels[:, 1:] == -100, 0.0).sum(1)


WAYS: dict[str, Callable[..., Tensor]] = {
    "fused": fused,
    "packed logits": packed_logits,
    "padded logits": padded_logits,
}


def measure(way: str, model: str, data: str, pairs: int, budget: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds, extra memory and mean log-prob of one step; to be run in a process of its own."""
    transformers.utils.logging.disable_progress_bar()
    options = ModelOptions(model=model, dtype=dtype)  # pyright: ignore[reportArgumentType]
    tokenizer = load_tokenizer(model, options)
    token_pairs = tokenize_pairs(read_rows(data)[:pairs], tokenizer, max_length=budget // 2).pairs
    policy = build_policy(options, LoraOptions(), torch.device("cpu"))
    if way == "padded logits":
        policy.causal_lm.set_attn_implementation("sdpa")
    loss = DPOLoss()
    plan = [batch.pair_indices for batch in pack_all(token_pairs, range(len(token_pairs)), budget)]

    def step() -> float:
        policy.zero_grad()
        total = 0.0
        for indices in plan:
            logps = WAYS[way](policy, pack(token_pairs, indices), [token_pairs[i] for i in indices])
            chosen, rejected = logps[0::2], logps[1::2]
            # The first step of a run: the reference is the policy itself.
            output = loss(chosen, rejected, chosen.detach(), rejected.detach(), num_pairs=len(token_pairs))
            output.loss.backward()
            total += float(logps.detach().sum())
        return total / (2 * len(token_pairs))

    mean_logp, peak = peak_growth_mib(step)  # the first step is also the warm-up
    return {
        "way": way,
        "pairs": len(token_pairs),
        "tokens": sum(len(p.chosen_ids) + len(p.rejected_ids) for p in token_pairs),
        "micro_batches": len(plan),
        "seconds": statistics.median(timed(step)[1] for _ in range(repeats)),
        "extra_mib": peak,
        "mean_logp": mean_logp,
        "dtype": dtype,
    }


def compare(model: str, data: str, pairs: int, budget: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Measure all three ways and print them side by side."""
    rows = [isolated(measure, way, model, data, pairs, budget, dtype, repeats) for way in WAYS]
    table = Table(title=f"one step on {rows[0]['pairs']} pairs, {rows[0]['tokens']} tokens, {dtype}")
    for column in ("", "mean log-prob", "seconds", "extra memory", "time / fused", "memory / fused"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        ratios = (f"{row[key] / rows[0][key]:.2f}" for key in ("seconds", "extra_mib"))
        memory = f"{row['extra_mib'] / 1024:.2f} GiB"
        table.add_row(row["way"], f"{row['mean_logp']:.3f}", f"{row['seconds']:.1f}", memory, *ratios)
    console().print(table)
    return rows


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hugging Face name")
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--pairs", type=int, default=16, help="pairs in the step (default: 16)")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="tokens per forward (default: 8192)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype to compute in")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, of which the median counts (default: 3)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = compare(options.model, options.data, options.pairs, options.tokens_per_batch, options.dtype, options.repeats)
    if options.out:
        options.out.write_text(json.dumps({**environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
