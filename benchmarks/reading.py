"""Time to read, check, render and tokenize chats, beside the bare calls that this takes.

The bare calls are those that nothing can do without: JSON parsed, each conversation rendered with the chat template
(both answers, and the prompt alone), and the texts tokenized in batches. What is beyond them is finding the format,
looking for what the template left out, and the boundary of the prompt.

    python -m benchmarks.reading --model DIR --data chats.jsonl --rows 100000
"""

import argparse
import json
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs

BATCH = 333
"""Rows whose texts go to the tokenizer together, as in `tokenize_pairs`."""


def bare(path: Path, tokenizer: Any) -> None:
    """Parse, render and tokenize rows of prompt, chosen and rejected messages, and look at nothing."""

    def render(messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))

    texts: list[str] = []
    for line in path.read_bytes().splitlines():
        row = json.loads(line)
        texts += (render(row["prompt"] + row["chosen"]), render(row["prompt"] + row["rejected"]))
        texts.append(render(row["prompt"], generation_prompt=True))
    for start in range(0, len(texts), 3 * BATCH):
        tokenizer(texts[start : start + 3 * BATCH], add_special_tokens=False, return_attention_mask=False)


def ours(path: Path, tokenizer: Any) -> None:
    """Do the same as training does."""
    tokenize_pairs(read_rows(path), tokenizer, max_length=100_000)


def main() -> None:
    """Print both times and their ratio, the median of some rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name whose tokenizer has a chat template")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl of prompt, chosen and rejected messages")
    parser.add_argument("--rows", type=int, default=100_000, help="rows to read; those of the file are repeated")
    parser.add_argument("--rounds", type=int, default=3, help="each times both, one after the other")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = [line for line in arguments.data.read_bytes().splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in islice(cycle(lines), arguments.rows)))
        seconds: dict[str, list[float]] = {"bare calls": [], "fused-dpo": []}
        for _ in range(arguments.rounds):
            for name, work in (("bare calls", bare), ("fused-dpo", ours)):
                started = time.perf_counter()
                work(path, tokenizer)
                seconds[name].append(time.perf_counter() - started)
    middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    for name, median in middle.items():
        print(f"{name:<12} {median:8.2f} s")
    ratios = sorted(b / a for a, b in zip(seconds["bare calls"], seconds["fused-dpo"], strict=True))
    print(f"{'ratio':<12} {ratios[len(ratios) // 2]:8.2f}   ({arguments.rows} rows)")


if __name__ == "__main__":
    main()
