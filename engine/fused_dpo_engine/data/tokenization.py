"""Preference rows to token pairs: where the prompt ends, which tokens are scored, what was cut or left out.

The boundary is found on tokens, not on text: both sequences are tokenized whole, and the prompt is what they (and the
prompt tokenized alone) have in common. So a token that merges across prompt and response is scored in full, and the
prompt tokens are the same in both sequences, which lets the trainer compute them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import jinja2
import numpy as np

from fused_dpo_engine.config.options import Pairing
from fused_dpo_engine.data.formats import Message, Preference, Row, bad_row, parse_row
from fused_dpo_engine.data.pairs import TokenizationReport, TokenizedPairs, TokenPair, common_prefix, length_statistics
from fused_dpo_engine.data.ranking import token_pairs
from fused_dpo_engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_BATCH = 333  # three texts each: about 1000 to a call, enough for a fast tokenizer to use every core
_TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A preference as the texts to tokenize: chosen, rejected and, where the row has one, the prompt alone."""

    texts: tuple[str, ...]
    plain: bool  # False: a rendered conversation, which holds its special tokens already
    where: str


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
    for row in rows:  # all of them first: a malformed last line should not cost the tokenization of the others
        with skips.bad_rows():
            preferences.append(parse_row(row))
    if any(isinstance(preference.chosen, list) for preference in preferences):
        chat_template = _resolve_template(tokenizer, chat_template)

    pairs: list[TokenPair] = []
    merged_boundaries, prompt_cuts, response_cuts = 0, [], []
    for batch in _batches(preferences, progress):
        rendered = []
        for preference in batch:
            with skips.bad_rows():
                rendered.append(_render(preference, tokenizer, chat_template))
        for item, ids in zip(rendered, _encode(rendered, tokenizer), strict=True):
            with skips.bad_rows():
                pair, merged = _find_boundary(ids, item.where)
                prompt_cut = 0
                if truncate_prompts:
                    pair, prompt_cut = _cut_prompt(pair, max_length, cast("int | None", tokenizer.bos_token_id))
                pair, cuts = _cut_responses(pair, max_length)
                answers = [pair.chosen_ids, pair.rejected_ids]
                number = len(pairs) if rankings else None
                pairs += token_pairs(pair.prompt_length, answers, None, item.where, pairing=pairing, ranking=number)
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


def _resolve_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    try:
        template = tokenizer.get_chat_template(chat_template)
    except ValueError as error:
        raise DataError(
            f"the rows hold conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template for them; "
            "pass chat_template (command line: --chat-template FILE), use the tokenizer of a chat model, or give the "
            "rows as plain text"
        ) from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
    except _TEMPLATE_FAILURES:
        pass  # it may well refuse this conversation
    return template


def _render(preference: Preference, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> _Rendered:
    prompt, chosen, rejected, where = preference.prompt, preference.chosen, preference.rejected, preference.where
    if isinstance(prompt, list):
        conversations = (prompt + cast("list[Message]", chosen), prompt + cast("list[Message]", rejected), prompt)
        return _render_conversations(conversations, tokenizer, chat_template, where)
    chosen, rejected = cast(str, chosen), cast(str, rejected)
    if prompt is None:
        return _Rendered((chosen, rejected), True, where)
    return _Rendered((prompt + chosen, prompt + rejected, prompt), True, where)


def _render_conversations(
    conversations: tuple[list[Message], ...], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, where: str
) -> _Rendered:
    prompt, texts = conversations[-1], []
    for messages in conversations:
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=chat_template, tokenize=False, add_generation_prompt=messages is prompt
            )
        except _TEMPLATE_FAILURES as error:
            roles = ", ".join(message["role"] for message in messages)
            what = f"the chat template refuses a conversation with the roles {roles}: {error}"
            raise bad_row(where, what, "refused by the chat template") from error
        texts.append(cast(str, text))
    for message in prompt:
        # Templates leave out roles they do not know without a word. (What an assistant said earlier they may shorten.)
        if message["role"] != "assistant" and message["content"].strip() not in texts[0]:
            what = f"the chat template leaves out the prompt's {message['role']!r} message"
            way_out = "it may expect other names for the roles, such as user and assistant"
            raise bad_row(where, f"{what}; {way_out}", "left out by the chat template")
    return _Rendered(tuple(texts), False, where)


