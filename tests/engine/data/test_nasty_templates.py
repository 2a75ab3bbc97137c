"""Chat templates that fail, run on, break out or write something else than the row: each is refused with a message."""

import sys

import numpy as np
import pytest

from fused_dpo_engine.data import template_limits, turns
from fused_dpo_engine.data.template_limits import TemplateRunsOnError, limited_template
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import DataError
from tests.engine.support.fuzz import watched
from tests.engine.support.templates import TEMPLATES
from tests.engine.support.tokenization import bpe_tokenizer, decode, make_rows
from tests.engine.support.toys import assistant, user

WRITTEN = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
ONE = {"prompt": [user("What is it?")], "chosen": "yes", "rejected": "no"}
SEVERAL = {
    "prompt": [user("What is it?")],
    "chosen": [assistant("yes"), user("Sure?"), assistant("of course")],
    "rejected": [assistant("no"), user("Sure?"), assistant("not quite")],
}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
END = "{% endfor %}{% endfor %}"
FAILING = {
    "it refuses": ("{{ raise_exception('not this') }}", "refuses a conversation with the roles user: not this"),
    "an error of Python": ("{{ 1 / 0 }}", "refuses .*: ZeroDivisionError: division by zero"),
    "a large range": ("{% for i in range(10**12) %}{% endfor %}" + WRITTEN, "OverflowError: Range too big"),
    "it calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    "loops in loops": (LOOP + END + WRITTEN, "runs on after 2000000 steps"),
    "loops that write": (LOOP + "{{ 'x' * 1000 }}" + END, "writes on after 268435456 characters"),
    "more than the memory": ("{{ 'a' * (10**14) }}", "MemoryError"),
    "Python's insides": ("{{ ''.__class__.__mro__ }}" + WRITTEN, "'__class__' of 'str' object is unsafe"),
    "its classes": ("{{ ().__class__.__base__.__subclasses__() }}", "is unsafe"),
    "another file": ("{% include '/etc/passwd' %}" + WRITTEN, "no loader"),
    "a change of the row": ("{{ messages.append(1) }}" + WRITTEN, "'append' of 'list' object is unsafe"),
    "no end": ("{% for m in messages %}", "not valid Jinja: line 1"),
    "no such filter": ("{{ 1 | no_such }}" + WRITTEN, "not valid Jinja: line 1"),
    "too many blocks": ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "cannot be used: too many statically nested"),
    "parentheses": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be used: maximum recursion depth"),
    "a lone surrogate": ("{{ '\\ud800' }}" + WRITTEN, "what the chat template writes.*lone surrogate"),
    "nothing": ("", "leaves out the prompt's 'user' message"),
    "no answer": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "leaves out a part of the response in 'chosen': 'yes'",
    ),
    "another each time": (
        "{{ strftime_now('%f') }}" + WRITTEN,
        "writes in another way, once it is answered, the prompt's 'user' message",
    ),
    "the last message first": (
        WRITTEN.replace("in messages", "in messages | reverse"),
        "writes in another way, once it is answered, the prompt's 'user' message",
    ),
}


@pytest.fixture(autouse=True)
def _in_time():
    with watched(20):
        yield


def pairs_of(values, template, **settings):
    rows = make_rows(values)
    return tokenize_pairs(rows, bpe_tokenizer(), max_length=100_000, chat_template=template, **settings).pairs


@pytest.mark.parametrize("kind", FAILING)
def test_refused(kind):
    template, message = FAILING[kind]
    with pytest.raises(DataError, match=message):
        pairs_of(ONE, template)


def test_a_row_that_makes_a_template_run_on():
    """The check before all rows does not see it: the row is named, and may be skipped."""
    template = "{% if messages | length > 2 %}" + LOOP + END + "{% endif %}" + WRITTEN
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .*runs on after"):
        pairs_of(SEVERAL, template)
    assert len(pairs_of(ONE, template)) == 1


def test_a_longer_row_of_the_same_roles_is_counted_too():
    template = "{% if messages[-1].content | length > 99 %}" + LOOP + END + "{% endif %}" + WRITTEN
    rows = make_rows(ONE, {**ONE, "chosen": "yes " * 50})
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: .*runs on after"):
        tokenize_pairs(rows, bpe_tokenizer(), max_length=10_000, chat_template=template)


@pytest.mark.parametrize("family", TEMPLATES)
def test_known_templates_stay_far_below_the_limit(family, monkeypatch):
    monkeypatch.setattr(template_limits, "STEPS", 2_000)
    assert len(pairs_of(SEVERAL, TEMPLATES[family])) == 1
    monkeypatch.setattr(template_limits, "STEPS", 2)
    with pytest.raises(DataError, match="runs on after 2 steps"):
        pairs_of(SEVERAL, TEMPLATES[family])


def test_a_trace_function_is_there_again_afterwards():
    def trace(*_):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with limited_template():
            assert sys.gettrace() is not trace
        assert sys.gettrace() is trace
        with pytest.raises(TemplateRunsOnError), limited_template():
            raise TemplateRunsOnError
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "continue_final_message", "chat_template"])
def test_arguments_that_are_not_the_templates(name):
    with pytest.raises(DataError, match=f"chat_template_kwargs must hold arguments of the template, got {name}"):
        pairs_of({**ONE, "chat_template_kwargs": {name: True}}, WRITTEN)


def test_marks_that_are_written_in_another_way_are_not_trusted(monkeypatch):
    """The positions of marks are those of a second rendering."""
    marked = "{% for m in messages %}[{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}]"
    marked += "{% endgeneration %}{% else %}{{ m.content }}]{% endif %}{% endfor %}"

    def scored(text):
        monkeypatch.setattr(turns, "render_jinja_template", lambda *_, **__: ([text], [[(40, 42), (50, 52)]]))
        (pair,) = pairs_of(SEVERAL, marked)
        ids, positions = pair.sides[0]
        return decode(bpe_tokenizer(), ids[positions])

    assert scored("something else") == "[assistant:yes][assistant:of course]"
    whole = "[user:What is it?][assistant:yes][user:Sure?][assistant:of course]"
    assert scored(whole) != scored("something else")  # as it should be where it is written as before


class TestManyTurns:
    def talk(self, turns):
        said = [m for i in range(turns) for m in (assistant(f"answer {i}"), user(f"question {i}"))]
        return {"prompt": [user("What?")], "chosen": said[:-1], "rejected": "no"}

    def test_too_many_to_render_each(self):
        with pytest.raises(DataError, match=r"pairs\.jsonl:1: the answers have too many turns.*give --score all"):
            pairs_of(self.talk(1000), TEMPLATES["ChatML"])
        assert len(pairs_of(self.talk(1000), TEMPLATES["ChatML"], score="all")) == 1

    def test_marks_have_no_such_limit(self):
        marked = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        marked += "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        (pair,) = pairs_of(self.talk(400), marked + "{% endfor %}")
        _, positions = pair.sides[0]
        assert 1 + int((np.diff(positions) > 1).sum()) == 400
