"""10,000 rows of all formats, most of them damaged: each is an error of ours that names it, or scores answers alone."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.data.tokenization import tokenize_pairs
from tests.engine.support.fuzz import BASES, KEYS, ROLES, TEXTS, HangError, damaged, judge, watched
from tests.engine.support.templates import TEMPLATES
from tests.engine.support.tokenization import bpe_tokenizer
from tests.engine.support.toys import TOKENIZERS, byte_tokenizer

ROWS = 450
"""Of each case below; with those that hypothesis makes, 10,000 in all."""
MADE = 50
SCORES = ("assistant", "last", "all", "assistant")
CASES = [
    (number, name, family)
    for number, (name, family) in enumerate(
        (name, family) for name in ("bytes", "merges", "gpt2", "qwen2.5") for family in TEMPLATES
    )
]


@cache
def tokenizer_of(name: str) -> Any:
    if name == "bytes":
        return byte_tokenizer()
    if name == "merges":
        return bpe_tokenizer()
    if not (TOKENIZERS / name).exists():
        pytest.skip(f"{TOKENIZERS / name} is not here")
    return AutoTokenizer.from_pretrained(str(TOKENIZERS / name))


def judged(values: Any, number: int, name: str, family: str, **changes: Any) -> Any:
    settings = {"score": SCORES[number % 4], "max_length": 96 if number % 3 == 2 else 100_000}
    return judge(values, tokenizer_of(name), TEMPLATES[family], **{**settings, **changes})


@pytest.mark.parametrize(("number", "name", "family"), CASES)
def test_damaged_rows(number, name, family):
    kinds = []
    for row in range(ROWS):
        values = damaged(number * ROWS + row)
        outcome = judged(values, number, name, family)
        assert outcome.fault == "", values
        kinds.append(outcome.kind)
    assert kinds.count("pairs") > ROWS / 10
    assert len(set(kinds)) > 8


TEXT = st.text(max_size=20) | st.sampled_from(TEXTS)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXT})
TALK = st.lists(MESSAGE, max_size=5)
ANSWER = TEXT | TALK | st.builds(lambda text: [{"role": "assistant", "content": text}], TEXT)
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
KEY = st.sampled_from(KEYS)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=8,
)
MADE_ROWS = (
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT})
    | st.fixed_dictionaries({"prompt": TALK, "chosen": ANSWER, "rejected": ANSWER})
    | st.fixed_dictionaries({"prompt": ANSWER, "chosen": ANSWER, "rejected": st.lists(ANSWER, max_size=3)})
    | st.fixed_dictionaries({"chosen": TALK, "rejected": TALK})
    | st.dictionaries(KEY, ANY, max_size=6)
)


@pytest.mark.parametrize(("number", "name", "family"), CASES)
def test_made_rows(number, name, family):
    tokenizer_of(name)

    @seed(number)
    @settings(max_examples=MADE, deadline=None, database=None, suppress_health_check=SLOW)
    @given(values=MADE_ROWS)
    def check(values):
        assert judged(values, number, name, family).fault == ""

    check()


def test_as_many_rows_as_are_claimed():
    assert len(CASES) * (ROWS + MADE) == 10_000


@pytest.mark.parametrize("base", range(len(BASES)))
def test_undamaged_rows(base):
    """All are pairs, but for a format that is unknown, and tools that this template leaves out."""
    values = BASES[base]
    outcome = judged(values, 0, "bytes", "ChatML")
    assert outcome.fault == ""
    refused = "missing key" if "response_1" in values else "left out by the chat template" if "tools" in values else ""
    assert outcome.kind == (refused or "pairs")


def changed(change: Any) -> Any:
    """A tokenization whose pairs are then changed."""

    def tokenize(*arguments: Any, **more: Any) -> Any:
        return SimpleNamespace(pairs=[change(pair) for pair in tokenize_pairs(*arguments, **more).pairs])

    return tokenize


def shifted(pair: TokenPair, by: int, *, scored: bool = False) -> TokenPair:
    """Score one token more, or fewer, of an answer's beginning."""
    if not scored or pair.chosen_scored is None:
        return TokenPair(pair.prompt_length + by, pair.chosen_ids, pair.rejected_ids, pair.where)
    return TokenPair(
        pair.prompt_length, pair.chosen_ids, pair.rejected_ids, pair.where,
        chosen_scored=pair.chosen_scored + by, rejected_scored=pair.rejected_scored,
    )  # fmt: skip


def without_last(pair: TokenPair) -> TokenPair:
    positions = np.arange(pair.prompt_length, len(pair.chosen_ids) - 1)
    return TokenPair(pair.prompt_length, pair.chosen_ids, pair.rejected_ids, pair.where, chosen_scored=positions)


WRONG = {
    "off by one": lambda pair: shifted(pair, -1),
    "a token too few": lambda pair: shifted(pair, 1),
    "the whole prompt": lambda pair: shifted(pair, 1 - pair.prompt_length),
    "without the last token": without_last,
    "exchanged": lambda pair: TokenPair(pair.prompt_length, pair.rejected_ids, pair.chosen_ids, pair.where),
}
PLAIN = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
CHAT = {"prompt": [{"role": "user", "content": "A colour?"}], "chosen": "Blue", "rejected": "Red"}
TURNS = next(base for base in BASES if isinstance(base.get("rejected"), list) and len(base["rejected"]) == 5)


class TestTheOracleSees:
    """Each with the same rows as they should be as a control."""

    @pytest.mark.parametrize("kind", WRONG)
    @pytest.mark.parametrize("values", [PLAIN, CHAT], ids=["text", "conversation"])
    def test_a_wrong_span(self, kind, values):
        assert judged(values, 0, "bytes", "ChatML").fault == ""
        assert judged(values, 0, "bytes", "ChatML", tokenize=changed(WRONG[kind])).fault != ""

    @pytest.mark.parametrize("family", TEMPLATES)
    @pytest.mark.parametrize("by", [-1, 1])
    def test_turns_off_by_one(self, family, by):
        values = {**TURNS, "prompt": TURNS["prompt"][1:]}
        assert judged(values, 0, "bytes", family).fault == ""
        wrong = changed(lambda pair: shifted(pair, by, scored=True))
        assert "chosen" in judged(values, 0, "bytes", family, tokenize=wrong).fault

    def test_the_whole_prompt_with_merges(self):
        values = {**PLAIN, "prompt": "a prompt of more than a few bytes, twenty of them:"}
        assert judged(values, 0, "merges", "ChatML").fault == ""
        wrong = changed(WRONG["the whole prompt"])
        assert "is scored, but no part of the answer" in judged(values, 0, "merges", "ChatML", tokenize=wrong).fault

    def test_an_error_of_others(self):
        def fails(*_: Any, **__: Any) -> Any:
            raise KeyError("role")

        assert judged(CHAT, 0, "bytes", "ChatML", tokenize=fails).fault == "KeyError: 'role'"

    def test_an_error_that_names_no_row(self):
        from fused_dpo_engine.errors import DataError

        def fails(*_: Any, **__: Any) -> Any:
            raise DataError("no")

        assert judged(CHAT, 0, "bytes", "ChatML", tokenize=fails).fault == "no row is named: no"

    def test_a_hang(self):
        def hangs() -> None:
            while True:
                try:
                    sum(range(1000))
                except Exception:
                    continue

        with pytest.raises(HangError), watched(0.05):
            hangs()
