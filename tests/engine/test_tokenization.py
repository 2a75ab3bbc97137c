"""Rows to token pairs: boundaries, special tokens, truncation, bad rows, the report and the split."""

import json
import logging
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fused_dpo_engine import tokenization
from fused_dpo_engine.data import DataError, Row, read_rows
from fused_dpo_engine.pairs import TokenPair, split_pairs
from fused_dpo_engine.tokenization import tokenize_pairs

SHARED = Path(__file__).parents[3] / "shared"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def make_rows(*values):
    return [Row(value, f"pairs.jsonl:{number}") for number, value in enumerate(values, start=1)]


def strings(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenize_one(values, tokenizer, max_length=100, **settings):
    (pair,) = tokenize_pairs(make_rows(values), tokenizer, max_length=max_length, **settings).pairs
    return pair


@cache
def byte_tokenizer(bos=False, eos=False, has_eos=True):
    """Byte-level BPE with some merges; `bos` and `eos`: the tokenizer puts them around a text itself."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the prompt and the answer 你好吗 我很好 aab abab ba" * 4] * 4, trainer)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        model.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokens = {"bos_token": "<s>"} if bos else {}
    if has_eos:
        tokens["eos_token"] = "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=model, **tokens)


@cache
def chat_tokenizer(bos=False, eos=False):
    """`byte_tokenizer` with a chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(bos, eos).backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def letter_tokenizer():
    """One token a letter but for "ab" and "cd", and no special tokens."""
    vocab = {letter: index for index, letter in enumerate("abcdefgh")} | {"ab": 8, "cd": 9}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("c", "d")]))
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model)


@cache
def real_tokenizer(name):
    path = SHARED / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return AutoTokenizer.from_pretrained(path)


@cache
def real_rows(name):
    path = SHARED / "data" / "preferences" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return read_rows(path)


def decode(tokenizer, ids):
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def scored(tokenizer, pair):
    return tuple(decode(tokenizer, ids[pair.prompt_length :]) for ids in (pair.chosen_ids, pair.rejected_ids))


def assert_sound(pair, max_length):
    assert pair.prompt_length >= 1
    assert min(pair.chosen_length, pair.rejected_length) >= 1
    assert max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length
    assert pair.chosen_ids.dtype == pair.rejected_ids.dtype == np.int32
    assert pair.chosen_ids[: pair.prompt_length].tolist() == pair.rejected_ids[: pair.prompt_length].tolist()
    assert pair.chosen_ids.tolist() != pair.rejected_ids.tolist()


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

    def test_without_prompt_all_that_is_common_is_prompt(self):
        pair = tokenize_one({"chosen": "efag", "rejected": "efabh"}, letter_tokenizer())
        assert scored(letter_tokenizer(), pair) == ("ag", "abh")

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"chosen": "efg", "rejected": "efgh"}, ("g", "gh")),
            (strings("ef", "", "g"), ("f", "fg")),
            (strings("ef", "g", ""), ("fg", "f")),
        ],
    )
    def test_a_response_that_the_other_begins_with_keeps_a_token(self, values, expected):
        assert scored(letter_tokenizer(), tokenize_one(values, letter_tokenizer())) == expected

    def test_an_empty_response_is_an_eos_token(self):
        tokenizer = byte_tokenizer()
        assert scored(tokenizer, tokenize_one(strings("ab", "", "c"), tokenizer)) == ("</s>", "c</s>")

    @pytest.mark.parametrize(
        "values", [strings("", "e", "f"), strings("a", "b", "g"), {"chosen": "ab", "rejected": "ag"}]
    )
    def test_nothing_in_common(self, values):
        with pytest.raises(
            DataError, match=r"^pairs\.jsonl:1: both sequences must begin with a token that is not scored.*BOS"
        ) as caught:
            tokenize_one(values, letter_tokenizer())
        assert caught.value.reason == "no common beginning"

    def test_an_empty_prompt_after_bos(self):
        pair = tokenize_one(strings("", "e", "f"), byte_tokenizer(bos=True))
        assert pair.prompt_length == 1
        assert scored(byte_tokenizer(), pair) == ("e</s>", "f</s>")


