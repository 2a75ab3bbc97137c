"""Messages of a conversation, brought to one form: `{"role": text, "content": text, ...}` without nulls.

Files spell the same message in several ways: other keys, other names of roles, content in parts, nulls that a columnar
file has filled in, a whole conversation as JSON in a text column. Templates take some of these, and drop others without
a word, so all are translated or refused here.
"""

import ast
import re
from typing import Any

from fused_dpo_engine.data.json_text import read_json
from fused_dpo_engine.errors import bad_row, short

Message = dict[str, Any]

WRITTEN = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|from|messages|content)["']\s*:""")
"""The beginning of messages that are written out as text."""
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
}
"""Names of roles, in small letters, and what they are called here. Any other name is left as it is."""


def conversation(value: Any) -> Any:
    """Take a conversation out of JSON text, or out of an object of `messages`; anything else is returned as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        found = conversation(parsed(value))
        return found if _looks_like_messages(found) else value
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return value["messages"]
    return value


def tools_beside(value: Any) -> Any:
    """Find the schemas that stand beside `messages` in an object, or in one that is JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        value = parsed(value)
    return value.get("tools") if isinstance(value, dict) and isinstance(value.get("messages"), list) else None


def parsed(text: str) -> Any:
    """Read JSON, or what Python prints of such values, which is what exports of tables often hold; None if neither."""
    try:
        return read_json(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip()) if WRITTEN.match(text) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _looks_like_messages(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items)


def clean_messages(value: Any, key: str, where: str, kind: str = "a list of messages") -> list[Message]:
    """Bring the messages of a column to the one form.

    Args:
        value: of the column `key`, in any of the known forms.
        key: for messages of errors.
        where: the row, for messages of errors.
        kind: what the column may be, for messages of errors.

    Raises:
        DataError: the value is no list of messages, or one of them has no role, or content that is no text.
    """
    if not isinstance(value, list):
        raise bad_row(where, f'"{key}" must be {kind}, got {short(value)}', "wrong type")
    if not value:
        raise bad_row(where, f'"{key}" must hold at least one message, got an empty list', "empty messages")
    return [_clean(message, key, where) for message in value]


def _clean(message: Any, key: str, where: str) -> Message:
    role_key, content_key = ("role", "content")
    if isinstance(message, dict) and "role" not in message and "from" in message:
        role_key, content_key = ("from", "value")
    if not isinstance(message, dict) or not isinstance(message.get(role_key), str):
        rule = 'must be a list of messages {"role": text, "content": text}'
        raise bad_row(where, f'"{key}" {rule}, got the item {short(message)}', "wrong type")
    if not message[role_key].strip():
        raise bad_row(where, f'"{key}" has a message whose role is empty: {short(message)}', "no role")
    rest = without_nulls({name: field for name, field in message.items() if name not in (role_key, content_key)})
    role = ROLES.get(message[role_key].lower(), message[role_key])
    content = message.get(content_key)
    if content is None and rest.get("tool_calls"):
        content = ""  # OpenAI's format has null there
    text = _content(content, f"content of the {role} message in {key}", where)
    return {**rest, "role": role, "content": text}  # a message with a `value` may have another `content` beside it


def _content(value: Any, what: str, where: str) -> str:
    if not isinstance(value, list):
        return checked_text(value, what, where)
    parts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise bad_row(where, f"{what} has a part of type {kind!r}; text alone can be trained on", "not text")
        parts.append(checked_text(part.get("text") if isinstance(part, dict) else part, f"a part of the {what}", where))
    return "".join(parts)


def checked_text(value: Any, key: str, where: str, kind: str = "text") -> str:
    """Return a text as it is.

    Raises:
        DataError: it is no text, or no valid Unicode.
    """
    if not isinstance(value, str):
        raise bad_row(where, f'"{key}" must be {kind}, got {short(value)}', "wrong type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f'"{key}" must be valid Unicode, got a lone surrogate at character {error.start}'
        raise bad_row(where, what, "invalid Unicode") from error
    return value


def without_nulls(value: Any) -> Any:
    """Drop keys whose value is None, at every depth: columnar files fill in the keys that other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def parsed_tools(value: Any, where: str) -> list[Any]:
    """Read a row's `tools`: a list of schemas, that list as JSON text, or nothing.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = read_json(value)
        except ValueError as error:
            raise bad_row(where, f'"tools" is text that is no JSON: {error}', "wrong type") from error
    if not value:
        return []
    if not isinstance(value, list):
        raise bad_row(where, f'"tools" must be a list of schemas, got {short(value)}', "wrong type")
    return without_nulls(value)


def require_assistant(messages: list[Message], key: str, where: str) -> None:
    """Refuse a response that does not begin with the assistant: its role's name would be scored, or be lost.

    Raises:
        DataError: naming the role.
    """
    role = messages[0]["role"]
    if role != "assistant":
        known = ", ".join(name for name, meaning in ROLES.items() if meaning == "assistant" != name)
        what = f'the response in "{key}" must begin with a message of the role assistant ({known} are understood)'
        raise bad_row(where, f"{what}, got the role {role!r}", "response of another role")


def common_length(a: str, b: str) -> int:
    """Measure the longest common beginning of two texts, in characters."""
    known, limit = 0, min(len(a), len(b))
    while known < limit:
        middle = (known + limit + 1) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            limit = middle - 1
    return known
