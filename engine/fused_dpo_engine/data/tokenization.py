"""Preference rows to token pairs: where the prompt ends, which tokens are scored, what was cut or left out.

The boundary is found on tokens, not on text: both sequences are tokenized whole, and the prompt is what they (and the
prompt tokenized alone) have in common. So a token that merges across prompt and response is scored in full, and the
prompt tokens are the same in both sequences, which lets the trainer compute them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from fused_dpo_engine.config.options import Pairing, Score
from fused_dpo_engine.data.columns import renamed
from fused_dpo_engine.data.formats import Preference, Row, parse_row
from fused_dpo_engine.data.pairs import TokenizationReport, TokenizedPairs, TokenPair, common_prefix, length_statistics
from fused_dpo_engine.data.ranking import token_pairs
from fused_dpo_engine.data.rendering import Rendered, Renderer, check_template
from fused_dpo_engine.errors import DataError, bad_row

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
    renderer = Renderer(tokenizer, chat_template, score)

    pairs: list[TokenPair] = []
    merged_boundaries, prompt_cuts, response_cuts = 0, [], []
    for batch in _batches(preferences, progress):
        rendered = []
        for preference in batch:
            with skips.bad_rows():
                rendered.append(renderer.render(preference))
        for item, ids in zip(rendered, _encode(rendered, tokenizer), strict=True):
            with skips.bad_rows():
                sequences, merged = _find_boundary(ids, item)
                prompt_cut = 0
                if truncate_prompts:
                    prompt_cut = sequences.cut_prompt(max_length, cast("int | None", tokenizer.bos_token_id))
                cuts = sequences.cut_answers(max_length)
                pairs += sequences.pairs(pairing, len(pairs) if rankings else None)
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
        prompt_tokens=length_statistics(pair.prompt_length for pair in pairs),
        chosen_tokens=length_statistics(pair.chosen_length for pair in pairs),
        rejected_tokens=length_statistics(pair.rejected_length for pair in pairs),
    )
    return TokenizedPairs(pairs, report)


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


def _encode(rendered: list[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Ids]:
    """Encode each item's texts, in one tokenizer call for all plain texts and one for all conversations."""
    plain_texts = [text for item in rendered if item.plain for text in (*item.answers, item.prompt)]
    chat_texts = [text for item in rendered if not item.plain for text in _chat_texts(item)]
    plain_ids = iter(_tokenize(plain_texts, tokenizer, add_special_tokens=True))
    chat_ids = iter(_tokenize(chat_texts, tokenizer, add_special_tokens=False))
    appended = _appended_ids(tokenizer) if plain_texts else []
    eos = cast("int | None", tokenizer.eos_token_id)
    ending = appended if eos is None or appended[-1:] == [eos] else [*appended, eos]
    for item in rendered:
        if item.plain:
            bodies = [_without_ending(next(plain_ids), appended) for _ in range(len(item.answers) + 1)]
            *answers, prompt = bodies
            ended = [np.append(_without_ending(ids, ending), np.array(ending, dtype=np.int32)) for ids in answers]
            yield _Ids(ended, prompt, [None] * len(ended))
            continue
        answers = [next(chat_ids) for _ in item.answers]
        prompt = next(chat_ids)
        edges = [spans and [next(chat_ids) for _ in range(2 * len(spans))] for spans in item.spans]
        yield _Ids(answers, prompt, edges)


class _Ids(NamedTuple):
    """A rendered item in tokens."""

    answers: list[np.ndarray]
    prompt: np.ndarray
    edges: list[list[np.ndarray] | None]
    """For each answer, the text up to each end of what is scored; None where all that follows the prompt is."""


def _chat_texts(item: Rendered) -> Iterator[str]:
    yield from item.answers
    yield item.prompt
    for text, spans in zip(item.answers, item.spans, strict=True):
        for span in spans or ():
            yield from (text[:edge] for edge in span)


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> list[np.ndarray]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # max_length decides here, not the tokenizer's own limit
    )
    return [np.array(ids, dtype=np.int32) for ids in cast("list[list[int]]", encoded["input_ids"])]