class TestSpecialTokens:
    @pytest.mark.parametrize("bos", [False, True])
    @pytest.mark.parametrize("eos", [False, True])
    @pytest.mark.parametrize("literal", ["", "</s>"])
    def test_plain_text_has_one_bos_and_one_eos(self, bos, eos, literal):
        tokenizer = byte_tokenizer(bos, eos)
        rows = make_rows(strings("the prompt", " one" + literal, " two" + literal))
        result = tokenize_pairs(rows, tokenizer, max_length=100)
        (pair,) = result.pairs
        assert decode(tokenizer, pair.chosen_ids) == ("<s>" if bos else "") + "the prompt one</s>"
        assert scored(tokenizer, pair) == (" one</s>", " two</s>")
        assert result.report.merged_boundaries == 0  # a prompt's own EOS is no merge

    def test_a_prompt_that_ends_with_a_literal_eos_keeps_it(self):
        for eos in (False, True):
            pair = tokenize_one(strings("the prompt</s>", "one", "two"), byte_tokenizer(eos=eos))
            assert scored(byte_tokenizer(), pair) == ("one</s>", "two</s>")

    def test_without_eos_none_is_appended(self):
        pair = tokenize_one(strings("a", " one", " two"), byte_tokenizer(has_eos=False))
        assert scored(byte_tokenizer(), pair) == (" one", " two")

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
        rows = make_rows(strings("x", "b", "c"), talk, {"chosen": "xb", "rejected": "xc"}, talk, strings("x", "e", "f"))
        pairs = tokenize_pairs(rows, chat_tokenizer(), max_length=100).pairs
        assert [pair.where for pair in pairs] == [f"pairs.jsonl:{number}" for number in range(1, 6)]
        endings = [scored(chat_tokenizer(), pair)[0] for pair in pairs]
        assert endings == ["b</s>", "b<|im_end|>\n", "b</s>", "b<|im_end|>\n", "e</s>"]


TALK = {"prompt": [user("a")], "chosen": "b", "rejected": "c"}


class TestTemplates:
    def test_no_template(self):
        ways_out = r"has no chat template.*pass chat_template \(command line: --chat-template FILE\).*plain text"
        for skip in (False, True):  # a setting to put right, not a bad row
            with pytest.raises(DataError, match=ways_out):
                tokenize_one(TALK, byte_tokenizer(), skip_bad_rows=skip)
        tokenize_one(strings("x", "b", "c"), byte_tokenizer())

    def test_a_template_given(self):
        for tokenizer in (byte_tokenizer(), chat_tokenizer()):
            template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
            assert scored(tokenizer, tokenize_one(TALK, tokenizer, chat_template=template)) == ("[b]", "[c]")

    def test_a_template_that_is_not_jinja(self):
        with pytest.raises(DataError, match="the chat template is not valid Jinja: line 2: "):
            tokenize_one(TALK, byte_tokenizer(), chat_template="\n{{ messages[0 }}", skip_bad_rows=True)

    @pytest.mark.parametrize("fault", ["raise_exception('no system role')", "messages[0].content + 5"])
    def test_a_template_that_refuses_a_row(self, fault):
        template = "{% if messages[0].role == 'system' %}{{ " + fault + " }}{% endif %}" + CHATML
        system = {**TALK, "prompt": [{"role": "system", "content": "s"}, user("a")]}
        rows = make_rows(TALK, system)
        message = r"^pairs\.jsonl:2: the chat template refuses a conversation with the roles system, user, assistant: "
        with pytest.raises(DataError, match=message):
            tokenize_pairs(rows, byte_tokenizer(), max_length=100, chat_template=template)
        report = tokenize_pairs(
            rows, byte_tokenizer(), max_length=100, chat_template=template, skip_bad_rows=True
        ).report
        assert report.skipped == {"refused by the chat template": 1}

    def test_a_template_that_leaves_a_message_out(self):
        template = (
            "{% for message in messages if message.role in ['user', 'assistant'] %}[{{ message.content }}]{% endfor %}"
        )
        talk = {**TALK, "prompt": [{"role": "human", "content": "question"}, user("a")]}
        with pytest.raises(
            DataError, match=r"^pairs\.jsonl:1: .*leaves out the prompt's 'human' message; .*other names"
        ):
            tokenize_one(talk, byte_tokenizer(), chat_template=template)

    def test_a_template_whose_prompt_is_no_prefix(self):
        # As some do: "think" opens the generation prompt, but not an answer that is already there.
        template = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
        result = tokenize_pairs(make_rows(TALK), byte_tokenizer(), max_length=100, chat_template=template)
        assert scored(byte_tokenizer(), result.pairs[0]) == ("b<|im_end|>\n", "c<|im_end|>\n")
        assert result.report.merged_boundaries == 1

    def test_a_template_that_renders_both_responses_the_same(self):
        with pytest.raises(DataError, match=r"^pairs\.jsonl:1: .*become the same tokens") as caught:
            tokenize_one(TALK, byte_tokenizer(), chat_template="{{ messages[0].content }}")
        assert caught.value.reason == "identical after tokenization"


