"""What tokenization cuts to fit, which rows it drops, and the report that says so."""

import json
import logging

import pytest
from transformers import PreTrainedTokenizerFast

from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.errors import DataError
from tests.engine.support.tokenization import (
    assert_sound,
    bpe_tokenizer,
    decode,
    letter_tokenizer,
    make_rows,
    strings,
    tokenize_one,
)


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
        tokenizer = bpe_tokenizer(bos=True)
        pair = tokenize_one(strings("z" * 50, "x", "y"), tokenizer, max_length=10, truncate_prompts=True)
        assert decode(tokenizer, pair.chosen_ids) == "<s>zzzzzzzx</s>"
        assert pair.prompt_length == 8

    @pytest.mark.parametrize("max_length", [4, 3])
    def test_a_prompt_that_leaves_no_room(self, max_length):
        values = strings("efef", "gggg", "hh")
        message = (
            rf"^pairs\.jsonl:1: the prompt's 4 tokens leave no room .* max_length {max_length}; .*--truncate-prompts"
        )
        with pytest.raises(DataError, match=message) as caught:
            self.run(values, max_length=max_length)
        assert caught.value.reason == "prompt leaves no room"
        self.run(values, max_length=max_length, truncate_prompts=True)

    def test_identical_after_truncation(self):
        message = (
            r"^pairs\.jsonl:1: chosen and rejected agree in all of the first max_length 6 tokens; raise --max-length"
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
        plain = tokenize_pairs(rows[:1], bpe_tokenizer(), max_length=100).report.summary()
        # Nothing skipped and nothing cut: no lines about that.
        assert len(plain.splitlines()) == 5
        assert "1 prompts merge" in plain

    def test_progress_bar(self, capsys):
        tokenize_pairs(make_rows(strings("ef", "g", "h")), letter_tokenizer(), max_length=9)
        assert capsys.readouterr().err == ""
        tokenize_pairs(make_rows(strings("ef", "g", "h")), letter_tokenizer(), max_length=9, progress=True)
        assert "tokenizing: 100%" in capsys.readouterr().err
