"""From settings to token pairs: what `train` and `plan` have in common."""

from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fused_dpo_engine.config.options import DataOptions
from fused_dpo_engine.data.pairs import TokenizedPairs, TokenPair, split_pairs
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import UserError


def load_pairs(
    data: DataOptions, seed: int, tokenizer: PreTrainedTokenizerBase, console: Console, *, rankings: bool = False
) -> tuple[list[TokenPair], list[TokenPair]]:
    """Load training and held-out pairs of the sources that `data` names, with a report on the console.

    Args:
        data: its `max_length` is set.
        seed: of the split, if a fraction is held out.
        tokenizer: of the model.
        console: for reports and progress.
        rankings: number the pairs of a row as one ranking, for a loss that looks at it as a whole.

    Raises:
        UserError: files, rows or template that cannot be used.
    """
    template = None
    if data.chat_template:
        if not Path(data.chat_template).is_file():
            raise UserError(f"--chat-template {data.chat_template}: no such file.")
        try:
            template = Path(data.chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--chat-template {data.chat_template} is no UTF-8 text: {error}") from error

    def load(source: str, split: str, kind: str) -> list[TokenPair]:
        tokenized: TokenizedPairs = tokenize_pairs(
            read_rows(source, split),
            tokenizer,
            max_length=data.max_length or 0,
            truncate_prompts=data.truncate_prompts,
            skip_bad_rows=data.skip_bad_rows,
            chat_template=template,
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