class TestTruncation:
    def run(self, values, **settings):
        result = tokenize_pairs(make_rows(values), letter_tokenizer(), **settings)
        (pair,) = result.pairs
        report = result.report
        assert_sound(pair, settings["max_length"])
        return (
            tuple(decode(letter_tokenizer(), ids) for ids in (pair.chosen_ids, pair.rejected_ids)),
            pair.prompt_length,
            (report.prompts_cut, report.responses_cut, report.tokens_cut),
        )

    def test_what_fits_is_left_alone(self):
        values = strings("efef", "gggg", "hh")
        for truncate_prompts in (False, True):
            texts, prompt_length, cuts = self.run(values, max_length=8, truncate_prompts=truncate_prompts)
            assert (texts, prompt_length, cuts) == (("efefgggg", "efefhh"), 4, (0, 0, 0))

    def test_responses_are_cut_at_their_end(self):
        assert self.run(strings("efef", "gggg", "hh"), max_length=7) == (("efefggg", "efefhh"), 4, (0, 1, 1))
        assert self.run(strings("efef", "gggg", "hhh"), max_length=5) == (("efefg", "efefh"), 4, (0, 2, 5))

    def test_prompts_are_cut_first_where_asked(self):
        run = self.run
        values = strings("efefef", "gggg", "h")
        assert run(values, max_length=8, truncate_prompts=True) == (("efefgggg", "efefh"), 4, (1, 0, 2))
        # not below half of max_length: the response gives way then
        assert run(values, max_length=6, truncate_prompts=True) == (("fefggg", "fefh"), 3, (1, 1, 4))
        assert run(values, max_length=2, truncate_prompts=True) == (("fg", "fh"), 1, (1, 1, 8))
        # a prompt that is short already is not cut for a long response
        assert run(strings("ef", "gggggg", "h"), max_length=5, truncate_prompts=True) == (
            ("efggg", "efh"),
            2,
            (0, 1, 3),
        )

    def test_bos_stays_when_a_prompt_is_cut(self):
        tokenizer = byte_tokenizer(bos=True)
        pair = tokenize_one(strings("z" * 50, "x", "y"), tokenizer, max_length=10, truncate_prompts=True)
        assert decode(tokenizer, pair.chosen_ids) == "<s>zzzzzzzx</s>"
        assert pair.prompt_length == 8

    @pytest.mark.parametrize("max_length", [4, 3])
    def test_a_prompt_that_leaves_no_room(self, max_length):
        values = strings("efef", "gggg", "hh")
        message = (
            rf"^pairs\.jsonl:1: the prompt's 4 tokens leave no room .* max_length {max_length}; .*truncate_prompts"
        )
        with pytest.raises(DataError, match=message) as caught:
            self.run(values, max_length=max_length)
        assert caught.value.reason == "prompt leaves no room"
        self.run(values, max_length=max_length, truncate_prompts=True)

    def test_identical_after_truncation(self):
        message = (
            r"^pairs\.jsonl:1: chosen and rejected agree in all of the first max_length 6 tokens; raise max_length"
        )
        for truncate_prompts in (False, True):
            with pytest.raises(DataError, match=message) as caught:
                self.run(strings("efe", "gggh", "ggge"), max_length=6, truncate_prompts=truncate_prompts)
            assert caught.value.reason == "identical after truncation"

    def test_max_length_must_hold_a_prompt_and_a_response(self):
        with pytest.raises(DataError, match=r"max_length must be at least 2, .*got 1"):
            self.run(strings("e", "f", "g"), max_length=1)

    def test_the_tokenizers_own_limit_is_not_ours(self, monkeypatch, caplog):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=letter_tokenizer().backend_tokenizer, model_max_length=4)
        tokenizer.backend_tokenizer.enable_truncation(4)
        pair = tokenize_one(strings("ef" * 20, "g", "h"), tokenizer)
        assert (len(pair.chosen_ids), caplog.messages) == (41, [])


