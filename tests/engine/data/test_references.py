"""Log-probs that rows bring along: which are taken, which are counted and left, and that no column is called unused."""

from typing import Any

import pytest

from fused_dpo_engine.data.pairs import TokenizedPairs
from fused_dpo_engine.data.references import read_brought
from fused_dpo_engine.data.tokenization import tokenize_pairs
from tests.engine.support.tokenization import letter_tokenizer, make_rows, strings

ROW = strings("aef", "gh", "h")


def tokenized(*rows: Any, **settings: Any) -> TokenizedPairs:
    return tokenize_pairs(make_rows(*rows), letter_tokenizer(), **{"max_length": 100, **settings})


@pytest.mark.parametrize(
    "names",
    [
        ("ref_chosen_logps", "ref_rejected_logps"),
        ("reference_chosen_logps", "reference_rejected_logps"),
        ("Ref_Chosen_Logps", "REF_REJECTED_LOGPS"),
    ],
)
@pytest.mark.parametrize("values", [(-1.5, -2), ("-1.5", "-2.0")])
def test_names_and_types(names: tuple[str, str], values: tuple[Any, Any]) -> None:
    result = tokenized({**ROW, **dict(zip(names, values, strict=True))}, ROW)
    assert [pair.reference for pair in result.pairs] == [(-1.5, -2.0), None]
    assert (result.report.brought, result.report.brought_taken, result.report.unused_columns) == (1, 1, ())
    assert "reference log-probs: 1 pairs bring theirs\n" in result.report.summary()


def test_without_such_columns_nothing_is_said() -> None:
    result = tokenized({**ROW, "ref_chosen_logps": None})
    assert result.report.brought == 0
    assert "reference log-probs" not in result.report.summary()
    assert read_brought({"prompt": "a", "ref_model": 3}) is None


def test_newer_names_come_first() -> None:
    both = {"reference_chosen_logps": -8, "reference_rejected_logps": -9, "ref_chosen_logps": -1}
    assert read_brought({**both, "ref_rejected_logps": -2}) == ((-1, -2), {*both, "ref_rejected_logps"})
    assert read_brought(both) == ((-8, -9), set(both)), "of those that are complete"


@pytest.mark.parametrize(
    "columns",
    [
        {"ref_chosen_logps": -1.0},
        {"ref_chosen_logps": -1.0, "ref_rejected_logps": float("nan")},
        {"ref_chosen_logps": -1.0, "ref_rejected_logps": float("-inf")},
        {"ref_chosen_logps": -1.0, "ref_rejected_logps": [-1.0, -2.0]},
        {"ref_chosen_logps": True, "ref_rejected_logps": -1.0},
        {"ref_chosen_logps": "much", "ref_rejected_logps": -1.0},
        {"ref_chosen_logps": -1.0, "ref_rejected_logps": 0.5},
    ],
)
def test_what_is_no_pair_of_log_probs_is_counted(columns: dict[str, Any]) -> None:
    result = tokenized({**ROW, **columns})
    assert result.pairs[0].reference is None
    assert (result.report.brought, result.report.brought_taken, result.report.unused_columns) == (1, 0, ())
    assert "1 pairs bring theirs, 1 cannot be taken" in result.report.summary()


class TestOtherTokens:
    """Numbers of tokens that are not those that are scored here."""

    def left(self, row: dict[str, Any], **settings: Any) -> bool:
        result = tokenized({**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, **settings)
        assert result.report.brought == len(result.pairs)
        assert result.report.brought_taken == sum(pair.reference is not None for pair in result.pairs)
        return result.report.brought_taken == 0

    def test_a_cut_response(self) -> None:
        assert self.left(strings("aef", "ghghgh", "h"), max_length=6)
        assert not self.left(strings("aef", "ghghgh", "h"), max_length=9)

    def test_a_cut_prompt(self) -> None:
        assert self.left(strings("aefefefef", "gh", "h"), max_length=8, truncate_prompts=True)
        assert not self.left(strings("aefefefef", "gh", "h"), max_length=12, truncate_prompts=True)

    def test_a_merged_boundary(self) -> None:
        assert self.left(strings("efa", "bcg", "h"))

    def test_several_answers(self) -> None:
        assert self.left({**strings("aef", "gh", "h"), "rejected": ["h", "e"]})


def test_columns_of_other_names() -> None:
    """As all columns, by --columns."""
    columns = {"ref_chosen_logps": "mine", "ref_rejected_logps": "other"}
    result = tokenized({**ROW, "mine": -3.0, "other": -4.0}, columns=columns)
    assert result.pairs[0].reference == (-3.0, -4.0)
