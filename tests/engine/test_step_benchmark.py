"""The step benchmark: every way scores the same pairs, and counts the slots it says."""

from typing import Any

import pytest

from benchmarks.step import WAYS, measure
from tests.engine.helpers import toy_rows, write_rows


@pytest.fixture(scope="module")
def rows(tiny_llama, tmp_path_factory) -> dict[str, dict[str, Any]]:
    data = write_rows(tmp_path_factory.mktemp("step") / "toy.jsonl", toy_rows(12))
    return {name: measure(name, str(tiny_llama), str(data), 8, 160, "float32", 1) for name in WAYS}


def test_all_ways_score_the_same(rows):
    for row in rows.values():
        assert row["pairs"] == 8
        assert row["tokens"] == rows["shared"]["tokens"]
        # fp32 log-probs, by other batches and other attention.
        assert row["loss"] == pytest.approx(rows["padded"]["loss"], rel=1e-5)
        for mine, theirs in zip(row["logps"], rows["padded"]["logps"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
    assert abs(rows["shared"]["loss"] - 0.6931) > 0.01  # the loss depends on the log-probs


def test_what_each_way_computes(rows):
    tokens = rows["shared"]["tokens"]
    assert rows["shared"]["slots"] < tokens == rows["packed"]["slots"] == rows["packed logits"]["slots"]
    assert rows["padded"]["slots"] == rows["padded logits"]["slots"] > tokens
    assert rows["shared"]["saved_by_sharing"] > 0.2 > rows["packed"]["saved_by_sharing"] == 0
    assert rows["padded"]["padding"] > 0.05
    assert all(row["seconds"] > 0 for row in rows.values())
