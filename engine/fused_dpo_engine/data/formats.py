"""Rows of preference data, and what each one asks: a prompt and two or more answers.

`parse_row` turns a `Row` into a `Preference`, or raises a `DataError` that names its file and line. What columns
mean is in `fused_dpo_engine.data.columns`, what messages look like in `fused_dpo_engine.data.messages`.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from fused_dpo_engine.data.columns import Columns, read_columns
from fused_dpo_engine.data.json_text import read_json
from fused_dpo_engine.data.messages import (
    WRITTEN,
    Message,
    checked_text,
    clean_messages,
    common_length,
    parsed_tools,
    require_assistant,
    without_nulls,
)
from fused_dpo_engine.data.references import Brought, read_brought
from fused_dpo_engine.errors import DataError, bad_row, short

REPEATED = 8
"""Characters of a prompt of one word from which on answers that begin with it are taken to repeat it."""
_CLAUSE = re.compile(r"\w\W+\w+\W|\w[.!?:;\u3000-\u303f\uff00-\uff0f]")
"""Two whole words, or what ends a clause (in scripts without spaces too)."""
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Letters of scripts that put no spaces between words."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of what a model of text cannot see."""

Text = str | list[Message]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its columns and where it stands (`pairs.jsonl:17`), or the error that kept it unread."""

    values: dict[str, Any]
    where: str
    error: DataError | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """A parsed row: all texts, or all lists of messages."""

    prompt: Text
    answers: tuple[Text, ...]
    """At least two, the best first."""
    where: str
    scores: tuple[float, ...] | None = None
    """Of the answers, descending; None where the row has none."""
    tools: list[Any] = field(default_factory=list)
    """Schemas of the tools that a conversation may call, for the chat template."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template."""
    used: frozenset[str] = frozenset()
    """Columns that all of this came from."""
    implied: bool = False
    """The prompt is text that the answers share."""
    brought: Brought | None = None
    """Log-probs of a reference; None where the row has no column for them."""

    @property
    def chosen(self) -> Text:
        """The best answer."""
        return self.answers[0]

    @property
    def rejected(self) -> Text:
        """The worst answer."""
        return self.answers[-1]


def parse_row(row: Row) -> Preference:
    """Detect a row's format and check it.

    Known are the formats of `fused_dpo_engine.data.columns.FORMATS`. In each, prompt and answers are texts, or lists of
    messages; beside a prompt of messages each answer may also be one message or plain text, taken as the assistant's.
    A prompt that all answers repeat is split off. Without a prompt the answers share their beginning, and are split
    where they part: texts after whole words, conversations after whole messages, leaving each at least one.

    Raises:
        DataError: the row is none of these; names where it stands.
    """
    if row.error is not None:
        raise row.error
    try:
        return _parsed(row)
    except RecursionError:
        what = "a column holds lists or objects that are nested too deep"
        raise bad_row(row.where, what, "nested too deep") from None


def _parsed(row: Row) -> Preference:
    where = row.where
    if media := [name for name in MEDIA if row.values.get(name)]:
        raise bad_row(where, f"the row has {', '.join(media)}; text alone can be trained on", "not text")
    columns = read_columns(row.values, where)
    brought = read_brought(row.values)
    used = columns.used | ({"tools", "chat_template_kwargs"} & row.values.keys()) | (brought.used if brought else set())
    tools = parsed_tools(columns.tools or row.values.get("tools"), where)
    arguments = _template_arguments(row.values.get("chat_template_kwargs"), where)
    names = _names(columns)
    prompt, answers = _split(columns.prompt, columns.answers.texts, names, where)
    if all(answer == answers[0] for answer in answers):
        what = f'"{names[0]}" and "{names[1]}" must differ, got {short(answers[0])} for both'
        raise bad_row(where, what, "chosen equals rejected")
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, list):
            require_assistant(answer, name, where)
    implied = columns.prompt is None and isinstance(prompt, str)
    return Preference(prompt, answers, where, columns.answers.scores, tools, arguments, used, implied, brought)


def _names(columns: Columns) -> list[str]:
    """Name the answers of a row, for messages of errors."""
    count = len(columns.answers.texts)
    return ["chosen", "rejected"] if count == 2 else [f"answer {number}" for number in range(1, count + 1)]


Parts = tuple[Text, tuple[Text, ...]]


