"""What a chat template leaves out, and what reaches it."""

import json

import pytest

from fused_dpo_engine.config.options import DataOptions
from fused_dpo_engine.data.load import find_template, load_pairs
from fused_dpo_engine.errors import DataError, UserError
from tests.engine.support.templates import CHATML, LLAMA3, QWEN3
from tests.engine.support.tokenization import bpe_tokenizer, chat_tokenizer, decode, scored, tokenize_one
from tests.engine.support.toys import assistant, user

ROLES = "{% for m in messages if m.role in ['user', 'assistant'] %}[{{ m.content }}]{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
SHOWN = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + CHATML
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Rome"}}}]}


def one(values, template, **settings):
    return tokenize_one(
        {"prompt": [user("a")], "rejected": "c", **values}, bpe_tokenizer(), 500, chat_template=template, **settings
    )


class TestLeftOut:
    @pytest.mark.parametrize(
        ("chosen", "template"),
        [
            ("b", "[{{ messages[0].content }}]"),  # nothing of the answer
            ("a", "[{{ messages[0].content }}]"),  # what the prompt says too
            ([CALL], ROLES),
            ([CALL], CHATML.replace("{{ c.function.arguments | tojson }}", "")),
            ([{**assistant("b"), "reasoning_content": "well"}], CHATML),
            ("<think>well</think>b", CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")),
            ([assistant("b"), {"role": "critic", "content": "no"}, assistant("d")], ROLES),
        ],
    )
    def test_of_an_answer(self, chosen, template):
        with pytest.raises(
            DataError, match="the chat template leaves out a part of the response in 'chosen'"
        ) as caught:
            one({"chosen": chosen}, template)
        assert caught.value.reason == "left out by the chat template"
        one({"chosen": "b"}, CHATML)  # negative control

    def test_an_empty_answer_is_complete(self):
        assert scored(bpe_tokenizer(), one({"chosen": ""}, CHATML))[0] == "<|im_end|>\n"

    def test_what_is_written_in_another_way_is_there(self):
        quoted = [{"role": "tool", "content": '{"t": "20 °C"}'}]
        values = {"prompt": [user("a"), CALL, *quoted], "chosen": "b"}
        assert '{\\"t\\": \\"20 °C\\"}' in decode(bpe_tokenizer(), one(values, LLAMA3).chosen_ids)
        spaced = CHATML.replace("{{ m.content }}", "{{ m.content | replace('\n\n', '\n') | trim }}")
        one({"chosen": " b\n\nd "}, spaced)
        as_text = {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": '{"city": "Rome"}'}}]}
        one({"chosen": [as_text]}, CHATML)

    def test_of_the_tools(self):
        with pytest.raises(
            DataError, match=r"leaves out the row's tools .no 'get_weather' in the prompt.*remove the column"
        ):
            one({"chosen": "b", "tools": TOOLS}, CHATML)
        pair = one({"chosen": "b", "tools": TOOLS}, SHOWN)
        assert decode(bpe_tokenizer(), pair.rejected_ids).startswith("get_weather;<|im_start|>user")

    def test_earlier_reasoning_may_go(self):
        prompt = [user("a"), assistant("<think>\nwell\n</think>\n\nb"), user("c")]
        text = decode(bpe_tokenizer(), one({"prompt": prompt, "chosen": "d"}, QWEN3).chosen_ids)
        assert "well" not in text
        with pytest.raises(DataError, match="leaves out the prompt's 'assistant' message"):
            one({"prompt": prompt, "chosen": "d"}, "{{ messages[0].content }}{{ messages[-1].content }}")


class TestArguments:
    def test_they_reach_prompt_and_answers(self):
        row = {"chosen": "b", "chat_template_kwargs": {"enable_thinking": False}}
        pair = one(row, QWEN3)
        assert scored(bpe_tokenizer(), pair) == ("b<|im_end|>\n", "c<|im_end|>\n")
        assert scored(bpe_tokenizer(), one({"chosen": "b"}, QWEN3))[0].startswith("<think>")
        as_text = {**row, "chat_template_kwargs": json.dumps(row["chat_template_kwargs"])}
        assert one(as_text, QWEN3).chosen_ids.tolist() == pair.chosen_ids.tolist()

    @pytest.mark.parametrize("value", ["nonsense", [1]])
    def test_malformed(self, value):
        with pytest.raises(DataError, match=r'"chat_template_kwargs" (is text that is no JSON|must be an object)'):
            one({"chosen": "b", "chat_template_kwargs": value}, CHATML)


class TestNamed:
    def tokenizer(self, names=("default", "tool_use", "plain")):
        tokenizer = chat_tokenizer.__wrapped__()
        tokenizer.chat_template = {name: f"{name}:{SHOWN}" for name in names}
        return tokenizer

    def start(self, tokenizer, **more):
        values = {"prompt": [user("a")], "chosen": "b", "rejected": "c", **more}
        return decode(tokenizer, tokenize_one(values, tokenizer).chosen_ids).split(":")[0]

    def test_as_when_the_model_serves(self):
        assert self.start(self.tokenizer()) == "default"
        assert self.start(self.tokenizer(), tools=TOOLS) == "tool_use"

    def test_without_a_default_they_are_listed(self):
        with pytest.raises(
            DataError, match="several chat templates and no default; choose one: --chat-template plain, rag"
        ):
            self.start(self.tokenizer(("rag", "plain")))

    def test_chosen_by_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_template("plain", self.tokenizer()).startswith("plain:")
        with pytest.raises(
            UserError, match=r"--chat-template other: no such file, and the tokenizer has .* default, plain"
        ):
            find_template("other", self.tokenizer())
        (tmp_path / "plain").write_text("of the file")
        assert find_template("plain", self.tokenizer()) == "of the file"

    def test_the_template_used_is_the_one_that_is_saved(self, tmp_path):
        from rich.console import Console

        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": [user("a")], "chosen": "b", "rejected": "c"}))
        tokenizer = self.tokenizer()
        data = DataOptions(data=str(path), chat_template="plain", max_length=200)
        (pair,), _ = load_pairs(data, 0, tokenizer, Console(quiet=True))
        assert decode(tokenizer, pair.chosen_ids).startswith("plain:")
        tokenizer.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "chat_template.jinja").read_text() == tokenizer.chat_template == f"plain:{SHOWN}"
