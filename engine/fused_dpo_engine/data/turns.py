"""Where the assistant speaks in a rendered conversation: the characters of each of its turns."""

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fused_dpo_engine.data.messages import Message, common_length

Span = tuple[int, int]
"""First character and the one after the last."""
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_STAND_IN = "\u2042stand-in\u2042"


def assistant_spans(
    conversation: list[Message],
    first: int,
    text: str,
    write: Callable[..., str],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    arguments: dict[str, Any],
) -> list[Span]:
    """Find the turns of the assistant from message `first` on, each with what ends it.

    The template's own generation marks tell, where it has them. Elsewhere the conversation is rendered as far as each
    turn: what a turn adds is the turn. Templates that write a turn in another way once others follow (Qwen3's, which
    opens the last one with an empty block of reasoning; Mistral's, which puts tools before the last question) are read
    with a stand-in in the place of the turn's text.

    Args:
        conversation: the whole of it.
        first: number of messages that are the prompt's.
        text: the whole, rendered.
        write: renders messages, with or without a generation prompt.
        tokenizer: of the model.
        template: Jinja.
        arguments: of the template.

    Returns:
        Spans in `text`, ascending; empty if they cannot be told apart.
    """
    numbers = [i for i in range(first, len(conversation)) if conversation[i]["role"] == "assistant"]
    if _MARKED.search(template):
        marked = _marked(conversation, text, tokenizer, template, arguments)
        if len(marked) == sum(message["role"] == "assistant" for message in conversation):
            return marked[len(marked) - len(numbers) :]
    spans: list[Span] = []
    for number in numbers:
        start = _start(conversation, number, text, write)
        end = None if start is None else _end(conversation, number, text, start, write)
        if start is None or end is None or (spans and start < spans[-1][1]) or start >= end:
            return []
        spans.append((start, end))
    return spans


def _marked(
    conversation: list[Message],
    written: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    arguments: dict[str, Any],
) -> list[Span]:
    """Render once more, with the template's marks; none if it is not written as before."""
    (text,), marks = render_jinja_template(
        [conversation],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **arguments},
    )
    return [(int(start), int(end)) for start, end in marks[0]] if text == written else []


def _start(conversation: list[Message], number: int, text: str, write: Callable[..., str]) -> int | None:
    before = write(conversation[:number]) if number else ""
    if text.startswith(before):
        # Of the generation prompt as much as the turn begins with: some open reasoning that this turn has none of.
        return common_length(write(conversation[:number], generation_prompt=True), text)
    at = write(_with_stand_in(conversation, number)).find(_STAND_IN)
    content = conversation[number]["content"].strip()
    return at if at >= 0 and content and text[at:].startswith(content) else None


def _end(conversation: list[Message], number: int, text: str, start: int, write: Callable[..., str]) -> int | None:
    if number == len(conversation) - 1:
        return len(text)
    through = write(conversation[: number + 1])
    if text.startswith(through):
        return len(through)
    content = conversation[number]["content"].strip()
    after = text.find(content, start) + len(content)
    alone = write(_with_stand_in(conversation, number)[: number + 1])
    ending = alone[alone.rfind(_STAND_IN) + len(_STAND_IN) :]
    ending = ending if content else ending.lstrip()
    at = text.find(ending, after)
    # Calls of tools belong to the ending. It has to follow at once: else this template ends such a turn in another way.
    follows = after >= len(content) and at >= after and not text[after:at].strip()
    return at + len(ending) if follows else None


def _with_stand_in(conversation: list[Message], number: int) -> list[Message]:
    return [*conversation[:number], {**conversation[number], "content": _STAND_IN}, *conversation[number + 1 :]]
