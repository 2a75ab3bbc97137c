"""Tokenization of generated texts and of real preference data."""

import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from tests.engine.support.tokenization import (
    assert_sound,
    bpe_tokenizer,
    chat_tokenizer,
    decode,
    make_rows,
    scored,
    strings,
)
from tests.engine.support.toys import CHATML, PREFERENCES, TOKENIZERS, assistant, user


class TestProperties:
    TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab 你好"), max_size=12)

    @settings(max_examples=150, deadline=None)
    @given(prompt=TEXT, chosen=TEXT, rejected=TEXT, bos=st.booleans(), eos=st.booleans())
    def test_scored_tokens_hold_the_response(self, prompt, chosen, rejected, bos, eos):
        tokenizer = bpe_tokenizer(bos, eos)
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
        (*whole, _) = tokenize_pairs(rows, bpe_tokenizer(True), max_length=1000, **settings).pairs
        (*cut, _) = tokenize_pairs(rows, bpe_tokenizer(True), max_length=max_length, **settings).pairs
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


@cache
def real_tokenizer(name):
    path = TOKENIZERS / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return AutoTokenizer.from_pretrained(path)


@cache
def real_rows(name):
    path = PREFERENCES / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return read_rows(path)


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
