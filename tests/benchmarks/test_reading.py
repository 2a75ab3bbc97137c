"""The benchmark of reading chats runs, and its bare calls make the texts that training tokenizes."""

import sys

import pytest

from benchmarks import reading
from tests.engine.support.tokenization import chat_tokenizer
from tests.engine.support.toys import assistant, user, write_rows

ROWS = [
    {"prompt": [user(f"is it {i}?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]} for i in range(3)
]


def test_it_prints_both_times_and_their_ratio(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(reading.AutoTokenizer, "from_pretrained", lambda _: chat_tokenizer())
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(sys, "argv", ["reading", "--model", "m", "--data", str(data), "--rows", "7", "--rounds", "2"])
    reading.main()
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bare", "fused-dpo", "ratio"]
    assert "(7 rows)" in lines[-1]


@pytest.mark.parametrize("work", [reading.bare, reading.ours])
def test_both_tokenize_every_row(work, monkeypatch, tmp_path):
    tokenizer, seen = chat_tokenizer(), []
    render = tokenizer.apply_chat_template

    def counted(messages, **settings):
        seen.append(settings.get("add_generation_prompt", False))
        return render(messages, **settings)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    work(write_rows(tmp_path / "rows.jsonl", ROWS), tokenizer)
    assert seen.count(True) == len(ROWS)
    assert seen.count(False) in (2 * len(ROWS), 2 * len(ROWS) + 1)  # one more finds out whether the template is Jinja
