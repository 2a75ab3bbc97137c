"""Conversations as a chat template writes them, checked: what a row holds has to be there.

A template may leave out a role that it does not know, the reasoning before an answer, tools, or a whole message, and
says nothing. What is trained on would then be something else than the row.
"""

import inspect
import json
from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from fused_dpo_engine.config.options import Score
from fused_dpo_engine.data.formats import Preference
from fused_dpo_engine.data.messages import Message, checked_text, common_length
from fused_dpo_engine.data.template_limits import TemplateRunsOnError, limited_template
from fused_dpo_engine.data.turns import Span, assistant_spans
from fused_dpo_engine.errors import DataError, bad_row, short

MOST_RENDERED = 250_000
"""Messages rendered for a row, at most. To tell the turns of an answer apart, each takes the conversation so far."""
_TURNS_WAY_OUT = "mark them with {% generation %} in the template, or give --score all"


class Rendered(NamedTuple):
    """A preference as the texts to tokenize."""

    answers: tuple[str, ...]
    """The prompt and an answer each."""
    prompt: str
    spans: tuple[list[Span] | None, ...]
    """Which characters of each of `answers` are scored; None: all that follow the prompt."""
    plain: bool
    """False: a rendered conversation, which holds its special tokens already."""
    where: str
    scores: tuple[float, ...] | None
    """Of the answers, best first; None where the row has none."""
    reference: tuple[float, float] | None = None
    """Log-probs of the reference that the row brings along, of chosen and rejected."""
    brings_reference: bool = False
    """Whether it has a column for them, usable or not."""


@dataclass(frozen=True)
class Renderer:
    """Writes preferences as the texts that are tokenized."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    """A Jinja template to use instead of the tokenizer's own."""
    score: Score = "assistant"
    """What of an answer of several messages is scored."""
    _known: set[Hashable] = field(default_factory=set)
    """Shapes of conversations that the template has written within its limits."""

    def render(self, preference: Preference) -> Rendered:
        """Write the texts of a preference.

        Raises:
            DataError: the template refuses a conversation, or leaves out a part of it.
        """
        rendered = self._texts(preference)
        brought = preference.brought
        return rendered if brought is None else rendered._replace(reference=brought.logps, brings_reference=True)

    def _texts(self, preference: Preference) -> Rendered:
        prompt, answers, where = preference.prompt, preference.answers, preference.where
        if isinstance(prompt, str):
            texts = tuple(prompt + cast(str, answer) for answer in answers)
            return Rendered(texts, prompt, (None,) * len(texts), True, where, preference.scores)
        return self._conversations(prompt, cast("tuple[list[Message], ...]", answers), preference)

    def _conversations(
        self, prompt: list[Message], answers: tuple[list[Message], ...], preference: Preference
    ) -> Rendered:
        where, tools = preference.where, preference.tools
        # Of several named templates, this is where the one for tools is chosen, as it is when the model serves.
        template = self.tokenizer.get_chat_template(self.chat_template, tools=tools or None)
        arguments = {**preference.template_arguments, **({"tools": tools} if tools else {})}
        _check_arguments(preference.template_arguments, self.tokenizer, where)

        rendered = 0

        def write(messages: list[Message], generation_prompt: bool = False) -> str:
            nonlocal rendered
            rendered += len(messages)
            if rendered > MOST_RENDERED:
                what = "the answers have too many turns for them to be told apart by rendering each"
                raise bad_row(where, f"{what}; {_TURNS_WAY_OUT}", "too many turns")
            shape = (_shape(messages), len(tools), generation_prompt)
            try:
                with nullcontext() if shape in self._known else limited_template():
                    text = self.tokenizer.apply_chat_template(
                        messages,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=generation_prompt,
                        **arguments,
                    )
            except Exception as error:  # templates raise whatever they like on conversations that they don't know
                roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
                what = f"the chat template refuses a conversation with the roles {roles}: {_said(error)}"
                raise bad_row(where, what, "refused by the chat template") from error
            self._known.add(shape)
            return checked_text(text, "what the chat template writes", where)

        asked = write(prompt, generation_prompt=True)
        _check_prompt(prompt, asked, "leaves out", where)
        _check_tools(tools, asked, where)
        texts: list[str] = []
        spans: list[list[Span] | None] = []
        for number, answer in enumerate(answers):
            text = write(prompt + answer)
            _check_answer(answer, ("chosen" if number == 0 else "rejected"), text, asked, where)
            texts.append(text)
            if len(answer) == 1 or self.score == "all":
                spans.append(None)
                continue
            found = assistant_spans(prompt + answer, len(prompt), text, write, self.tokenizer, template, arguments)
            if not found:
                what = "the turns of the assistant cannot be told apart in what this chat template writes"
                raise bad_row(where, f"{what}; {_TURNS_WAY_OUT}", "turns not found")
            spans.append(found[-1:] if self.score == "last" else found)
        spans = _without_prompt(prompt, asked, texts, spans, where)
        return Rendered(tuple(texts), asked, tuple(spans), False, where, preference.scores)


