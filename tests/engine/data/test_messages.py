"""Messages as files have them, brought to one form."""

import json
from typing import Any, ClassVar

import pytest

from fused_dpo_engine.data.formats import Row, parse_row
from fused_dpo_engine.data.messages import common_length, conversation, without_nulls
from fused_dpo_engine.errors import DataError
from tests.engine.support.toys import assistant, user

ASKED = {"prompt": [user("A colour?")], "rejected": "Red"}


def chosen(value: Any, **more: Any) -> Any:
    return parse_row(Row({**ASKED, "chosen": value, **more}, "pairs.jsonl:17")).chosen


class TestRoles:
    @pytest.mark.parametrize("name", ["gpt", "GPT", "model", "bot", "Assistant", "chatgpt", "ai"])
    def test_synonyms_of_the_assistant(self, name):
        assert chosen([{"role": name, "content": "Blue"}]) == [assistant("Blue")]

    @pytest.mark.parametrize("name", ["user", "human", "system", "tool", "critic"])
    def test_an_answer_of_another_role(self, name):
        with pytest.raises(DataError, match="must begin with a message of the role assistant") as caught:
            chosen([{"role": name, "content": "Blue"}])
        assert caught.value.reason == "response of another role"

    def test_later_messages_may_have_other_roles(self):
        talk = [assistant("Blue"), user("Sure?"), assistant("Yes")]
        assert chosen(talk) == talk


class TestContent:
    def test_parts_of_text_are_joined(self):
        parts = [{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue", "image": None}, "!"]
        assert chosen([{"role": "assistant", "content": parts}]) == [assistant("Blue!")]

    @pytest.mark.parametrize(
        "part", [{"type": "image", "image": "x.png"}, {"type": "image_url", "image_url": {"url": "x"}}]
    )
    def test_other_parts_are_refused_by_type(self, part):
        with pytest.raises(DataError, match=f"has a part of type '{part['type']}'; text alone"):
            chosen([{"role": "assistant", "content": [{"type": "text", "text": "a"}, part]}])

    @pytest.mark.parametrize("message", [{"content": None}, {}])
    def test_a_message_that_only_calls_tools_has_no_content(self, message):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}], **message}
        assert chosen([call])[0]["content"] == ""
        with pytest.raises(DataError, match=r"content of the assistant message in chosen.*must be text, got None"):
            chosen([{**call, "tool_calls": None}])

    def test_nulls_go_at_every_depth(self):
        nested = {"a": None, "b": [{"c": None, "d": 0}], "e": {"f": ""}}
        assert without_nulls(nested) == {"b": [{"d": 0}], "e": {"f": ""}}


class TestText:
    TALK: ClassVar = [assistant('It\'s "blue"'), user("so?"), assistant("yes\n")]

    @pytest.mark.parametrize(
        "write",
        [json.dumps, repr, lambda talk: " " + json.dumps(talk, indent=1), lambda talk: json.dumps({"messages": talk})],
    )
    def test_conversations_written_as_text_are_read(self, write):
        assert conversation(write(self.TALK)) == self.TALK

    @pytest.mark.parametrize(
        "text", ["[1, 2]", "{x}", "[see above]", '{"a": 1}', "[]", '[{"role":', "{'role': open('x')}"]
    )
    def test_other_text_stays_text(self, text):
        assert conversation(text) == text

    def test_an_answer_in_brackets_is_text(self):
        assert chosen('["a", "b"]') == [assistant('["a", "b"]')]


@pytest.mark.parametrize(
    ("a", "b"), [("", "a"), ("ab", "ab"), ("abc", "abd"), ("a", "b"), ("ab", "abc"), ("你好", "你们")]
)
def test_common_length(a, b):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_length(a, b) == common_length(b, a) == expected
