"""Which turns of an answer of several messages are scored, under the templates of known families."""

from typing import ClassVar

import pytest

from fused_dpo_engine.errors import DataError
from tests.engine.support.templates import GEMMA, MARKED, QWEN3, TEMPLATES
from tests.engine.support.tokenization import bpe_tokenizer, decode, tokenize_one
from tests.engine.support.toys import assistant, user

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "Rome"}}}]}
RESULT = {"role": "tool", "content": "20 degrees"}
ENDS = {
    "ChatML": "<|im_end|>\n",
    "Llama 3": "<|eot_id|>",
    "Mistral": "</s>",
    "Gemma": "<end_of_turn>\n",
    "Qwen3": "<|im_end|>\n",
}
OPENS = {"Qwen3": "<think>\n\n</think>\n\n", "Mistral": " "}
CALLS = {
    "ChatML": '<tool_call>f {"x": "Rome"}</tool_call>',
    "Llama 3": '{"name": "f", "arguments": {"x": "Rome"}}',
    "Mistral": '[TOOL_CALLS] [{"function": {"name": "f", "arguments": {"x": "Rome"}}}]',
    "Qwen3": '<tool_call>\n{"name": "f", "arguments": {"x": "Rome"}}\n</tool_call>',
}


def scored_runs(pair, side=0):
    """Decode each run of scored tokens."""
    ids, positions = pair.sides[side]
    runs, last = [], None
    for position in positions.tolist():
        if last is None or position != last + 1:
            runs.append([])
        runs[-1].append(ids[position])
        last = position
    return [str(bpe_tokenizer().decode([int(i) for i in run], skip_special_tokens=False)) for run in runs]


@pytest.mark.parametrize("family", TEMPLATES)
class TestFamilies:
    def pair(self, family, **settings):
        values = {
            "prompt": [user("What?")],
            "chosen": [assistant("ab"), user("And then?"), assistant("abba")],
            "rejected": [assistant("ba"), user("Why?"), assistant("bab")],
        }
        return tokenize_one(values, bpe_tokenizer(), 500, chat_template=TEMPLATES[family], **settings)

    def test_the_turns_of_the_assistant(self, family):
        pair, end = self.pair(family), ENDS[family]
        last, first = OPENS.get(family, ""), " " if family == "Mistral" else ""
        assert scored_runs(pair) == [f"{first}ab{end}", f"{last}abba{end}"]
        assert scored_runs(pair, 1) == [f"{first}ba{end}", f"{last}bab{end}"]
        assert pair.chosen_length == len(pair.sides[0][1])

    def test_the_last_turn(self, family):
        assert scored_runs(self.pair(family, score="last")) == [OPENS.get(family, "") + "abba" + ENDS[family]]

    def test_all(self, family):
        (run,) = scored_runs(self.pair(family, score="all"))
        assert "And then?" in run  # what the two others leave out
        assert run == decode(bpe_tokenizer(), self.pair(family).chosen_ids[self.pair(family).prompt_length :])

    def test_what_is_not_scored_is_the_others_turns(self, family):
        pair = self.pair(family)
        rest = [ids for at, ids in enumerate(pair.chosen_ids) if at not in set(pair.sides[0][1].tolist())]
        text = str(bpe_tokenizer().decode([int(i) for i in rest], skip_special_tokens=False))
        assert "What?" in text
        assert "And then?" in text
        assert "ab" not in text.replace("<|begin_of_text|>", "")

    def test_tool_results_are_not_scored(self, family):
        if family == "Gemma":
            pytest.skip("this template has no calls of tools")
        values = {"prompt": [user("What?")], "chosen": [CALL, RESULT, assistant("abba")], "rejected": "bab"}
        pair = tokenize_one(values, bpe_tokenizer(), 500, chat_template=TEMPLATES[family])
        opens = OPENS.get(family, "")
        assert scored_runs(pair) == [CALLS[family] + ENDS[family], f"{opens}abba{ENDS[family]}"]
        assert scored_runs(pair, 1) == [f"{opens}bab{ENDS[family]}"]

    def test_a_system_message(self, family):
        values = {
            "prompt": [{"role": "system", "content": "Short!"}, user("What?")],
            "chosen": [assistant("ab"), user("And then?"), assistant("abba")],
            "rejected": "bab",
        }
        pair = tokenize_one(values, bpe_tokenizer(), 500, chat_template=TEMPLATES[family])
        runs = scored_runs(pair)
        assert len(runs) == 2
        assert [run.strip().removesuffix(ENDS[family].strip()).split("\n")[-1].strip() for run in runs] == [
            "ab",
            "abba",
        ]
        (rejected,) = scored_runs(pair, 1)
        assert rejected.strip().split("\n")[-1].strip() == "bab" + ENDS[family].strip()
        assert "Short!" not in rejected
        assert "What?" not in rejected


