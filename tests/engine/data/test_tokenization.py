"""Rows to token pairs: where the response begins, special tokens, chat templates."""

import pytest

from fused_dpo_engine.data import tokenization
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import DataError
from tests.engine.support.tokenization import (
    bpe_tokenizer,
    chat_tokenizer,
    decode,
    letter_tokenizer,
    make_rows,
    scored,
    strings,
    tokenize_one,
)
from tests.engine.support.toys import CHATML, assistant, user


class TestBoundary:
    def test_a_clean_prompt(self):
        result = tokenize_pairs(make_rows(strings("aef", "gh", "h")), letter_tokenizer(), max_length=100)
        (pair,) = result.pairs
        assert pair.prompt_length == 3
        assert scored(letter_tokenizer(), pair) == ("gh", "h")
        assert (pair.chosen_length, pair.rejected_length) == (2, 1)
        assert (pair.where, result.report.merged_boundaries) == ("pairs.jsonl:1", 0)

    def test_a_token_that_merges_prompt_and_response_is_scored_whole(self):
        tokenizer = letter_tokenizer()
        result = tokenize_pairs(make_rows(strings("efa", "bcg", "h")), tokenizer, max_length=100)
        (pair,) = result.pairs
        assert pair.chosen_ids.tolist() == tokenizer.convert_tokens_to_ids(["e", "f", "ab", "c", "g"])
        assert pair.prompt_length == 2
        assert scored(tokenizer, pair) == ("abcg", "ah")
        assert result.report.merged_boundaries == 1
        # Negative control: a boundary of len(prompt_ids) loses the response's first letter, and differs in the prompt.
        naive = len(tokenizer("efa")["input_ids"])
        assert decode(tokenizer, pair.chosen_ids[naive:]) == "cg"
        assert pair.chosen_ids[:naive].tolist() != pair.rejected_ids[:naive].tolist()

    def test_the_same_merge_in_both_responses_is_scored_too(self):
        pair = tokenize_one(strings("efa", "bg", "bh"), letter_tokenizer())
        assert scored(letter_tokenizer(), pair) == ("abg", "abh")

    def test_without_prompt_the_words_in_common_are_prompt(self):
        result = tokenize_pairs(
            make_rows({"chosen": "the ab abba", "rejected": "the ab abab"}), bpe_tokenizer(), max_length=9
        )
        assert scored(bpe_tokenizer(), result.pairs[0]) == (" abba</s>", " abab</s>")
        assert result.report.implied_prompts == 1
        assert "1 rows have no prompt: the words that their texts share are the prompt" in result.report.summary()

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (strings("ef", "", "g"), ("f", "fg")),
            (strings("ef", "g", ""), ("fg", "f")),
        ],
    )
    def test_a_response_that_the_other_begins_with_keeps_a_token(self, values, expected):
        assert scored(letter_tokenizer(), tokenize_one(values, letter_tokenizer())) == expected

    def test_an_empty_response_is_an_eos_token(self):
        tokenizer = bpe_tokenizer()
        assert scored(tokenizer, tokenize_one(strings("ab", "", "c"), tokenizer)) == ("</s>", "c</s>")

    @pytest.mark.parametrize("values", [strings("", "e", "f"), strings("a", "b", "g")])
    def test_nothing_in_common(self, values):
        with pytest.raises(
            DataError, match=r"^pairs\.jsonl:1: both sequences must begin with a token that is not scored.*BOS"
        ) as caught:
            tokenize_one(values, letter_tokenizer())
        assert caught.value.reason == "no common beginning"

    def test_an_empty_prompt_after_bos(self):
        pair = tokenize_one(strings("", "e", "f"), bpe_tokenizer(bos=True))
        assert pair.prompt_length == 1
        assert scored(bpe_tokenizer(), pair) == ("e</s>", "f</s>")


