"""The table of formats: what the columns of a row mean in each, brought to a prompt and its answers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fused_dpo_engine.data.answers import Answers, read_answers
from fused_dpo_engine.data.messages import conversation, tools_beside
from fused_dpo_engine.errors import UserError, bad_row

Values = dict[str, Any]
ASKED = ("question", "instruction", "query", "input")
"""Columns that hold a question as text."""
LIKE_QUESTIONS = frozenset(
    {*ASKED, "context", "system", "history", "messages", "conversations", "conversation", "dialogue", "dialog"}
    | {"problem", "source", "article", "document", "passage", "post", "title", "user", "human", "prompts", "questions"}
    | {"instructions", "user_prompt", "user_message", "input_text", "task", "goal", "query_text", "system_prompt"}
)
"""Columns that look like what an answer answers."""


class Columns(NamedTuple):
    """A row's values under their usual names."""

    prompt: Any
    """None where there is no prompt of its own."""
    answers: Answers
    used: frozenset[str]
    """Names of the columns that they came from."""
    tools: Any = None
    """Schemas that stood beside the messages of one of these columns."""


class Format(NamedTuple):
    """A way to write a preference."""

    name: str
    needs: tuple[str, ...]
    """Columns that have a value in every row."""
    any_of: tuple[str, ...]
    """Columns of which at least one has a value; empty if none is asked for."""
    read: Callable[[Values, str], Columns | None]
    """Reads the values that are not None, given where the row stands; None if this is another format after all."""


def read_columns(values: Mapping[str, Any], where: str) -> Columns:
    """Find a row's format, and bring its columns to the usual names; capital letters in names make no difference.

    Raises:
        DataError: it has none of the known formats.
    """
    names = {name.lower(): name for name, value in reversed(list(values.items())) if value is not None}
    there = {low: values[name] for low, name in names.items()}
    for format_ in FORMATS:
        asked = not format_.any_of or any(there.get(name) for name in format_.any_of)
        if asked and all(name in there for name in format_.needs) and (columns := format_.read(there, where)):
            return columns._replace(used=frozenset(names[low] for low in columns.used))
    missing = [name for name in ("chosen", "rejected") if name not in there]
    keys = ", ".join(repr(name) for name in values) or "none"
    what = f'a row needs "chosen" and "rejected", and mostly "prompt"; missing {missing}, got the keys {keys}'
    raise bad_row(where, f"{what}; name the columns with --columns, such as --columns chosen=better", "missing key")


def _turn(role: str, text: Any) -> list[Values]:
    return [{"role": role, "content": text}] if text not in (None, "") else []


def _with_system(values: Values, messages: Any) -> Any:
    """Put the column `system` in front of a conversation that has no system message of its own."""
    if not values.get("system") or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    has_one = first.get("role", first.get("from")) in ("system", "developer")
    return messages if has_one else _turn("system", values["system"]) + messages


def _named(values: Values, *names: str) -> frozenset[str]:
    return frozenset(names) & values.keys()


def _explicit(values: Values, where: str) -> Columns | None:
    """Read TRL's `prompt`, `chosen`, `rejected`."""
    if (answers := read_answers(values, where)) is None:
        return None
    prompt = conversation(values["prompt"])
    if not prompt and not any(isinstance(text, str) for text in answers.texts):
        columns = _implicit({name: value for name, value in values.items() if name != "prompt"}, where)
        return columns and columns._replace(used=columns.used | {"prompt"})
    if isinstance(prompt, str) and values.get("system"):
        prompt = _turn("user", prompt)
    return _beside(values, _with_system(values, prompt), answers, "prompt", "system")


def _implicit(values: Values, where: str) -> Columns | None:
    """Read TRL's `chosen` and `rejected` alone, whose common beginning is the prompt."""
    if (answers := read_answers(values, where)) is None:
        return None
    looks = sorted(name for name in LIKE_QUESTIONS & values.keys() - answers.used if values[name])
    if looks and any(isinstance(text, str) for text in answers.texts):
        what = f"the row has no prompt, but columns that look like one: {', '.join(looks)}"
        raise bad_row(where, f"{what}; name it, such as --columns prompt={looks[0]}", "prompt in another column")
    answers = answers._replace(texts=tuple(_with_system(values, text) for text in answers.texts))
    return _beside(values, None, answers, "system")


