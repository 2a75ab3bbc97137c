"""Pairs as they will be trained: prompt, answers, and what of them is scored, for a person to look at."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fused_dpo_engine.data.pairs import TokenPair

OPEN, CLOSE, NEWLINE = "⟦", "⟧", "↵"
"""Marks around scored text, and at the end of a line."""


def show_pairs(pairs: Sequence[TokenPair], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Write the pairs out, their scored tokens between marks, line ends made visible."""
    shown = Text()
    for pair in pairs:
        scored = f"{pair.chosen_length} and {pair.rejected_length} scored"
        shown.append(f"{pair.where}: {pair.prompt_length} prompt tokens, {scored}\n", style="bold")
        prompt = np.zeros(pair.prompt_length, dtype=bool)
        parts = [("prompt", pair.chosen_ids[: pair.prompt_length], prompt)]
        for name, (ids, positions) in zip(("chosen", "rejected"), pair.sides, strict=True):
            marks = np.zeros(len(ids), dtype=bool)
            marks[positions] = True
            parts.append((name, ids[pair.prompt_length :], marks[pair.prompt_length :]))
        for name, ids, marks in parts:
            shown.append(f"  {name}\n    ")
            text = _marked(ids, marks, tokenizer)
            text.rstrip()
            shown.append_text(text).append("\n")
    return shown


def _marked(ids: np.ndarray, marks: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text()
    for scored, run in groupby(range(len(ids)), key=lambda at: bool(marks[at])):
        written = str(tokenizer.decode([int(ids[at]) for at in run], skip_special_tokens=False))
        lines = written.split("\n")
        ended = written.endswith("\n")
        written = f"{NEWLINE}\n    ".join(lines[:-1] if ended else lines) + NEWLINE * ended
        text.append(f"{OPEN}{written}{CLOSE}" if scored else written, style="green" if scored else "")
        text.append("\n    " * ended)
    return text