def check_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Refuse a tokenizer without a usable chat template, before any row is rendered.

    Args:
        tokenizer: of the model.
        chat_template: Jinja text to use instead of its own; None for its own.

    Raises:
        DataError: there is no template, several of which none is the default, or it is not valid Jinja.
    """
    named = tokenizer.chat_template if chat_template is None else None
    if isinstance(named, dict) and "default" not in named:
        names = ", ".join(sorted(named))
        raise DataError(f"the tokenizer has several chat templates and no default; choose one: --chat-template {names}")
    try:
        template = tokenizer.get_chat_template(chat_template)
    except ValueError as error:
        raise DataError(
            f"the rows hold conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template for them; "
            "pass chat_template (command line: --chat-template FILE), use the tokenizer of a chat model, or give the "
            "rows as plain text"
        ) from error
    try:
        with limited_template():
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
    except (SyntaxError, RecursionError, TemplateRunsOnError) as error:  # the first is Python's, which Jinja writes
        raise DataError(f"the chat template cannot be used: {error}") from error
    except Exception:
        pass  # it may well refuse this conversation


def _without_prompt(
    prompt: list[Message], asked: str, texts: list[str], spans: list[list[Span] | None], where: str
) -> list[list[Span] | None]:
    """Keep the prompt out of what is scored of answers without spans: all that follows what the texts have in common.

    That is the whole prompt, unless a template writes it in another way in front of one of the answers: Mistral's puts
    what the system says into the last question, which may be one of an answer of several turns.
    """
    shared = [common_length(asked, text) for text in texts]
    for number, text in enumerate(texts):
        if spans[number] is None:
            _check_prompt(prompt, text[: shared[number]], "writes in another way, once it is answered,", where)
            if shared[number] > min(shared):
                spans[number] = [(shared[number], len(text))]
    return spans


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _shape(messages: list[Message]) -> Hashable:
    """Tell conversations apart that a template may treat in different ways: by roles, keys and about how long."""
    size = sum(len(message["content"]) for message in messages)
    return tuple((message["role"], *message) for message in messages), size.bit_length()


def _check_arguments(arguments: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse arguments that are not the template's, but change what becomes of what it writes."""
    if taken := sorted(arguments.keys() & _own_arguments(type(tokenizer))):
        what = f"chat_template_kwargs must hold arguments of the template, got {', '.join(taken)}"
        raise bad_row(where, what, "not an argument of the template")


@cache
def _own_arguments(tokenizer: type[PreTrainedTokenizerBase]) -> frozenset[str]:
    return frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents", "kwargs"}


def _check_prompt(prompt: list[Message], text: str, fault: str, where: str) -> None:
    """Refuse a rendering of the prompt, or its beginning that is not scored, if a message is missing there."""
    squeezed, at = None, 0
    for message in prompt:
        content = message["content"]
        if message["role"] == "assistant":
            content = content.rsplit("</think>", 1)[-1]  # templates drop the reasoning of earlier turns on purpose
        if (found := text.find(content.strip(), at)) >= 0:  # mostly in order: a long prompt is read through once
            at = found
        elif not any(form in text for form in _forms(content)):
            squeezed = _squeezed(text) if squeezed is None else squeezed
            if _squeezed(content) not in squeezed:
                what = f"the chat template {fault} the prompt's {message['role']!r} message"
                way_out = "it may expect other names for the roles, such as user and assistant"
                raise bad_row(where, f"{what}; {way_out}", "left out by the chat template")


def _check_tools(tools: list[Any], text: str, where: str) -> None:
    """Refuse a rendering of the prompt that leaves out the tools."""
    for tool in tools:
        name = _function(tool).get("name")
        if name and str(name) not in text:
            what = f"the chat template leaves out the row's tools (no {name!r} in the prompt)"
            way_out = "use one that shows them, or remove the column"
            raise bad_row(where, f"{what}; {way_out}", "left out by the chat template")


def _check_answer(answer: list[Message], key: str, text: str, asked: str, where: str) -> None:
    """Refuse a rendering that leaves out what is to be scored: it would be another answer."""
    for message in answer:
        for part in _parts(message):
            # The prompt may hold the same words: they have to be there once more.
            if any(text.count(form) > asked.count(form) for form in _forms(part)):
                continue
            squeezed = _squeezed(part)
            if squeezed and _squeezed(text).count(squeezed) <= _squeezed(asked).count(squeezed):
                what = f"the chat template leaves out a part of the response in {key!r}: {short(part)}"
                way_out = "it may strip reasoning, or expect other names for the roles"
                raise bad_row(where, f"{what}; {way_out}", "left out by the chat template")


def _parts(message: Message) -> Iterator[str]:
    """List the texts of a message: content, reasoning, names and arguments of the functions that it calls."""
    yield message["content"]
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(name), str):
            yield message[name]
    for call in message.get("tool_calls") or ():
        yield from _leaves(_function(call).get("name"))
        arguments = _function(call).get("arguments")
        try:
            yield from _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments)
        except ValueError:
            yield str(arguments)


def _function(value: Any) -> dict[str, Any]:
    """Take the function out of a tool or of a call of one, which may stand there bare."""
    function = value.get("function", value) if isinstance(value, dict) else {}
    return function if isinstance(function, dict) else {}


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _forms(content: str) -> Iterator[str]:
    """List how a template may write a text: as it is, or escaped as in JSON."""
    content = content.strip()
    yield content
    for ascii_only in (False, True):
        escaped = json.dumps(content, ensure_ascii=ascii_only)[1:-1]
        if escaped != content:
            yield escaped


def _squeezed(text: str) -> str:
    """Drop white space, which templates change at the ends of messages and around reasoning."""
    return "".join(text.split())
