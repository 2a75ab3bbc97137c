"""From settings to token pairs: what `train` and `plan` have in common."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fused_dpo_engine.config.options import DataOptions
from fused_dpo_engine.data.columns import renaming
from fused_dpo_engine.data.pairs import TokenizedPairs, TokenPair, digest_pairs, split_pairs
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import UserError


def load_pairs(
    data: DataOptions, seed: int, tokenizer: PreTrainedTokenizerBase, console: Console, *, rankings: bool = False
) -> tuple[list[TokenPair], list[TokenPair]]:
    """Load training and held-out pairs of the sources that `data` names, with a report on the console.

    Args:
        data: its `max_length` is set.
        seed: of the split, if a fraction is held out.
        tokenizer: of the model; gets the chat template that `data` names.
        console: for reports and progress.
        rankings: number the pairs of a row as one ranking, for a loss that looks at it as a whole.

    Raises:
        UserError: files, rows or template that cannot be used.
    """
    if data.chat_template:
        # What serves the model has to write conversations as training does: it is saved with the tokenizer.
        tokenizer.chat_template = find_template(data.chat_template, tokenizer)
    columns = renaming(data.columns)

    def load(source: str, split: str, kind: str) -> list[TokenPair]:
        tokenized: TokenizedPairs = tokenize_pairs(
            read_rows(source, split),
            tokenizer,
            max_length=data.max_length or 0,
            truncate_prompts=data.truncate_prompts,
            skip_bad_rows=data.skip_bad_rows,
            columns=columns,
            score=data.score,
            pairing=data.pairs,
            rankings=rankings,
            progress=console.is_terminal,
        )
        console.print(f"{kind} data {source}: {tokenized.report.summary()}")
        return tokenized.pairs

    pairs = load(data.data, data.split, "training")
    if data.eval_data:
        return pairs, load(data.eval_data, data.eval_split, "held-out")
    if data.eval_fraction:
        pairs, held_out = split_pairs(pairs, data.eval_fraction, seed)
        console.print(f"held out: {len(held_out)} of {len(pairs) + len(held_out)} pairs")
        return pairs, held_out
    return pairs, []


def check_same_everywhere(settings: str, pairs: Sequence[TokenPair], ranks: Ranks) -> None:
    """Refuse processes that have read other settings or other data, each from its own machine.

    They would train apart without a word, and tell each other numbers of pairs by their place.

    Raises:
        UserError: some have; the same on all ranks.
    """
    seen = ranks.gather_objects((settings, digest_pairs(pairs) if ranks.size > 1 else ""))
    other = next((rank for rank, its in enumerate(seen) if its != seen[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} has read other settings or other pairs than process 0; give all machines the same "
            f"options, files and releases of the packages."
        )


def find_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Read a chat template from a file, or take one of the tokenizer's by its name.

    Raises:
        UserError: there is neither.
    """
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in named and not Path(name).is_file():
        return named[name]
    if not Path(name).is_file():
        has = f", and the tokenizer has templates named {', '.join(sorted(named))}" if named else ""
        raise UserError(f"--chat-template {name}: no such file{has}.")
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {name} is no UTF-8 text: {error}") from error