class TestBadRows:
    def rows(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        good, same, long = strings("ef", "g", "h"), strings("e", "f", "f"), strings("ef" * 9, "g", "h")
        texts = [json.dumps(row) for row in (good, same, long, same)]
        path.write_text("\n".join([*texts, '{"prompt": ', json.dumps(good)]))
        return read_rows(path)

    def test_the_first_one_stops_the_run(self, tmp_path):
        with pytest.raises(
            DataError, match=r'pairs\.jsonl:2: "chosen" and "rejected" must differ.*--skip-bad-rows drops'
        ):
            tokenize_pairs(self.rows(tmp_path), letter_tokenizer(), max_length=10)
        with pytest.raises(DataError, match=r"pairs\.jsonl:5: each line must be one JSON object"):
            tokenize_pairs(self.rows(tmp_path)[4:], letter_tokenizer(), max_length=10)

    def test_skipped_ones_are_counted_by_reason(self, tmp_path):
        result = tokenize_pairs(self.rows(tmp_path), letter_tokenizer(), max_length=10, skip_bad_rows=True)
        assert [pair.where.rpartition(":")[2] for pair in result.pairs] == ["1", "6"]
        report = result.report
        assert (report.rows_read, report.pairs_kept) == (6, 2)
        assert report.skipped == {"chosen equals rejected": 2, "malformed line": 1, "prompt leaves no room": 1}
        assert (report.prompts_cut, report.responses_cut, report.tokens_cut) == (0, 0, 0)

    def test_nothing_left(self, tmp_path):
        message = (
            "no usable pair is left of 4 rows: 2 chosen equals rejected, 1 malformed line, 1 prompt leaves no room"
        )
        with pytest.raises(DataError, match=message):
            tokenize_pairs(self.rows(tmp_path)[1:5], letter_tokenizer(), max_length=10, skip_bad_rows=True)
        with pytest.raises(DataError, match="no usable pair is left of 0 rows: there were no rows"):
            tokenize_pairs([], letter_tokenizer(), max_length=10)


class TestReport:
    def test_statistics(self):
        rows = make_rows(*(strings("e" * n, "g" * (2 * n), "h") for n in range(1, 101)))
        report = tokenize_pairs(rows, letter_tokenizer(), max_length=1000).report
        assert (report.prompt_tokens.mean, report.prompt_tokens.max) == (50.5, 100)
        assert report.prompt_tokens.p95 == pytest.approx(95.05)
        assert str(report.chosen_tokens) == "mean 101.0, p95 190, max 200"
        assert str(report.rejected_tokens) == "mean 1.0, p95 1, max 1"

    def test_summary(self):
        rows = make_rows(strings("efa", "bg", "h"), strings("e", "f", "f"), strings("efef", "gggg", "h"))
        report = tokenize_pairs(rows, letter_tokenizer(), max_length=6, skip_bad_rows=True).report
        assert report.summary().splitlines() == [
            "2 pairs of 3 rows",
            "skipped 1 rows: 1 chosen equals rejected",
            "0 prompts and 1 responses cut to fit max_length 6, 2 tokens lost",
            "1 prompts merge with the response; the merged tokens are scored",
            "prompt tokens: mean 3.0, p95 4, max 4",
            "chosen tokens: mean 2.0, p95 2, max 2",
            "rejected tokens: mean 1.5, p95 2, max 2",
        ]
        plain = tokenize_pairs(rows[:1], byte_tokenizer(), max_length=100).report.summary()
        assert len(plain.splitlines()) == 4 + ("merge" in plain)

    def test_progress_bar(self, capsys):
        tokenize_pairs(make_rows(strings("ef", "g", "h")), letter_tokenizer(), max_length=9)
        assert capsys.readouterr().err == ""
        tokenize_pairs(make_rows(strings("ef", "g", "h")), letter_tokenizer(), max_length=9, progress=True)
        assert "tokenizing: 100%" in capsys.readouterr().err


class TestProperties:
    TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab 你好"), max_size=12)

    @settings(max_examples=150, deadline=None)
    @given(prompt=TEXT, chosen=TEXT, rejected=TEXT, bos=st.booleans(), eos=st.booleans())
    def test_scored_tokens_hold_the_response(self, prompt, chosen, rejected, bos, eos):
        tokenizer = byte_tokenizer(bos, eos)
        values = strings(prompt, chosen, rejected)
        result = tokenize_pairs(
            make_rows(values, strings("a", " b", " c")), tokenizer, max_length=1000, skip_bad_rows=True
        )
        assert set(result.report.skipped) <= {"chosen equals rejected", "no common beginning"}
        for pair in result.pairs[:-1]:
            assert_sound(pair, 1000)
            beginning = "<s>" if bos else ""
            assert decode(tokenizer, pair.chosen_ids) == beginning + prompt + chosen + "</s>"
            assert decode(tokenizer, pair.rejected_ids) == beginning + prompt + rejected + "</s>"
            # more only where a token merges, never less
            assert scored(tokenizer, pair)[0].endswith(chosen + "</s>")
            assert scored(tokenizer, pair)[1].endswith(rejected + "</s>")
            if not result.report.merged_boundaries:
                assert scored(tokenizer, pair) == (chosen + "</s>", rejected + "</s>")

    @settings(max_examples=150, deadline=None)
    @given(prompt=TEXT, chosen=TEXT, rejected=TEXT, max_length=st.integers(2, 30), truncate_prompts=st.booleans())
    def test_truncation_only_removes(self, prompt, chosen, rejected, max_length, truncate_prompts):
        rows = make_rows(strings(prompt, chosen, rejected), strings("", "b", "c"))
        settings = {"truncate_prompts": truncate_prompts, "skip_bad_rows": True}
        (*whole, _) = tokenize_pairs(rows, byte_tokenizer(True), max_length=1000, **settings).pairs
        (*cut, _) = tokenize_pairs(rows, byte_tokenizer(True), max_length=max_length, **settings).pairs
        for pair in cut:
            assert_sound(pair, max_length)
            lost = whole[0].prompt_length - pair.prompt_length
            assert lost == 0 or truncate_prompts
            for ids, full in ((pair.chosen_ids, whole[0].chosen_ids), (pair.rejected_ids, whole[0].rejected_ids)):
                assert ids[0] == full[0]
                assert ids[1:].tolist() == full[1 + lost : lost + len(ids)].tolist()

    @settings(max_examples=50, deadline=None)
    @given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), chosen=TEXT, rejected=TEXT)
    def test_conversations(self, texts, chosen, rejected):
        prompt = [message for a, b in texts for message in (user(a), assistant(b))][:-1]
        explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        implicit = {key: [*prompt, assistant(text)] for key, text in (("chosen", chosen), ("rejected", rejected))}
        rows = make_rows(explicit, implicit, {"prompt": [user("a")], "chosen": "b", "rejected": "c"})
        (*pairs, _) = tokenize_pairs(rows, chat_tokenizer(), max_length=10_000, skip_bad_rows=True).pairs
        assert len(pairs) == (0 if chosen == rejected else 2)
        for pair in pairs:
            assert scored(chat_tokenizer(), pair)[0].endswith(chosen + "<|im_end|>\n")
            assert decode(chat_tokenizer(), pair.rejected_ids).endswith("\n" + rejected + "<|im_end|>\n")
            assert pair.prompt_length == pairs[0].prompt_length


