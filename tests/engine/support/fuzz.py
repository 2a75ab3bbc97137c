"""Rows of every format with random damage, and an oracle of which bytes of a pair are scored.

The oracle knows nothing of how the engine finds spans. It writes a conversation once more, in plain Jinja, with marks
around the turns of the assistant, and compares bytes: those of the tokens that a pair scores with those that it should.
"""

import copy
import json
import random
import signal
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import jinja2.sandbox

from fused_dpo_engine.data.formats import Preference, parse_row
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import UserError
from tests.engine.support.formats import COLOUR, EXAMPLES, TOOL
from tests.engine.support.templates import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3
from tests.engine.support.tokenization import make_rows
from tests.engine.support.toys import assistant, user

SECONDS = 5.0
"""Of CPU time that a row may take; all here have a few thousand characters."""
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"at": "Bern"}}}],
}
BASES: list[dict[str, Any]] = [
    *(example.row for example in EXAMPLES.values()),
    {"prompt": [COLOUR], "chosen": [assistant("Red?"), user("No."), assistant("Blue")], "rejected": "Green"},
    {
        "prompt": [{"role": "system", "content": "Be brief."}, COLOUR],
        "chosen": [assistant("Red?"), user("No."), assistant("Blue")],
        "rejected": [assistant("Grey"), user("Sure?"), assistant("Yes"), user("Why?"), assistant("So.")],
    },
    {
        "prompt": [user("Warm?")],
        "chosen": [CALL, {"role": "tool", "content": "20"}, assistant("Yes, 20.")],
        "rejected": [assistant("No idea.")],
        "tools": [TOOL],
    },
    {"prompt": [COLOUR], "chosen": "<think>\nOf what?\n</think>\n\nBlue", "rejected": "Red"},
    {"instruction": "A colour?", "completions": [{"response": "Red", "overall_score": 2.5},
                                                 {"response": "Blue", "overall_score": 7.5}]},
    {"prompt": "A colour? ", "response_1": "Blue", "response_2": "Red", "preference_strength": -2},
    {"prompt": "A colour? ", "completions": ["Blue", "Red", "Grey"], "ratings": [5, 1, 3]},
    {"chosen": json.dumps([COLOUR, assistant("Blue")]), "rejected": json.dumps([COLOUR, assistant("Red")])},
]  # fmt: skip
"""A row of each format, and of each kind of conversation."""
TEXTS = (
    *("", " ", "\n", "\0", "\x1b[0m", "x" * 2000, "\u200b", "\u202eabc", "e\u0301", "\u00e9", "\U0001f600", "你好吗"),
    *("<|im_end|>", "</s>", "<s>", "<|im_start|>assistant\n", "[/INST]", "<end_of_turn>\n", "<|eot_id|>"),
    *("<think>", "</think>", "{{ 7 * 7 }}", "{% raw %}", '[{"role":', "[" * 3000, '{"messages": []}'),
    *("null", "1e999", "Blue", "A colour?", " 4", "\ud800"),
)
OTHERS = (None, 0, -1, 1.5, True, [], {}, [[]], [None], float("nan"), float("inf"), 10**400, b"x", ("a", "b"), {"": ""})
KEYS = ("", "role", "content", "from", "value", "prompt", "chosen", "rejected", "tools", "messages", "score", "Chosen")
KEYS += ("chosen_score", "rejected_score", "images", "system", "chat_template_kwargs", "\ud800", "completions", "rank")
ROLES = ("user", "assistant", "system", "tool", "gpt", "", "critic", "Assistant", " ", "model")


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def damaged(seed: int) -> dict[str, Any]:
    """A row of `BASES` with up to four random changes."""
    draw = random.Random(seed)
    row: dict[str, Any] = copy.deepcopy(draw.choice(BASES))
    for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        places = list(_places(row))
        if not places:
            break
        holder, key = draw.choice(places)
        with suppress(RecursionError):  # of writing what is nested as JSON
            _change(draw, holder, key)
    return row


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of every object and list within a value, however deep."""
    holders = [value]
    while holders:
        holder = holders.pop()
        inside = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, item in inside:
            yield holder, key
            holders.append(item)


def _change(draw: random.Random, holder: Any, key: Any) -> None:
    old = holder[key]
    kind = draw.randrange(16)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(KEYS)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder[draw.choice(KEYS)] = copy.deepcopy(draw.choice((*TEXTS, *OTHERS)))
    elif kind == 3:
        holder[key] = copy.deepcopy(draw.choice(OTHERS))  # the next change may be within it
    elif kind == 4:
        holder[key] = draw.choice((json.dumps(old, default=str), [old], {"content": old}, [old, old], str(old)))
    elif kind == 5 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(draw.choice(holder)))
    elif kind == 6 and key in ("role", "from"):
        holder[key] = draw.choice(ROLES)
    elif kind == 7:
        holder[key] = nested(draw.choice((3, 100, 600)))
    elif isinstance(old, str):
        at = draw.randint(0, len(old))
        holder[key] = old[:at] + draw.choice(TEXTS) + old[at:]
    elif isinstance(old, list):
        draw.shuffle(old)
    else:
        holder[key] = draw.choice(TEXTS)


class HangError(BaseException):
    """A row took too long; no `except Exception` of what is tested keeps it."""


@contextmanager
def watched(seconds: float = SECONDS) -> Iterator[None]:
    """Raise HangError in the block after so much CPU time; the timer of CPU time leaves that of pytest alone."""

    def stop(*_: Any) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


MERGED = 16
"""Bytes that a token which merges across the beginning or end of an answer may have beyond it."""
OPEN, CLOSE = "\ue000", "\ue001"
_EDITS: dict[str, tuple[tuple[str, str], ...]] = {
    CHATML: (
        ("{{ m.role }}\n{{ m.content }}", "{{ m.role }}\n{{ o(m) }}{{ m.content }}"),
        ("<|im_end|>\n{% endfor %}", "<|im_end|>\n{{ c(m) }}{% endfor %}"),
    ),
    LLAMA3: (("{% if m.tool_calls %}", "{{ o(m) }}{% if m.tool_calls %}"), ("<|eot_id|>", "<|eot_id|>{{ c(m) }}")),
    MISTRAL: (
        ("[TOOL_CALLS]", "{{ o(m) }}[TOOL_CALLS]"),
        ("{{ m.tool_calls | tojson }}</s>", "{{ m.tool_calls | tojson }}</s>{{ c(m) }}"),
        (" {{ m.content }}</s>", "{{ o(m) }} {{ m.content }}</s>{{ c(m) }}"),
    ),
    GEMMA: (
        ("{{ m.content | trim }}", "{{ o(m) }}{{ m.content | trim }}"),
        ("<end_of_turn>\n", "<end_of_turn>\n{{ c(m) }}"),
    ),
    QWEN3: (
        ("<|im_start|>assistant\n{% if loop", "<|im_start|>assistant\n{{ o(m) }}{% if loop"),
        ("{% endfor %}<|im_end|>\n{% else", "{% endfor %}<|im_end|>\n{{ c(m) }}{% else"),
    ),
}
"""Where the turns of the assistant begin and end in each template, written by hand."""


@cache
def _compiled(template: str) -> Any:
    for old, new in _EDITS[template]:
        assert template.count(old) == 1, old
        template = template.replace(old, new)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals.update(
        o=lambda message: OPEN if message["role"] == "assistant" else "",
        c=lambda message: CLOSE if message["role"] == "assistant" else "",
    )
    return environment.from_string(template)


class Expected(NamedTuple):
    """An answer as it should be trained."""

    whole: bytes
    scored: list[tuple[int, int, int]]
    """Of each part: the first byte that may be scored, the first one that has to be, and the one after the last."""


def expected(preference: Preference, tokenizer: Any, template: str, score: str) -> list[Expected]:
    """Write all answers of a row, and what of each is to be scored."""
    return [_expected(preference, answer, tokenizer, template, score) for answer in preference.answers]


def _expected(preference: Preference, answer: Any, tokenizer: Any, template: str, score: str) -> Expected:
    if isinstance(preference.prompt, str):
        eos = tokenizer.eos_token or ""
        head, tail = as_bytes(preference.prompt, tokenizer), as_bytes(preference.prompt + answer, tokenizer)
        ending = b"" if tail.endswith(eos.encode()) else eos.encode()
        return Expected(tail + ending, [(len(head), len(head), len(tail + ending))])
    arguments = {**preference.template_arguments, **({"tools": preference.tools} if preference.tools else {})}
    messages = [*preference.prompt, *answer]
    marked = _compiled(template).render(messages=messages, **{**tokenizer.special_tokens_map, **arguments})
    said_by = [message for message in messages if message["role"] == "assistant"]
    parts, spans, end = [], [], 0
    for number, part in enumerate(as_bytes(marked, tokenizer).split(OPEN.encode())):
        said, *rest = part.split(CLOSE.encode())
        if number:
            # What a template writes before the text of a turn may be left out where that depends on what follows.
            content = as_bytes(said_by[number - 1]["content"].strip(), tokenizer)
            spans.append((end, end + (max(0, said.find(content)) if len(answer) > 1 else 0), end + len(said)))
        parts += [said, *rest]
        end = sum(map(len, parts))
    spans = spans[-sum(message["role"] == "assistant" for message in answer) :]
    if score == "all":
        spans = [(spans[0][0], spans[0][1], end)]
    return Expected(b"".join(parts), spans[-1:] if score == "last" else spans)


@cache
def _bytes_alone(tokenizer: Any) -> bool:
    """Tell whether no token is more than a byte."""
    return all(len(token) == 1 for token in tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys())


def as_bytes(text: str, tokenizer: Any) -> bytes:
    """Encode a text, in the normal form that the tokenizer brings it to, if it does."""
    normal = tokenizer.backend_tokenizer.normalizer is not None
    return (unicodedata.normalize("NFC", text) if normal else text).encode("utf-8")


@cache
def _letters() -> dict[str, int]:
    """The bytes that the letters of byte-level tokens stand for, by GPT-2's table."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(rest)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token of a byte-level tokenizer."""
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return added.content.encode("utf-8")
    return bytes(_letters()[letter] for letter in tokenizer.convert_ids_to_tokens(token))


