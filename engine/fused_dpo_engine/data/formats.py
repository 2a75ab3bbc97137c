"""Rows of preference data, and which of the known formats each one has.

`parse_row` turns a `Row` into a `Preference`, or raises a `DataError` that names its file and line.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from fused_dpo_engine.errors import DataError

Message = dict[str, Any]
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxdict = 3


def bad_row(where: str, message: str, reason: str) -> DataError:
    """Make the error for a single unusable row, with the way out that all of them share."""
    return DataError(f"{where}: {message}. --skip-bad-rows drops and counts such rows", reason=reason)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its columns and where it stands (`pairs.jsonl:17`), or the error that kept it unread."""

    values: dict[str, Any]
    where: str
    error: DataError | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """A parsed row: all texts, or all lists of messages.

    `prompt` is None for texts that only share a beginning; conversations always have one.
    """

    prompt: str | list[Message] | None
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str


def parse_row(row: Row) -> Preference:
    """Detect a row's format and check it.

    Known: texts with or without a prompt; lists of messages with or without a prompt, where beside a prompt of
    messages each response may also be one message or plain text, taken as the assistant's. Other columns are ignored.
    A conversation without a prompt is split after the messages both sides share, leaving each at least one; so is one
    whose prompt column only repeats the text that both sides open with (as in UltraFeedback).

    Raises:
        DataError: the row is none of these; names where it stands.
    """
    if row.error is not None:
        raise row.error
    where, values = row.where, row.values
    missing = [key for key in ("chosen", "rejected") if key not in values]
    if missing:
        keys = ", ".join(repr(key) for key in values) or "none"
        what = f'a row needs "chosen" and "rejected", and mostly "prompt"; missing {missing}, got the keys {keys}'
        raise bad_row(where, f"{what}; rename the columns", "missing key")

    prompt, chosen, rejected = (values.get(key) for key in ("prompt", "chosen", "rejected"))
    if "prompt" not in values:
        preference = _without_prompt(chosen, rejected, where)
    elif isinstance(prompt, list):
        prompt = _messages(prompt, "prompt", where)
        preference = Preference(
            prompt, _response(chosen, "chosen", where), _response(rejected, "rejected", where), where
        )
        if preference.chosen[: len(prompt)] == preference.rejected[: len(prompt)] == prompt:
            what = '"chosen" and "rejected" must not repeat the messages of "prompt"'
            raise bad_row(where, f"{what}, got both beginning with them; remove the column prompt", "repeated prompt")
    elif isinstance(prompt, str) and _opens_with(prompt, chosen) and _opens_with(prompt, rejected):
        preference = _without_prompt(chosen, rejected, where)
    else:
        prompt = _text(prompt, "prompt", where, "text or a list of messages")
        preference = Preference(prompt, *_texts(chosen, rejected, '"prompt" is text', where), where)
    if preference.chosen == preference.rejected:
        what = f'"chosen" and "rejected" must differ, got {short(preference.chosen)} for both'
        raise bad_row(where, what, "chosen equals rejected")
    return preference


def _without_prompt(chosen: Any, rejected: Any, where: str) -> Preference:
    if isinstance(chosen, str) or isinstance(rejected, str):
        chosen, rejected = _texts(chosen, rejected, "one response is text", where)
        if chosen[:1] != rejected[:1]:
            raise _nothing_common(chosen, rejected, where)
        return Preference(None, chosen, rejected, where)
    kind = "text or a list of messages"
    chosen, rejected = _messages(chosen, "chosen", where, kind), _messages(rejected, "rejected", where, kind)
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):  # the last message of each is a response
        if a != b:
            break
        shared += 1
    if shared == 0 and chosen != rejected:
        raise _nothing_common(chosen, rejected, where)
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:], where)


def _opens_with(prompt: str, response: Any) -> bool:
    """Tell whether a list of messages begins with the prompt's text, a system message before it aside."""
    if not isinstance(response, list):
        return False
    contents = [message.get("content") for message in response if isinstance(message, dict)]
    return prompt in contents[:2]


def _texts(chosen: Any, rejected: Any, given: str, where: str) -> tuple[str, str]:
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, (list, dict)):
            way_out = "make them all text, or all lists of messages without repeating the prompt's"
            what = f'a row must not mix text and messages, got: {given} but "{key}" is {short(value)}; {way_out}'
            raise bad_row(
                where, f"{what}; if the responses hold the whole conversation, remove prompt", "mixed formats"
            )
    return _text(chosen, "chosen", where), _text(rejected, "rejected", where)


def _nothing_common(chosen: Any, rejected: Any, where: str) -> DataError:
    what = 'without "prompt", "chosen" and "rejected" must share a beginning, got'
    shown = f"{short(chosen)} and {short(rejected)}"
    return bad_row(where, f'{what} {shown}; put the question into "prompt"', "no common beginning")


def _response(value: Any, key: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": _text(value, key, where)}]
    return _messages([value] if isinstance(value, dict) else value, key, where, "a list of messages, a message or text")


def _messages(value: Any, key: str, where: str, kind: str = "a list of messages") -> list[Message]:
    if not isinstance(value, list):
        raise bad_row(where, f'"{key}" must be {kind}, got {short(value)}', "wrong type")
    if not value:
        raise bad_row(where, f'"{key}" must hold at least one message, got an empty list', "empty messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            rule = 'must be a list of messages {"role": text, "content": text}'
            raise bad_row(where, f'"{key}" {rule}, got the item {short(message)}', "wrong type")
        _text(message.get("content"), f"content of the {message['role']} message in {key}", where)
    # Columnar files fill keys that other rows have with None.
    return [{name: field for name, field in message.items() if field is not None} for message in value]


def _text(value: Any, key: str, where: str, kind: str = "text") -> str:
    if not isinstance(value, str):
        raise bad_row(where, f'"{key}" must be {kind}, got {short(value)}', "wrong type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f'"{key}" must be valid Unicode, got a lone surrogate at character {error.start}'
        raise bad_row(where, what, "invalid Unicode") from error
    return value


def short(value: Any) -> str:
    """Show a value of a row, cut to fit into a message."""
    return _SHORT.repr(value)