def _asked(values: Values, where: str) -> Columns | None:
    """Read Orca and alpaca: `system`, `question` or `instruction` and `input`, earlier turns in `history`.

    LLaMA-Factory's older files have both answers in a list `output`, the better one first.
    """
    answers = read_answers(values, where)
    output = values.get("output")
    if answers is None and isinstance(output, list) and len(output) == 2:
        answers = Answers((output[0], output[1]), None, frozenset({"output"}))
    if answers is None:
        return None
    for name in ASKED:
        messages = conversation(values.get(name))
        if isinstance(messages, list):
            return _beside(values, _with_system(values, messages), answers, name, "system")
    question = values.get("question") or values.get("instruction") or values.get("query")
    more = values.get("input")
    text = "\n\n".join(str(part) for part in (question, more) if part)
    prompt = _turn("system", values.get("system")) + _earlier(values.get("history"), where) + _turn("user", text)
    return _beside(values, prompt, answers, "system", *ASKED, "history")


def _earlier(history: Any, where: str) -> list[Values]:
    """Read alpaca's `history`, pairs of a question and its answer."""
    turns: list[Values] = []
    for item in history or ():
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise bad_row(where, '"history" must be a list of pairs [question, answer]', "wrong type")
        turns += _turn("user", item[0]) + _turn("assistant", item[1])
    return turns


def _conversation_of(*names: str) -> Callable[[Values, str], Columns | None]:
    def read(values: Values, where: str) -> Columns | None:
        if (answers := read_answers(values, where)) is None:
            return None
        name = next(name for name in names if name in values)
        prompt = conversation(values[name])
        prompt = _turn("user", prompt) if isinstance(prompt, str) else prompt
        return _beside(values, _with_system(values, prompt), answers, name, "system")

    return read


def _beside(values: Values, prompt: Any, answers: Answers, *used: str) -> Columns:
    """Make the columns of a prompt and its answers, with the tools that stand beside either's messages."""
    sources = [values[name] for name in (*used, *answers.used) if name in values]
    tools = next(filter(None, map(tools_beside, sources)), None)
    return Columns(prompt, answers, _named(values, *used) | answers.used, tools)


def _swift(values: Values, where: str) -> Columns:
    """Read ms-swift: `messages` that end with the chosen answer, and `rejected_response` or `rejected_messages`."""
    messages = conversation(values["messages"])
    if not isinstance(messages, list) or not messages:
        raise bad_row(where, '"messages" must be a list of at least one message', "empty messages")
    messages = _with_system(values, messages)
    used = _named(values, "system", "messages", "rejected_response", "rejected_messages")
    if values.get("rejected_messages"):
        rejected = _with_system(values, conversation(values["rejected_messages"]))
        return Columns(None, Answers((messages, rejected), None, used), used)
    answers = Answers((messages[-1:], values["rejected_response"]), None, used)
    return Columns(messages[:-1], answers, used)


def _openai(values: Values, _where: str) -> Columns:
    """Read OpenAI's preference fine-tuning: `input.messages`, `preferred_output`, `non_preferred_output`."""
    used = frozenset({"input", "preferred_output", "non_preferred_output"})
    prompt = conversation(values["input"])
    prompt = _turn("user", prompt) if isinstance(prompt, str) else prompt
    texts = tuple(conversation(values[name]) for name in ("preferred_output", "non_preferred_output"))
    return Columns(prompt, Answers(texts, None, used), used, tools_beside(values["input"]))


FORMATS = (
    Format("TRL, explicit prompt", ("prompt",), (), _explicit),
    Format("OpenAI", ("input", "preferred_output", "non_preferred_output"), (), _openai),
    Format("ms-swift", ("messages",), ("rejected_response", "rejected_messages"), _swift),
    Format("LLaMA-Factory sharegpt", (), ("conversations", "messages"), _conversation_of("conversations", "messages")),
    Format("Orca, alpaca", (), ASKED, _asked),
    Format("NeMo", ("context", "completions"), (), _conversation_of("context")),
    Format("TRL, implicit prompt", (), (), _implicit),
)
"""In the order in which they are looked for."""


def renaming(pairs: tuple[str, ...]) -> dict[str, str]:
    """Read `--columns prompt=question chosen=better` as columns by the names they are to have.

    Raises:
        UserError: an item is not of the form `name=column`, or two give one name.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise UserError(f"columns takes pairs of a name and a column, such as prompt=question, got {pair!r}.")
        if name in columns:
            raise UserError(f"columns names {name} twice; give each name one column.")
        columns[name] = column
    return columns


def renamed(values: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Values:
    """Give columns the names of `renaming`; a column that had such a name before is left out.

    Raises:
        DataError: the row has no such column.
    """
    if missing := [column for column in columns.values() if column not in values]:
        keys = ", ".join(repr(name) for name in values)
        raise bad_row(where, f"--columns names {missing}, but the row has {keys}", "missing key")
    moved = set(columns.values()) | columns.keys()
    kept = {name: value for name, value in values.items() if name not in moved}
    return kept | {name: values[column] for name, column in columns.items()}