def wrong_span(ids: Any, positions: Any, answer: Expected, tokenizer: Any, slack: int, cut: bool) -> str:
    """Say what is wrong with what a sequence scores; empty if nothing is.

    Args:
        ids: tokens of the sequence.
        positions: which of them are scored.
        answer: what it should be.
        tokenizer: byte-level.
        slack: bytes that a merged token may have before the beginning of a part, or lack at its end.
        cut: whether the sequence may end early.
    """
    pieces = [token_bytes(tokenizer, int(token)) for token in ids]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    whole, scored = b"".join(pieces), set(map(int, positions))
    if not (answer.whole.startswith(whole) if cut else answer.whole == whole):
        return f"the sequence is {whole!r}, not {answer.whole!r}"
    for number in range(len(ids)):
        start, end = ends[number], ends[number + 1]
        inside = any(first < end and start < last for first, _, last in answer.scored)
        near = any(first - slack < end and start < last for first, _, last in answer.scored)
        within = any(first <= start and end <= last - slack for _, first, last in answer.scored)
        if number in scored and not (inside or near):
            return f"token {number}, {pieces[number]!r}, is scored, but no part of the answer"
        if number not in scored and within:
            return f"token {number}, {pieces[number]!r}, of the answer is not scored"
    return ""


class Outcome(NamedTuple):
    """Tells what became of a row: pairs or a refusal, and whether the oracle objects."""

    kind: str
    """The reason why it was refused, or "pairs"."""
    fault: str
    """What is wrong; empty if nothing is."""