class TestMarks:
    VALUES: ClassVar = {
        "prompt": [user("a"), assistant("b"), user("c")],
        "chosen": [assistant("ab"), user("d"), assistant("ba")],
        "rejected": "x",
    }

    def test_the_templates_own_marks_tell(self):
        pair = tokenize_one(self.VALUES, bpe_tokenizer(), 500, chat_template=MARKED)
        assert scored_runs(pair) == ["ab<|im_end|>", "ba<|im_end|>"]  # not the line's end, as prefixes would have it
        unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert scored_runs(tokenize_one(self.VALUES, bpe_tokenizer(), 500, chat_template=unmarked)) == [
            "ab<|im_end|>\n",
            "ba<|im_end|>\n",
        ]

    def test_marks_that_leave_turns_out_are_not_believed(self):
        half = MARKED.replace("if m.role == 'assistant'", "if m.role == 'assistant' and loop.last")
        assert scored_runs(tokenize_one(self.VALUES, bpe_tokenizer(), 500, chat_template=half)) == [
            "ab<|im_end|>\n",
            "ba<|im_end|>\n",
        ]


class TestLimits:
    VALUES: ClassVar = {
        "prompt": [user("a")],
        "chosen": [assistant("ab"), user("d"), assistant("abba")],
        "rejected": [assistant("ba")],
    }

    def test_turns_that_cannot_be_told_apart_are_refused(self):
        # Numbers the messages from the end: no part of it is what the parts alone are.
        template = (
            "{% for m in messages %}{{ messages | length - loop.index }}:{{ m.role }} {{ m.content }} {% endfor %}"
        )
        with pytest.raises(
            DataError, match=r"turns of the assistant cannot be told apart.*generation.*--score all"
        ) as caught:
            tokenize_one(
                {**self.VALUES, "chosen": [CALL | {"content": "b b"}, RESULT, assistant("ab")]},
                bpe_tokenizer(),
                500,
                chat_template=template.replace(
                    "{{ m.content }}", "{{ m.content | upper }} {{ m.content }} {{ m.tool_calls }}"
                ),
            )
        assert caught.value.reason == "turns not found"

    def test_a_cut_answer_keeps_what_is_left_of_its_turns(self):
        whole = tokenize_one(self.VALUES, bpe_tokenizer(), 500, chat_template=GEMMA)
        for length in range(whole.prompt_length + 1, len(whole.chosen_ids)):
            pair = tokenize_one(self.VALUES, bpe_tokenizer(), length, chat_template=GEMMA)
            assert pair.sides[0][1].tolist() == [at for at in whole.sides[0][1].tolist() if at < length]

    def test_a_cut_prompt_moves_the_turns(self):
        values = {**self.VALUES, "prompt": [user("the prompt and the answer " * 9)]}
        whole = tokenize_one(values, bpe_tokenizer(), 500, chat_template=GEMMA)
        pair = tokenize_one(
            values, bpe_tokenizer(), len(whole.chosen_ids) - 7, chat_template=GEMMA, truncate_prompts=True
        )
        assert pair.prompt_length == whole.prompt_length - 7
        assert scored_runs(pair) == scored_runs(whole)

    def test_an_answer_cut_before_its_last_turn(self):
        whole = tokenize_one(self.VALUES, bpe_tokenizer(), 500, chat_template=GEMMA, score="last")
        length = int(whole.sides[0][1][0])
        with pytest.raises(
            DataError, match="no token of the assistant's within max_length; raise --max-length"
        ) as caught:
            tokenize_one(self.VALUES, bpe_tokenizer(), length, chat_template=GEMMA, score="last")
        assert caught.value.reason == "nothing to score"
        assert (
            tokenize_one(self.VALUES, bpe_tokenizer(), length + 1, chat_template=GEMMA, score="last").chosen_length == 1
        )

    def test_reasoning_that_a_later_turn_loses_is_refused(self):
        # Qwen3 drops the reasoning of turns before the last question: it would not be trained.
        chosen = [assistant("<think>\nwell\n</think>\n\nab"), user("d"), assistant("abba")]
        with pytest.raises(DataError, match=r"leaves out a part of the response in 'chosen'.*strip reasoning"):
            tokenize_one({**self.VALUES, "chosen": chosen}, bpe_tokenizer(), 500, chat_template=QWEN3)
        kept = [assistant("<think>\nwell\n</think>\n\nab")]
        pair = tokenize_one({**self.VALUES, "chosen": kept}, bpe_tokenizer(), 500, chat_template=QWEN3)
        assert scored_runs(pair) == ["<think>\nwell\n</think>\n\nab<|im_end|>\n"]
