"""Pairs written out for a person to look at."""

from fused_dpo_engine.cli import main
from fused_dpo_engine.reports.rows import show_pairs
from tests.engine.support.templates import CHATML
from tests.engine.support.tokenization import bpe_tokenizer, strings, tokenize_one
from tests.engine.support.toys import assistant, options, user, write_rows

TALK = {
    "prompt": [user("a\nb")],
    "chosen": [assistant("ab")],
    "rejected": [assistant("ba"), user("Why?"), assistant("")],
}
SHOWN = """\
pairs.jsonl:1: {} prompt tokens, {} and {} scored
  prompt
    <|im_start|>user↵
    a↵
    b<|im_end|>↵
    <|im_start|>assistant↵
  chosen
    ⟦ab<|im_end|>↵⟧
  rejected
    ⟦ba<|im_end|>↵⟧
    <|im_start|>user↵
    Why?<|im_end|>↵
    <|im_start|>assistant↵
    ⟦<|im_end|>↵⟧
"""


def test_prompt_answers_and_what_is_scored():
    pair = tokenize_one(TALK, bpe_tokenizer(), 500, chat_template=CHATML)
    shown = show_pairs([pair], bpe_tokenizer()).plain
    assert shown == SHOWN.format(pair.prompt_length, pair.chosen_length, pair.rejected_length)


def test_what_follows_from_score_is_seen():
    pair = tokenize_one(TALK, bpe_tokenizer(), 500, chat_template=CHATML, score="all")
    assert "<|im_end|>↵\n    <|im_start|>user↵\n    Why?" in show_pairs([pair], bpe_tokenizer()).plain


def test_a_prompt_that_merges_with_the_answer_shows_where_it_is_cut():
    pair = tokenize_one(strings("the prom", "pt", "x"), bpe_tokenizer(), 500)
    text = show_pairs([pair], bpe_tokenizer()).plain
    assert f"⟦{bpe_tokenizer().decode(pair.chosen_ids[pair.prompt_length :])}⟧" in text


class TestCommand:
    def show(self, capfd, tiny_llama, data, *more):
        status = main(["plan", *options(model=tiny_llama, data=data), *more])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    def test_so_many_pairs(self, capfd, tiny_llama, tmp_path):
        rows = [{"prompt": f"is it {i}? ", "chosen": "yes", "rejected": "no"} for i in range(4)]
        data = write_rows(tmp_path / "rows.jsonl", rows)
        _, none, _ = self.show(capfd, tiny_llama, data)
        assert "scored" not in none
        status, two, _ = self.show(capfd, tiny_llama, data, "--show", "2")
        assert status == 0
        assert two.count(" scored\n") == 2
        assert "rows.jsonl:2: " in two

    def test_columns_and_score_are_options(self, capfd, tiny_llama, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", [{"ask": "is it? ", "chosen": "yes", "rejected": "no", "id": "1"}])
        status, out, _ = self.show(capfd, tiny_llama, data, "--columns", "prompt=ask", "--show", "1", "--score", "last")
        assert status == 0
        assert "columns not used: id" in out
        status, _, err = self.show(capfd, tiny_llama, data, "--columns", "prompt")
        assert (status, "columns takes pairs of a name and a column" in err) == (2, True)

    def test_a_negative_number(self, capfd, tiny_llama, toy_data):
        try:
            status = main(["plan", *options(model=tiny_llama, data=toy_data), "--show", "-1"])
        except SystemExit as ended:  # newer releases of tyro end there
            status = ended.code
        assert status == 2
        assert "show must be 0 (none) or positive" in capfd.readouterr().err