def judge(
    values: dict[str, Any],
    tokenizer: Any,
    template: str,
    *,
    score: Any = "assistant",
    max_length: int = 100_000,
    tokenize: Any = tokenize_pairs,
) -> Outcome:
    """Tokenize one row, and say what is wrong with what becomes of it.

    Args:
        values: the row.
        tokenizer: byte-level.
        template: one of those whose turns are known here.
        score: as the option.
        max_length: as the option.
        tokenize: what is judged.
    """
    (row,) = make_rows(values)
    try:
        with watched():
            pairs: Sequence[TokenPair] = tokenize(
                [row], tokenizer, max_length=max_length, chat_template=template, score=score
            ).pairs
            preference = parse_row(row)
    except UserError as error:
        message = str(error)
        named = row.where in message
        return Outcome(getattr(error, "reason", "?"), "" if named else f"no row is named: {message}")
    except HangError as error:
        return Outcome("hang", f"hangs: {error}")
    except Exception as error:
        return Outcome("foreign", f"{type(error).__name__}: {error}")
    answers = expected(preference, tokenizer, template, score)
    merges = 0 if _bytes_alone(tokenizer) else MERGED
    for pair in pairs:
        for side, (ids, positions) in enumerate(pair.sides):
            candidates = answers[:1] if side == 0 else answers[1:]
            faults = [wrong_span(ids, positions, one, tokenizer, merges, max_length < 100_000) for one in candidates]
            if all(faults):
                return Outcome("pairs", f"{'chosen' if side == 0 else 'rejected'}: {faults[0]}")
    return Outcome("pairs", "")