def _split(prompt: Any, answers: tuple[Any, ...], names: list[str], where: str) -> Parts:
    """Check the prompt and the answers, and take apart what is repeated or shared."""
    if prompt is None or (isinstance(prompt, str) and all(_opens_with(prompt, answer) for answer in answers)):
        return _without_prompt(answers, names, where)
    if isinstance(prompt, dict):
        prompt = [prompt]  # a single message
    if isinstance(prompt, list):
        asked = clean_messages(prompt, "prompt", where)
        talks = [_response(answer, name, where) for answer, name in zip(answers, names, strict=True)]
        if all(talk[: len(asked)] == asked and len(talk) > len(asked) for talk in talks):
            talks = [talk[len(asked) :] for talk in talks]
        return asked, tuple(talks)
    text = checked_text(prompt, "prompt", where, "text or a list of messages")
    texts = _texts(answers, names, '"prompt" is text', where)
    repeatable = len(text) >= REPEATED or _CLAUSE.search(text)
    if repeatable and all(answer.startswith(text) and len(answer) > len(text) for answer in texts):
        texts = tuple(answer[len(text) :] for answer in texts)
    return text, texts


def _without_prompt(answers: tuple[Any, ...], names: list[str], where: str) -> Parts:
    if any(isinstance(answer, str) for answer in answers):
        texts = _texts(answers, names, "one answer is text", where)
        shared = _whole_words(texts)
        if not _CLAUSE.search(shared + " ") and len(set(texts)) == len(texts):
            raise _nothing_common(texts, names, where)
        return shared, tuple(text[len(shared) :] for text in texts)
    kind = "text or a list of messages"
    talks = [clean_messages(answer, name, where, kind) for answer, name in zip(answers, names, strict=True)]
    shared = 0
    for messages in zip(*(talk[:-1] for talk in talks), strict=False):  # the last message of each is an answer
        if any(message != messages[0] for message in messages):
            break
        shared += 1
    if shared == 0 and any(talk != talks[0] for talk in talks):
        raise _nothing_common(answers, names, where)
    return talks[0][:shared], tuple(talk[shared:] for talk in talks)


def _whole_words(texts: tuple[str, ...]) -> str:
    """Find the words that all texts begin with; the space before what parts them is left to the answers."""
    shared = min(texts)
    end = common_length(shared, max(texts))  # of the first and the last in order, which is that of all
    while end and any(_inside_word(text, end) for text in texts):
        end -= 1
    return shared[: end - shared.endswith(" ", 0, end)]


def _inside_word(text: str, at: int) -> bool:
    around = text[at - 1 : at + 1]
    return len(around) == 2 and around.replace("_", "a").isalnum() and not _UNSPACED.search(around)


def _opens_with(prompt: str, response: Any) -> bool:
    """Tell whether a list of messages begins with the prompt's text, a system message before it aside."""
    if not isinstance(response, list):
        return False
    contents = [message.get("content", message.get("value")) for message in response if isinstance(message, dict)]
    return prompt in contents[:2]


def _texts(answers: tuple[Any, ...], names: list[str], given: str, where: str) -> tuple[str, ...]:
    for name, value in zip(names, answers, strict=True):
        if isinstance(value, (list, dict)):
            way_out = "make them all text, or all lists of messages without repeating the prompt's"
            what = f'a row must not mix text and messages, got: {given} but "{name}" is {short(value)}; {way_out}'
            raise bad_row(
                where, f"{what}; if the responses hold the whole conversation, remove prompt", "mixed formats"
            )
        if isinstance(value, str) and WRITTEN.match(value):
            what = f'"{name}" looks like messages written as JSON, but they cannot be read: {short(value)}'
            raise bad_row(where, what, "malformed messages")
    return tuple(checked_text(value, name, where) for name, value in zip(names, answers, strict=True))


def _nothing_common(answers: tuple[Any, ...], names: list[str], where: str) -> DataError:
    listed = " and ".join(f'"{name}"' for name in names)
    shown = " and ".join(short(answer) for answer in answers[:2])
    what = f'without "prompt", {listed} must share a beginning, at least two words or a message, got {shown}'
    way_out = 'put the question into "prompt", or name its column, such as --columns prompt=text'
    return bad_row(where, f"{what}; {way_out}", "no common beginning")


def _response(value: Any, key: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": checked_text(value, key, where)}]
    kind = "a list of messages, a message or text"
    return clean_messages([value] if isinstance(value, dict) else value, key, where, kind)


def _template_arguments(value: Any, where: str) -> dict[str, Any]:
    """Read a row's `chat_template_kwargs`: an object, or one as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = read_json(value)
        except ValueError as error:
            raise bad_row(where, f'"chat_template_kwargs" is text that is no JSON: {error}', "wrong type") from error
    if not value:
        return {}
    if not isinstance(value, dict):
        raise bad_row(where, f'"chat_template_kwargs" must be an object, got {short(value)}', "wrong type")
    return without_nulls(value)