class TestSpecialTokens:
    @pytest.mark.parametrize("bos", [False, True])
    @pytest.mark.parametrize("eos", [False, True])
    @pytest.mark.parametrize("literal", ["", "</s>"])
    def test_plain_text_has_one_bos_and_one_eos(self, bos, eos, literal):
        tokenizer = bpe_tokenizer(bos, eos)
        rows = make_rows(strings("the prompt", " one" + literal, " two" + literal))
        result = tokenize_pairs(rows, tokenizer, max_length=100)
        (pair,) = result.pairs
        assert decode(tokenizer, pair.chosen_ids) == ("<s>" if bos else "") + "the prompt one</s>"
        assert scored(tokenizer, pair) == (" one</s>", " two</s>")
        assert result.report.merged_boundaries == 0  # a prompt's own EOS is no merge

    def test_a_prompt_that_ends_with_a_literal_eos_keeps_it(self):
        for eos in (False, True):
            pair = tokenize_one(strings("the prompt</s>", "one", "two"), bpe_tokenizer(eos=eos))
            assert scored(bpe_tokenizer(), pair) == ("one</s>", "two</s>")

    def test_without_eos_none_is_appended(self):
        pair = tokenize_one(strings("a", " one", " two"), bpe_tokenizer(has_eos=False))
        assert scored(bpe_tokenizer(), pair) == (" one", " two")

    @pytest.mark.parametrize("bos", [False, True])
    def test_conversations_begin_and_end_as_the_template_does(self, bos):
        tokenizer = chat_tokenizer(bos, eos=bos)
        values = {"prompt": [user("你好吗")], "chosen": [assistant("我很好")], "rejected": "不"}
        pair = tokenize_one(values, tokenizer)
        prompt = "<|im_start|>user\n你好吗<|im_end|>\n<|im_start|>assistant\n"
        assert decode(tokenizer, pair.chosen_ids) == prompt + "我很好<|im_end|>\n"
        assert scored(tokenizer, pair) == ("我很好<|im_end|>\n", "不<|im_end|>\n")

    def test_plain_and_conversational_rows_keep_their_order(self, monkeypatch):
        monkeypatch.setattr(tokenization, "ROWS_PER_BATCH", 3)
        talk = {"prompt": [user("a")], "chosen": "b", "rejected": "c"}
        rows = make_rows(
            strings("x", "b", "c"), talk, {"chosen": "the ab b", "rejected": "the ab c"}, talk, strings("x", "e", "f")
        )
        pairs = tokenize_pairs(rows, chat_tokenizer(), max_length=100).pairs
        assert [pair.where for pair in pairs] == [f"pairs.jsonl:{number}" for number in range(1, 6)]
        endings = [scored(chat_tokenizer(), pair)[0] for pair in pairs]
        assert endings == ["b</s>", "b<|im_end|>\n", " b</s>", "b<|im_end|>\n", "e</s>"]


TALK = {"prompt": [user("a")], "chosen": "b", "rejected": "c"}


class TestTemplates:
    def test_no_template(self):
        ways_out = r"has no chat template.*pass chat_template \(command line: --chat-template FILE\).*plain text"
        for skip in (False, True):  # a setting to put right, not a bad row
            with pytest.raises(DataError, match=ways_out):
                tokenize_one(TALK, bpe_tokenizer(), skip_bad_rows=skip)
        tokenize_one(strings("x", "b", "c"), bpe_tokenizer())

    def test_a_template_given(self):
        for tokenizer in (bpe_tokenizer(), chat_tokenizer()):
            template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
            assert scored(tokenizer, tokenize_one(TALK, tokenizer, chat_template=template)) == ("[b]", "[c]")

    def test_a_template_that_is_not_jinja(self):
        with pytest.raises(DataError, match="the chat template is not valid Jinja: line 2: "):
            tokenize_one(TALK, bpe_tokenizer(), chat_template="\n{{ messages[0 }}", skip_bad_rows=True)

    @pytest.mark.parametrize("fault", ["raise_exception('no system role')", "messages[0].content + 5"])
    def test_a_template_that_refuses_a_row(self, fault):
        template = "{% if messages[0].role == 'system' %}{{ " + fault + " }}{% endif %}" + CHATML
        system = {**TALK, "prompt": [{"role": "system", "content": "s"}, user("a")]}
        rows = make_rows(TALK, system)
        message = r"^pairs\.jsonl:2: the chat template refuses a conversation with the roles system, user: "
        with pytest.raises(DataError, match=message):
            tokenize_pairs(rows, bpe_tokenizer(), max_length=100, chat_template=template)
        report = tokenize_pairs(
            rows, bpe_tokenizer(), max_length=100, chat_template=template, skip_bad_rows=True
        ).report
        assert report.skipped == {"refused by the chat template": 1}

    def test_a_template_that_leaves_a_message_out(self):
        template = (
            "{% for message in messages if message.role in ['user', 'assistant'] %}[{{ message.content }}]{% endfor %}"
        )
        talk = {**TALK, "prompt": [{"role": "critic", "content": "question"}, user("a")]}
        with pytest.raises(
            DataError, match=r"^pairs\.jsonl:1: .*leaves out the prompt's 'critic' message; .*other names"
        ):
            tokenize_one(talk, bpe_tokenizer(), chat_template=template)

    def test_a_template_whose_prompt_is_no_prefix(self):
        # As some do: "think" opens the generation prompt, but not an answer that is already there.
        template = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
        result = tokenize_pairs(make_rows(TALK), bpe_tokenizer(), max_length=100, chat_template=template)
        assert scored(bpe_tokenizer(), result.pairs[0]) == ("b<|im_end|>\n", "c<|im_end|>\n")
        assert result.report.merged_boundaries == 1

    def test_a_template_that_renders_both_responses_the_same(self):
        with pytest.raises(DataError, match=r"^pairs\.jsonl:1: .*become the same tokens") as caught:
            # Both hold all of both answers.
            tokenize_one(
                {**TALK, "chosen": "bc"},
                bpe_tokenizer(),
                chat_template="{{ messages[0].content }}{{ 'bc' if messages[1] }}",
            )
        assert caught.value.reason == "identical after tokenization"