class TestSplit:
    def pairs(self, prompts):
        return [
            TokenPair(len(prompt), np.array([*prompt, 1], np.int32), np.array([*prompt, 2], np.int32), str(index))
            for index, prompt in enumerate(prompts)
        ]

    def test_both_sides_together_are_all_pairs_in_order(self):
        pairs = self.pairs([[number, 7] for number in range(100)])
        train, held_out = split_pairs(pairs, 0.1, seed=3)
        assert (len(train), len(held_out)) == (90, 10)
        assert sorted([*train, *held_out], key=pairs.index) == pairs
        assert train == sorted(train, key=pairs.index)

    def test_the_seed_and_the_tokens_alone_decide(self):
        pairs = self.pairs([[number, 7] for number in range(100)])
        _, first = split_pairs(pairs, 0.1, seed=0)
        _, again = split_pairs(pairs[::-1], 0.1, seed=0)
        _, other = split_pairs(pairs, 0.1, seed=-1)
        assert set(first) == set(again)
        assert set(first) != set(other)
        assert [pair.where for pair in first] == ["0", "2", "3", "4", "27", "40", "70", "73", "95", "96"]

    @given(
        st.lists(st.integers(0, 5), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(-(2**63), 2**63 - 1)
    )
    def test_no_prompt_is_on_both_sides(self, prompts, fraction, seed):
        pairs = self.pairs([[prompt] for prompt in prompts])
        if len(set(prompts)) < 2:
            with pytest.raises(
                DataError, match=r"needs at least two different prompts, got 1 in \d+ pairs; give a sepa"
            ):
                split_pairs(pairs, fraction, seed)
            return
        train, held_out = split_pairs(pairs, fraction, seed)
        assert len(train) + len(held_out) == len(pairs)
        assert train
        assert held_out
        assert not {pair.chosen_ids[0] for pair in train} & {pair.chosen_ids[0] for pair in held_out}

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, 2.0, float("nan")])
    def test_fraction(self, fraction):
        with pytest.raises(DataError, match="held-out fraction must be between 0 and 1, got"):
            split_pairs(self.pairs([[1], [2]]), fraction, 0)


