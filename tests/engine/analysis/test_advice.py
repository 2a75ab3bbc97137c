"""What is advised: nothing where it fits, the largest saving first, and no more than helps."""

from typing import Any

import pytest

from fused_dpo_engine.analysis.advice import advise, largest_batch, rank, sentence
from fused_dpo_engine.analysis.memory import GIB, ModelShape, estimate_memory, shape_of
from tests.engine.support.published import config_of


@pytest.fixture(scope="module")
def one_b() -> ModelShape:
    return shape_of("1B", config_of("Llama-3.2-1B"))


def test_what_fits_stays(one_b):
    advice = advise(one_b, {"gradient_checkpointing": True}, 80 * GIB)
    assert advice.fits
    assert advice.changes == []
    assert sentence(advice, 80 * GIB).startswith("It fits")


def test_changes_until_it_fits(one_b):
    advice = advise(one_b, {"gpus": 2}, 24 * GIB)
    assert advice.fits
    changed = {name: value for change in advice.changes for name, value in change.settings.items()}
    assert estimate_memory(one_b, gpus=2, **changed).fits(24 * GIB)
    fewer = {name: value for change in advice.changes[:-1] for name, value in change.settings.items()}
    assert not estimate_memory(one_b, gpus=2, **fewer).fits(24 * GIB), "the last change is needed"
    assert all(change.option in sentence(advice, 24 * GIB) for change in advice.changes)


def test_nothing_helps(one_b):
    advice = advise(one_b, {}, GIB)
    assert not advice.fits
    assert "does not fit, nor with" in sentence(advice, GIB)


def test_the_largest_saving_comes_first(one_b):
    changes = rank(one_b, {"gpus": 4})
    assert [change.saves for change in changes] == sorted((change.saves for change in changes), reverse=True)
    assert {"--gradient-checkpointing", "--optimizer adamw8bit", "--strategy fsdp2"} <= {c.option for c in changes}
    now = estimate_memory(one_b, gpus=4).peak_bytes
    for change in changes:
        settings = {"gpus": 4, **change.settings}
        assert now - estimate_memory(one_b, **settings).peak_bytes == change.saves


def test_on_a_cpu_nothing_moves_to_the_host(one_b):
    for settings in ({"cuda": False}, {"cuda": False, "gradient_checkpointing": True}):
        assert not any("offload" in change.option for change in rank(one_b, settings))
        assert any("offload" in change.option for change in rank(one_b, settings | {"cuda": True}))


def test_largest_batch(one_b):
    settings: dict[str, Any] = {"gradient_checkpointing": True}
    tokens = largest_batch(one_b, settings, 40 * GIB)
    assert tokens % 1024 == 0
    assert estimate_memory(one_b, **settings, tokens_per_batch=tokens).fits(40 * GIB)
    assert not estimate_memory(one_b, **settings, tokens_per_batch=tokens + 1024).fits(40 * GIB)
    assert largest_batch(one_b, settings, GIB) == 0
