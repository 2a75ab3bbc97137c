"""From settings to token pairs: what `train` and `plan` have in common."""

from pathlib import Path

import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fused_dpo_engine.config.options import DataOptions, ModelOptions, PackingOptions
from fused_dpo_engine.data import read_rows
from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.loading import check_source, no_such_folder
from fused_dpo_engine.pairs import TokenizedPairs, TokenPair, split_pairs
from fused_dpo_engine.tokenization import tokenize_pairs


def choose_max_length(model: ModelOptions, data: DataOptions, packing: PackingOptions) -> int:
    """The longest sequence that `--max-length` means with this model.

    Raises:
        UserError: there is no such model, it has no configuration, or fewer positions.
    """
    check_source(model.model)
    try:
        config = transformers.AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no model configuration could be read from {model.model}: {no_such_folder(model.model)}{first_line(error)}"
        ) from error
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or packing.tokens_per_batch
    max_length = data.max_length or min(packing.tokens_per_batch // 2, longest)
    if max_length > longest:
        raise UserError(
            f"max-length {max_length} exceeds the {longest} positions that {model.model} has; give --max-length "
            f"{longest} or less."
        )
    return max_length


def load_pairs(
    data: DataOptions, seed: int, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[list[TokenPair], list[TokenPair]]:
    """Training and held-out pairs of the sources that `data` names, with a report on the console.

    Args:
        data: its `max_length` is set.
        seed: of the split, if a fraction is held out.
        tokenizer: of the model.
        console: for reports and progress.

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