class TestRealData:
    @pytest.mark.parametrize("tokenizer_name", ["qwen2.5", "gpt2"])
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("dpo_en.conversational.jsonl", 300),
            ("dpo_zh.conversational.jsonl", 300),
            ("hh_helpful.conversational.jsonl", 1800),
            ("hh_helpful.strings.jsonl", 300),
            ("qa_long_prompts.strings.jsonl", 200),
        ],
    )
    def test_scored_tokens_are_the_responses(self, name, count, tokenizer_name):
        rows, tokenizer = real_rows(name), real_tokenizer(tokenizer_name)
        rows = rows if count < 1000 else rows[:300]
        result = tokenize_pairs(rows, tokenizer, max_length=100_000, chat_template=CHATML)
        report = result.report
        assert (report.pairs_kept, report.skipped, report.tokens_cut) == (len(rows), {}, 0)
        clean = 0
        for row, pair in zip(rows, result.pairs, strict=True):
            assert_sound(pair, 100_000)
            conversational = isinstance(row.values["chosen"], list)
            ending = "<|im_end|>\n" if conversational else tokenizer.eos_token
            wanted = tuple(
                (row.values[key][0]["content"] if conversational else row.values[key]) + ending
                for key in ("chosen", "rejected")
            )
            found = scored(tokenizer, pair)
            clean += found == wanted
            assert all(text.endswith(response) for text, response in zip(found, wanted, strict=True))
        assert clean == len(rows) - report.merged_boundaries
        assert clean >= 0.9 * len(rows)

    def test_chinese_with_the_tokenizers_own_template(self):
        rows, tokenizer = real_rows("dpo_zh.conversational.jsonl"), real_tokenizer("qwen2.5")
        result = tokenize_pairs(rows, tokenizer, max_length=100_000)
        for row, pair in zip(rows, result.pairs, strict=True):
            assert scored(tokenizer, pair)[0].endswith(row.values["chosen"][0]["content"] + "<|im_end|>\n")
        assert result.report.merged_boundaries <= 3

    @pytest.mark.parametrize("truncate_prompts", [False, True])
    def test_truncation(self, truncate_prompts):
        rows, tokenizer = real_rows("qa_long_prompts.strings.jsonl"), real_tokenizer("gpt2")
        whole = tokenize_pairs(rows, tokenizer, max_length=100_000).report
        max_length = int(whole.prompt_tokens.mean)
        result = tokenize_pairs(
            rows, tokenizer, max_length=max_length, truncate_prompts=truncate_prompts, skip_bad_rows=True
        )
        for pair in result.pairs:
            assert_sound(pair, max_length)
        report = result.report
        assert report.pairs_kept + sum(report.skipped.values()) == len(rows) == 200
        assert (report.prompts_cut > 0, "prompt leaves no room" in report.skipped) == (
            truncate_prompts,
            not truncate_prompts,
        )

    def test_both_forms_of_the_same_rows_agree(self):
        tokenizer = real_tokenizer("qwen2.5")
        texts = tokenize_pairs(real_rows("hh_helpful.strings.jsonl"), tokenizer, max_length=100_000).pairs
        talks = tokenize_pairs(real_rows("hh_helpful.conversational.jsonl")[:300], tokenizer, max_length=100_000).pairs
        for text, talk in zip(texts, talks, strict=True):
            for a, b in zip(scored(tokenizer, text), scored(tokenizer, talk), strict=True):
                assert a.removesuffix("<|im_end|>").strip() == b.removesuffix("<|im_end|>\n").strip()

    def test_speed(self):
        rows, tokenizer = real_rows("hh_helpful.conversational.jsonl"), real_tokenizer("qwen2.5")
        start = time.perf_counter()
        tokenize_pairs(rows, tokenizer, max_length=4096)
        assert time.perf_counter() - start < 20  # about 1 s; 100k pairs a minute on a machine left alone