def _encode(rendered: list[_Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[np.ndarray]]:
    """Encode each item's texts, in one tokenizer call for all plain texts and one for all conversations."""
    plain_texts = [text for item in rendered if item.plain for text in item.texts]
    chat_texts = [text for item in rendered if not item.plain for text in item.texts]
    plain_ids = iter(_tokenize(plain_texts, tokenizer, add_special_tokens=True))
    chat_ids = iter(_tokenize(chat_texts, tokenizer, add_special_tokens=False))
    appended = _appended_ids(tokenizer) if plain_texts else []
    eos = cast("int | None", tokenizer.eos_token_id)
    ending = appended if eos is None or appended[-1:] == [eos] else [*appended, eos]
    for item in rendered:
        if not item.plain:
            yield [next(chat_ids) for _ in item.texts]
            continue
        bodies = [_without_ending(next(plain_ids), appended) for _ in item.texts]
        sequences = [np.append(_without_ending(ids, ending), np.array(ending, dtype=np.int32)) for ids in bodies[:2]]
        yield [*sequences, *bodies[2:]]


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


def _find_boundary(ids: list[np.ndarray], where: str) -> tuple[TokenPair, bool]:
    """Find where the prompt ends; returns the pair, and whether the prompt alone is more than both begin with."""
    chosen, rejected = ids[:2]
    if np.array_equal(chosen, rejected):
        what = '"chosen" and "rejected" become the same tokens'
        raise bad_row(where, what, "identical after tokenization")
    common, merged = common_prefix(chosen, rejected), False
    if len(ids) == 3:
        common = min(common, common_prefix(chosen, ids[2]))
        merged = common < len(ids[2])
    # A response that is empty, or that the other one begins with, still needs a token to score.
    prompt_length = min(common, len(chosen) - 1, len(rejected) - 1)
    if prompt_length < 1:
        what = "both sequences must begin with a token that is not scored, as nothing predicts a first token, got none"
        way_out = "give a prompt that is not empty, or use a tokenizer that begins a text with a BOS token"
        raise bad_row(where, f"{what}; {way_out}", "no common beginning")
    return TokenPair(prompt_length, chosen, rejected, where), merged


def _cut_prompt(pair: TokenPair, max_length: int, bos: int | None) -> tuple[TokenPair, int]:
    """Shorten the prompt of a pair that does not fit at its beginning; also the number of tokens it lost."""
    longest_response = max(pair.chosen_length, pair.rejected_length)
    cut = pair.prompt_length - max(max_length - longest_response, max_length // 2)
    if cut <= 0:
        return pair, 0
    kept = int(pair.chosen_ids[0] == bos)
    chosen, rejected = (np.delete(ids, slice(kept, kept + cut)) for ids in (pair.chosen_ids, pair.rejected_ids))
    return TokenPair(pair.prompt_length - cut, chosen, rejected, pair.where), cut


def _cut_responses(pair: TokenPair, max_length: int) -> tuple[TokenPair, list[int]]:
    """Cut both sequences at `max_length`; also the number of tokens each response lost."""
    cuts = [max(0, len(ids) - max_length) for ids in (pair.chosen_ids, pair.rejected_ids)]
    if not any(cuts):
        return pair, cuts
    if pair.prompt_length >= max_length:
        what = f"the prompt's {pair.prompt_length} tokens leave no room for a response in max_length {max_length}"
        way_out = "raise --max-length, or shorten such prompts with --truncate-prompts"
        raise bad_row(pair.where, f"{what}; {way_out}", "prompt leaves no room")
    chosen, rejected = (ids[:max_length].copy() for ids in (pair.chosen_ids, pair.rejected_ids))
    if np.array_equal(chosen, rejected):
        what = f"chosen and rejected agree in all of the first max_length {max_length} tokens"
        raise bad_row(pair.where, f"{what}; raise --max-length", "identical after truncation")
    return TokenPair(pair.prompt_length, chosen, rejected, pair.where), cuts
