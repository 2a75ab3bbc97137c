"""One DPO step of a model on real pairs: packed with shared prefixes against packed, padded, and full logits.

    python -m benchmarks.step --model DIR --data FILE [--pairs N] [--tokens-per-batch N] [--dtype bfloat16]
                              [--ways NAME ...] [--repeats N] [--out FILE]

Ways over the same pairs, each in a process of its own, every forward pass within the same number of token slots:
  shared         packed, prefixes computed once, `fused_dpo_logps`: the trainer's default
  packed         the same with `--no-prefix-sharing`
  padded         the same with `--no-packing`: `[2B, S, D]` hidden states, transformers' own attention
  packed logits  as packed, but full logits and a log-softmax in fp32
  padded logits  as padded, but full logits and a log-softmax in fp32
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import console, environment, isolated, peak_growth_mib, timed
from fused_dpo import DPOLoss, head_of
from fused_dpo_engine.batches import PairBatch
from fused_dpo_engine.config import LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.data import read_rows
from fused_dpo_engine.loading import load_tokenizer
from fused_dpo_engine.metrics import SlotMetrics
from fused_dpo_engine.planning import build_batch, plan_pairs
from fused_dpo_engine.policy import Policy, build_policy
from fused_dpo_engine.tokenization import tokenize_pairs


def fused(policy: Policy, batch: PairBatch) -> Tensor:
    """Ours."""
    return policy(batch)


def packed_logits(policy: Policy, batch: Any) -> Tensor:
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


def padded_logits(policy: Policy, batch: Any) -> Tensor:
    """A padded batch through the model's own forward, as trainers without packing do it."""
    with policy.autocast():
        output = policy.causal_lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    labels = batch.labels[:, 1:]
    token_logps = F.log_softmax(output.logits[:, :-1].float(), dim=-1)
    picked = token_logps.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return picked.masked_fill(labels == -100, 0.0).sum(1)


class Way(NamedTuple):
    """How pairs are laid out, and what scores them."""

    layout: dict[str, bool]
    score: Callable[[Policy, Any], Tensor]


WAYS = {
    "shared": Way({}, fused),
    "packed": Way({"prefix_sharing": False}, fused),
    "padded": Way({"packing": False}, fused),
    "packed logits": Way({"prefix_sharing": False}, packed_logits),
    "padded logits": Way({"packing": False}, padded_logits),
}


def measure(name: str, model: str, data: str, pairs: int, budget: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds, extra memory, loss and log-probs of one step; to be run in a process of its own."""
    transformers.utils.logging.disable_progress_bar()
    way = WAYS[name]
    options = ModelOptions(model=model, dtype=dtype)  # pyright: ignore[reportArgumentType]
    packing = PackingOptions(tokens_per_batch=budget, **way.layout)
    tokenizer = load_tokenizer(model, options)
    token_pairs = tokenize_pairs(read_rows(data)[:pairs], tokenizer, max_length=budget // 2).pairs
    policy = build_policy(options, LoraOptions(), torch.device("cpu"), packing=packing.packing)
    loss = DPOLoss()
    plan = plan_pairs(token_pairs, range(len(token_pairs)), packing)

    def step() -> tuple[float, Tensor, SlotMetrics]:
        policy.zero_grad()
        total, slots, all_logps = 0.0, SlotMetrics(budget), torch.zeros(len(token_pairs), 2)
        for planned in plan:
            batch = build_batch(token_pairs, planned.indices, packing)
            logps = way.score(policy, batch)
            # Against a reference of 0, so that the loss tells what the log-probs are.
            zeros = torch.zeros(batch.num_pairs)
            output = loss(logps[0::2], logps[1::2], zeros, zeros, num_pairs=len(token_pairs))
            output.loss.backward()
            total += float(output.loss.detach())
            all_logps[planned.indices] = logps.detach().float().view(-1, 2)
            slots.add(batch)
        return total, all_logps, slots

    (value, logps, slots), peak = peak_growth_mib(step)  # the first step is also the warm-up
    return {
        "way": name,
        "data": Path(data).name,
        "pairs": len(token_pairs),
        "tokens": slots.tokens,
        "slots": slots.slots,
        "forward_passes": slots.passes,
        "padding": slots.padding,
        "saved_by_sharing": slots.shared,
        "seconds": statistics.median(timed(step)[1] for _ in range(repeats)),
        "extra_mib": peak,
        "loss": value,
        "logps": logps.tolist(),
        "dtype": dtype,
    }


def compare(
    model: str, data: str, pairs: int, budget: int, dtype: str, repeats: int, ways: Sequence[str] = tuple(WAYS)
) -> list[dict[str, Any]]:
    """Measure the ways and print them side by side; log-probs and losses are compared with those of the last."""
    rows = [isolated(measure, way, model, data, pairs, budget, dtype, repeats) for way in ways]
    logps = [torch.tensor(row.pop("logps")) for row in rows]
    for row, mine in zip(rows, logps, strict=True):
        row["loss_difference"] = abs(row["loss"] - rows[-1]["loss"])
        row["worst_logp_difference"] = float((mine - logps[-1]).abs().max())
    table = Table(title=f"one step on {rows[0]['pairs']} pairs, {rows[0]['tokens']} tokens, {dtype}, {Path(data).name}")
    columns = ("token slots", "loss", "log-prob off", "seconds", "extra memory", "time", "memory")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        ratios = (f"{row[key] / rows[0][key]:.2f}" for key in ("seconds", "extra_mib"))
        table.add_row(
            row["way"],
            str(row["slots"]),
            f"{row['loss']:.5f}",
            f"{row['worst_logp_difference']:.4f}",
            f"{row['seconds']:.1f}",
            f"{row['extra_mib'] / 1024:.2f} GiB",
            *ratios,
        )
    table.caption = f"log-probs compared with {rows[-1]['way']}; time and memory over those of {rows[0]['way']}"
    console().print(table)
    return rows


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hugging Face name")
    parser.add_argument("--data", required=True, nargs="+", help="preference pairs; several files one after the other")
    parser.add_argument("--pairs", type=int, default=16, help="pairs in the step (default: 16)")
    parser.add_argument("--tokens-per-batch", type=int, default=8192, help="tokens per forward (default: 8192)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype to compute in")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="which (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, of which the median counts (default: 3)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    for data in options.data:
        settings = (options.pairs, options.tokens_per_batch, options.dtype, options.repeats, options.ways)
        rows += compare(options.model, data, *settings)
    if options.out:
        options.out.write_text(json.dumps({**environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
