"""Rendered rows as tokens, many texts to a call of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from fused_dpo_engine.data.pairs import common_prefix
from fused_dpo_engine.data.rendering import Rendered
from fused_dpo_engine.data.sequences import EncodedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
MOST_AGAIN = 5_000_000
"""Characters of an answer that are tokenized again, at most, to find its turns among its tokens."""


class _Text(NamedTuple):
    """A text in tokens."""

    ids: np.ndarray
    """int32."""
    starts: np.ndarray | None
    """int64, the character where each token begins; None from a tokenizer that does not tell."""


class _Piece(NamedTuple):
    """The end of a text's beginning, as far as an edge of what is scored."""

    text: str
    token: int
    """Where its first token stands in the whole text."""


def encode(rendered: list[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[EncodedRow]:
    """Encode each item's texts: all plain texts in one call of the tokenizer, conversations in two."""
    plain_texts = [text for item in rendered if item.plain for text in (*item.answers, item.prompt)]
    chat_texts = [text for item in rendered if not item.plain for text in (*item.answers, item.prompt)]
    located = any(spans for item in rendered for spans in item.spans)
    plain = iter(_tokenize(plain_texts, tokenizer, add_special_tokens=True))
    chat = iter(_tokenize(chat_texts, tokenizer, add_special_tokens=False, located=located))
    rows = [[next(plain if item.plain else chat) for _ in (*item.answers, item.prompt)] for item in rendered]
    edges = _edges(rendered, rows, tokenizer)
    appended = _appended_ids(tokenizer) if plain_texts else []
    eos = cast("int | None", tokenizer.eos_token_id)
    ending = appended if eos is None or appended[-1:] == [eos] else [*appended, eos]
    for item, texts in zip(rendered, rows, strict=True):
        *answers, prompt = (text.ids for text in texts)
        if item.plain:
            answers = [_without_ending(_without_ending(ids, appended), ending) for ids in answers]
            answers = [np.append(ids, np.array(ending, dtype=np.int32)) for ids in answers]
            prompt = _without_ending(prompt, appended)
        yield EncodedRow(answers, prompt, [None if spans is None else next(edges) for spans in item.spans])


def _edges(
    rendered: list[Rendered], rows: list[list[_Text]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Find, for each answer with spans, how many of its tokens the text up to each edge begins with.

    A tokenizer cuts its text at special tokens before all else. So what stands before the last one that ends before an
    edge has the same tokens there as in the whole, and only the rest is tokenized again: in a long conversation all
    beginnings would be a hundred times the text. Where that cannot be avoided and is too much, there are no edges.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = np.array([token for token, its in added if its.special], dtype=np.int32)
    wanted: list[tuple[np.ndarray, list[_Piece]]] = []
    for item, texts in zip(rendered, rows, strict=True):
        for text, encoded, spans in zip(item.answers, texts, item.spans, strict=False):
            if spans is not None:
                cuts = _cuts(encoded, special)
                pieces = [_piece(text, edge, encoded, cuts) for span in spans for edge in span]
                too_long = sum(len(piece.text) for piece in pieces) > MOST_AGAIN
                wanted.append((encoded.ids, [] if too_long else pieces))
    again = iter(_tokenize([piece.text for _, pieces in wanted for piece in pieces], tokenizer, False))
    for ids, pieces in wanted:
        yield [piece.token + common_prefix(ids[piece.token :], next(again).ids) for piece in pieces]


def _cuts(encoded: _Text, special: np.ndarray) -> np.ndarray:
    """List the tokens, ascending, before which the tokenizer cuts a text."""
    return np.flatnonzero(np.isin(encoded.ids, special)) if encoded.starts is not None else np.array([], np.int64)


def _piece(text: str, edge: int, encoded: _Text, cuts: np.ndarray) -> _Piece:
    if encoded.starts is None or not len(cuts):
        return _Piece(text[:edge], 0)
    # The last special token that begins before the edge may end after it; the one before that does not.
    before = int(np.searchsorted(encoded.starts[cuts], edge)) - 2
    if before < 0:
        return _Piece(text[:edge], 0)
    token = int(cuts[before])
    return _Piece(text[int(encoded.starts[token]) : edge], token)


def _tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool, located: bool = False
) -> list[_Text]:
    if not texts:
        return []
    located = located and bool(tokenizer.is_fast)
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=located,
        verbose=False,  # max_length decides here, not the tokenizer's own limit
    )
    ids = cast("list[list[int]]", encoded["input_ids"])
    offsets = cast("list[list[tuple[int, int]]]", encoded["offset_mapping"]) if located else [None] * len(ids)
    return [
        _Text(np.array(tokens, np.int32), None if at is None else np.array([start for start, _ in at], np.int64))
        for tokens, at in zip(ids, offsets, strict=True)
    ]


def _appended_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the special tokens that the tokenizer itself puts after a text (often none, sometimes EOS)."""
    ((bare, _),) = _tokenize(["a"], tokenizer, add_special_tokens=False)
    ((full, _),) = _tokenize(["a"], tokenizer, add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if np.array_equal(full[start : start + len(bare)], bare):
            return full[start + len(bare) :].tolist()
    return []


def _without_ending(ids: np.ndarray, ending: list[int]) -> np.ndarray:
    return ids[: -len(ending)] if ending and ids[-len(ending) :].tolist() == ending else ids
