"""Preference rows to token pairs: rows parsed, rendered and encoded in batches, and a report of what became of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from fused_dpo_engine.config.options import Pairing, Score
from fused_dpo_engine.data.columns import renamed
from fused_dpo_engine.data.encoding import encode
from fused_dpo_engine.data.formats import Preference, Row, parse_row
from fused_dpo_engine.data.messages import Message
from fused_dpo_engine.data.pairs import TokenizationReport, TokenizedPairs, TokenPair, length_statistics
from fused_dpo_engine.data.rendering import Renderer, check_template
from fused_dpo_engine.data.sequences import find_boundary
from fused_dpo_engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_BATCH = 333  # three texts each: about 1000 to a call, enough for a fast tokenizer to use every core
CHANCE = 0.1
"""Share of the rows without a prompt that may have no words in common. Where it is more, the others' are chance."""


class _Skips:
    """Bad rows: passed on, or counted by reason where they may be skipped."""

    def __init__(self, allowed: bool):
        self.allowed = allowed
        self.counts: Counter[str] = Counter()

    @contextmanager
    def bad_rows(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            if not self.allowed:
                raise
            self.counts[error.reason] += 1


def tokenize_pairs(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncate_prompts: bool = False,
    skip_bad_rows: bool = False,
    chat_template: str | None = None,
    columns: Mapping[str, str] | None = None,
    score: Score = "assistant",
    pairing: Pairing = "best",
    rankings: bool = False,
    progress: bool = False,
) -> TokenizedPairs:
    """Turn rows into token pairs of at most `max_length` tokens a sequence, and report what was cut or left out.

    Plain text gets the tokenizer's special tokens and ends with its EOS token, once; a conversation is rendered with
    the chat template and ends as that does. A response that does not fit is cut at its end.

    Args:
        rows: from `read_rows`.
        tokenizer: any Hugging Face tokenizer; a fast one takes about a minute for 100k chats on two cores.
        max_length: tokens in prompt and response together, >= 2.
        truncate_prompts: shorten the prompt of a pair that does not fit at its beginning (a leading BOS token stays),
            first to what the longer response leaves, but never below `max_length // 2` tokens. Otherwise a prompt that
            leaves no room for a response makes the row a bad one.
        skip_bad_rows: drop and count rows that cannot be used, instead of raising at the first.
        chat_template: Jinja template to use instead of the tokenizer's own.
        columns: columns of the rows, by the names they are to have.
        score: what of an answer of several messages is scored: the assistant's turns, the last of them, or all.
        pairing: which answers of a row are compared, see `ranked_pairs`.
        rankings: number the pairs of each row as one ranking.
        progress: show a progress bar.

    Raises:
        DataError: a row cannot be used (names file and line), none can, or a conversation meets no chat template.
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2, a prompt token and a response token, got {max_length}")
    skips = _Skips(allowed=skip_bad_rows)
    preferences: list[Preference] = []
    used: set[str] = set()
    for row in rows:  # all of them first: a malformed last line should not cost the tokenization of the others
        with skips.bad_rows():
            if columns and row.error is None:
                row = replace(row, values=renamed(row.values, columns, row.where))
            preferences.append(parse_row(row))
            used |= preferences[-1].used
    implied = sum(preference.implied for preference in preferences)
    _check_implied(implied, skips)
    if any(not isinstance(preference.prompt, str) for preference in preferences):
        check_template(tokenizer, chat_template)
    spelled = _count_spelled(preferences, tokenizer)
    renderer = Renderer(tokenizer, chat_template, score)

    pairs: list[TokenPair] = []
    merged_boundaries, prompt_cuts, response_cuts = 0, [], []
    brought, brought_taken = 0, 0
    for batch in _batches(preferences, progress):
        rendered = []
        for preference in batch:
            with skips.bad_rows():
                rendered.append(renderer.render(preference))
        for item, ids in zip(rendered, encode(rendered, tokenizer), strict=True):
            with skips.bad_rows():
                sequences, merged = find_boundary(ids, item.scores, item.where)
                prompt_cut = 0
                if truncate_prompts:
                    prompt_cut = sequences.cut_prompt(max_length, cast("int | None", tokenizer.bos_token_id))
                cuts = sequences.cut_answers(max_length)
                made = sequences.pairs(pairing, len(pairs) if rankings else None)
                if item.brings_reference:
                    brought += len(made)
                    # Numbers of other tokens than those that are scored here would be those of another sequence.
                    if item.reference and len(item.answers) == 2 and not (merged or prompt_cut or any(cuts)):
                        brought_taken += 1
                        made = [replace(pair, reference=item.reference) for pair in made]
                pairs += made
                merged_boundaries += merged
                prompt_cuts.append(prompt_cut)
                response_cuts.extend(cuts)

    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skips.counts.items()))
        raise DataError(f"no usable pair is left of {len(rows)} rows: {reasons or 'there were no rows'}")
    report = TokenizationReport(
        max_length=max_length,
        rows_read=len(rows),
        pairs_kept=len(pairs),
        skipped=dict(skips.counts),
        prompts_cut=sum(cut > 0 for cut in prompt_cuts),
        responses_cut=sum(cut > 0 for cut in response_cuts),
        tokens_cut=sum(prompt_cuts) + sum(response_cuts),
        merged_boundaries=merged_boundaries,
        implied_prompts=implied,
        unused_columns=_unused(rows, used | set((columns or {}).values())),
        spelled_rows=spelled,
        brought=brought,
        brought_taken=brought_taken,
        prompt_tokens=length_statistics(pair.prompt_length for pair in pairs),
        chosen_tokens=length_statistics(pair.chosen_length for pair in pairs),
        rejected_tokens=length_statistics(pair.rejected_length for pair in pairs),
    )
    return TokenizedPairs(pairs, report)


def _count_spelled(preferences: list[Preference], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the rows whose texts hold what a special token is written as, an EOS at the end of an answer aside."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    if not names:
        return 0
    spelled, eos = re.compile("|".join(map(re.escape, names))), str(tokenizer.eos_token or "")

    def within(text: str | list[Message]) -> bool:
        texts = [text] if isinstance(text, str) else [message["content"] for message in text]
        return any(spelled.search(text.removesuffix(eos)) for text in texts)

    return sum(any(map(within, (preference.prompt, *preference.answers))) for preference in preferences)


def _batches(preferences: list[Preference], progress: bool) -> Iterator[list[Preference]]:
    from tqdm.auto import tqdm

    with tqdm(total=len(preferences), desc="tokenizing", unit="row", disable=not progress) as bar:
        for start in range(0, len(preferences), ROWS_PER_BATCH):
            batch = preferences[start : start + ROWS_PER_BATCH]
            yield batch
            bar.update(len(batch))


def _check_implied(implied: int, skips: _Skips) -> None:
    """Refuse rows without a prompt of which many have nothing in common: these hold answers alone.

    Raises:
        DataError: whether or not bad rows may be skipped.
    """
    apart = skips.counts["no common beginning"]
    if apart > CHANCE * (implied + apart) and implied:
        raise DataError(
            f"{apart} of {implied + apart} rows without a prompt have answers with nothing in common, so what the "
            "others begin with is chance and no question; put the question into prompt, or name its column, such as "
            "--columns prompt=text"
        )


def _unused(rows: Sequence[Row], used: set[str]) -> tuple[str, ...]:
    """List the columns that hold something in some row and are not used, in the order of the rows."""
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.values.items():
            if value is not None and name not in used:
                names[name] = None
    return tuple(names)