def _appended_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the special tokens that the tokenizer itself puts after a text (often none, sometimes EOS)."""
    (bare,) = _tokenize(["a"], tokenizer, add_special_tokens=False)
    (full,) = _tokenize(["a"], tokenizer, add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if np.array_equal(full[start : start + len(bare)], bare):
            return full[start + len(bare) :].tolist()
    return []


def _without_ending(ids: np.ndarray, ending: list[int]) -> np.ndarray:
    return ids[: -len(ending)] if ending and ids[-len(ending) :].tolist() == ending else ids


def _find_boundary(ids: _Ids, item: Rendered) -> tuple[_Sequences, bool]:
    """Find where the prompt ends; also tells whether the prompt alone is more than all answers begin with."""
    _require_different(ids.answers, item.where, "become the same tokens", "identical after tokenization")
    first = ids.answers[0]
    common = min(common_prefix(first, other) for other in (*ids.answers[1:], ids.prompt))
    merged = common < len(ids.prompt)
    # A response that is empty, or that another one begins with, still needs a token to score.
    prompt_length = min(common, *(len(answer) - 1 for answer in ids.answers))
    if prompt_length < 1:
        what = "both sequences must begin with a token that is not scored, as nothing predicts a first token, got none"
        way_out = "give a prompt that is not empty, or use a tokenizer that begins a text with a BOS token"
        raise bad_row(item.where, f"{what}; {way_out}", "no common beginning")
    scored = [
        edges and _between(answer, edges, prompt_length) for answer, edges in zip(ids.answers, ids.edges, strict=True)
    ]
    return _Sequences(prompt_length, ids.answers, scored, item.scores, item.where), merged


def _between(answer: np.ndarray, edges: list[np.ndarray], prompt_length: int) -> np.ndarray:
    """Find the tokens between pairs of edges; one that merges across the first edge is within, as a response's is."""
    ends = [common_prefix(answer, edge) for edge in edges]
    spans = [np.arange(max(start, prompt_length), stop) for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    return np.concatenate(spans)


def _require_different(answers: list[np.ndarray], where: str, what: str, reason: str) -> None:
    """Refuse two answers that are the same tokens; of more than two, those that differ are paired."""
    if len(answers) == 2 and np.array_equal(*answers):
        raise bad_row(where, f"chosen and rejected {what}", reason)


@dataclass
class _Sequences:
    """The answers of a row, each after the prompt."""

    prompt_length: int
    answers: list[np.ndarray]
    scored: list[np.ndarray | None]
    scores: Sequence[float] | None
    where: str

    def cut_prompt(self, max_length: int, bos: int | None) -> int:
        """Shorten the prompt of a row that does not fit at its beginning; returns the number of tokens it lost."""
        longest = max(len(answer) for answer in self.answers) - self.prompt_length
        cut = self.prompt_length - max(max_length - longest, max_length // 2)
        if cut <= 0:
            return 0
        kept = int(self.answers[0][0] == bos)
        self.answers = [np.delete(answer, slice(kept, kept + cut)) for answer in self.answers]
        self.scored = [None if positions is None else positions - cut for positions in self.scored]
        self.prompt_length -= cut
        return cut

    def cut_answers(self, max_length: int) -> list[int]:
        """Cut all sequences at `max_length`; returns the number of tokens each lost."""
        cuts = [max(0, len(answer) - max_length) for answer in self.answers]
        if any(cuts):
            if self.prompt_length >= max_length:
                what = f"the prompt's {self.prompt_length} tokens leave no room for a response in max_length"
                way_out = "raise --max-length, or shorten such prompts with --truncate-prompts"
                raise bad_row(self.where, f"{what} {max_length}; {way_out}", "prompt leaves no room")
            self.answers = [answer[:max_length].copy() for answer in self.answers]
            self.scored = [
                None if positions is None else positions[positions < max_length] for positions in self.scored
            ]
            what = f"agree in all of the first max_length {max_length} tokens; raise --max-length"
            _require_different(self.answers, self.where, what, "identical after truncation")
        if any(positions is not None and not len(positions) for positions in self.scored):
            what = "a response has no token of the assistant's within max_length; raise --max-length"
            raise bad_row(self.where, what, "nothing to score")
        return cuts

    def pairs(self, pairing: Pairing, ranking: int | None) -> list[TokenPair]:
        """Pair the answers, see `token_pairs`."""
        return token_pairs(
            self.prompt_length,
            self.answers,
            self.scores,
            self.where,
            pairing=pairing,
            ranking=ranking,
            scored=self.scored,
        )
