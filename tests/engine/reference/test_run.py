"""A run's reference from a store, through the real command: what is scored again and what is not, kills, full disks."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.support.references import counted, overwrite, stored
from tests.engine.support.runs import LN2, without_clock
from tests.engine.support.toys import (
    assert_same_weights,
    options,
    read_metrics,
    read_weights,
    save_folder,
    toy_rows,
    write_rows,
)
from tests.fresh_process import ROOT

FOUND = re.compile(r"reference store \S+: (\d+) of (\d+) pairs found")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def run(train, store, tmp_path):
    """One run with the store, of four steps of six pairs, which is all data; what it counted, and what it said."""

    def call(name: str = "run", **settings: Any):
        settings = {"max_steps": None, "reference_store": store, "output": tmp_path / name, **settings}
        with counted() as counts:
            outcome = train(**settings)
        assert outcome.status == 0, outcome.err
        match = FOUND.search(outcome.err)
        return counts, tuple(map(int, match.groups())) if match else None, outcome.err

    return call


def test_a_second_run_scores_nothing(run, tmp_path: Path) -> None:
    """And is the same run, bit for bit, but for the pairs that it tries; the first one is that of no store."""
    first, found, err = run("first")
    assert (first.scored, found) == ([24], (0, 24))
    plain, found, _ = run("plain", reference_store=None)
    assert (plain.scored, found) == ([24], None)
    again, found, err = run("again")
    assert (again.scored, found) == ([], (24, 24))
    assert again.without_gradients == 2 < first.without_gradients, "set-up test, and a few pairs of the first step"
    assert "sequences computed again, at most 0 nat apart; their loss is within 0.0e+00 of ln 2" in err
    assert without_clock(read_metrics(tmp_path / "again")) == without_clock(read_metrics(tmp_path / "first"))
    for name in ("again", "plain"):
        assert_same_weights(read_weights(tmp_path / name / "model"), read_weights(tmp_path / "first/model"))
    assert read_metrics(tmp_path / "again")[0]["loss"] == pytest.approx(LN2, abs=5e-7)


def test_what_is_no_part_of_a_log_prob_scores_nothing_again(run) -> None:
    run(eval_fraction=0.2)
    for number, change in enumerate(
        (
            {"learning_rate": 1e-2, "seed": 9, "eval_fraction": 0.4},
            {"tokens_per_batch": 200, "pairs_per_step": 5},
            {"batches_per_step": 2},
            {"prefix_sharing": False},
            {"packing": False},
            {"loss_type": "ipo", "beta": 0.3, "grad_mode": "filtered", "workspace_mib": 1},
            {"lora_rank": 2},
            {"gradient_checkpointing": True, "epochs": 2},
            {"max_steps": 1},
        )
    ):
        counts, found, err = run(f"{number}", **change)
        assert counts.scored == [], change
        assert found in ((24, 24), (6, 6)), change
        assert "computed again, at most" in err


def test_what_is_a_part_of_it_does(run, tiny_llama: Path, tmp_path: Path, store: Path) -> None:
    rows = toy_rows(24)
    run()
    rows[3]["chosen"] += "!"
    counts, found, _ = run("row", data=write_rows(tmp_path / "changed.jsonl", rows))
    assert (counts.scored, found) == ([1], (23, 24))
    counts, found, err = run("dtype", dtype="bfloat16")
    assert (counts.scored, found) == ([24], (0, 24))
    assert "of this model it has 49 sequences with dtype float32" in err
    other = save_folder(tmp_path / "other", seed=1)
    counts, found, err = run("of another", model=other)
    assert (counts.scored, found) == ([24], (0, 24))
    assert "of this model" not in err
    counts, found, _ = run("shorter", max_length=24)
    assert 0 < found[0] < 24
    assert counts.scored == [24 - found[0]]
    counts, found, _ = run("ld", ld_alpha=0.5)
    assert 0 < counts.scored[0] < 24, "pairs of equal lengths are as they were"
    assert run("ld again", ld_alpha=0.5)[0].scored == []


def test_a_reference_of_its_own_is_not_loaded(run, tiny_llama: Path, tmp_path: Path) -> None:
    frozen = save_folder(tmp_path / "frozen", seed=3)
    first, _, _ = run("first", ref_model=frozen)
    assert first.loaded == [str(frozen), str(tiny_llama)]
    again, found, err = run("again", ref_model=frozen)
    assert (again.loaded, again.scored, found) == ([str(tiny_llama)], [], (24, 24))
    assert again.without_gradients == 1, "the set-up test"
    assert "the model is not loaded, as nothing is missing" in err
    assert without_clock(read_metrics(tmp_path / "again")) == without_clock(read_metrics(tmp_path / "first"))
    # One pair more, and it is there, and tried as well.
    rows = write_rows(tmp_path / "more.jsonl", toy_rows(25))
    more, found, err = run("more", ref_model=frozen, data=rows)
    assert (more.loaded, more.scored, found) == ([str(frozen), str(tiny_llama)], [1], (24, 25))
    assert "computed again, at most" in err
    assert "ln 2" not in err, "it is another model than the policy"
    # The same model under both names is one scorer.
    same, found, _ = run("same", model=frozen)
    assert (same.scored, found) == ([], (24, 24))


def test_held_out_pairs_are_kept_too(run, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", toy_rows(40)[24:])
    first, found, _ = run("first", eval_data=held_out)
    assert (first.scored, found) == ([24, 16], (0, 40))
    again, found, _ = run("again", eval_data=held_out)
    assert (again.scored, found) == ([], (40, 40))


def test_pairs_that_a_short_run_does_not_see_are_not_scored(run) -> None:
    counts, found, _ = run("short", max_steps=2)
    assert (counts.scored, found) == ([12], (0, 12))
    counts, found, _ = run("long")
    assert (counts.scored, found) == ([12], (12, 24))


def test_entries_of_another_model_are_refused(run, train, store: Path, tmp_path: Path) -> None:
    """With checks that fit, so that the file alone does not tell; rounding is let through."""
    run("first")
    overwrite(store, 1e-5)
    _, _, err = run("rounding")
    worst = re.search(r"at most (\S+) nat apart; their loss is within (\S+) of ln 2", err)
    assert worst is not None
    assert 9e-6 < float(worst[1]) < 2e-5
    overwrite(store, 0.5)
    outcome = train(reference_store=store, output=tmp_path / "refused")
    assert outcome.status == 2
    assert "has other log-probs than this model gives" in outcome.message
    assert "0.5 nat apart, and rounding explains" in outcome.message
    assert not (tmp_path / "refused").exists(), "it ends before the run's folder is made"
    overwrite(store, -1e30)
    outcome = train(reference_store=store, output=tmp_path / "refused")
    assert outcome.status == 2
    assert "1e+30 nat apart" in outcome.message


def test_a_damaged_store_is_named(train, store: Path) -> None:
    store.write_bytes(b"no database" * 1000)
    outcome = train(reference_store=store)
    assert outcome.status == 2
    assert f"{store} is no reference store" in outcome.message


def test_lengths_are_checked(run, train, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr("fused_dpo_engine.reference.kept.sequence_keys", lambda pair, _: ordered.pop(0))
    ordered = sorted(stored(store))
    ordered = list(zip(ordered[::2], ordered[1::2], strict=True))
    outcome = train(reference_store=store, max_steps=None, output=store.with_name("other"))
    assert outcome.status == 2
    assert "is damaged: it has" in outcome.message


def test_a_loss_without_reference(train, store: Path) -> None:
    outcome = train(reference_store=store, loss_type="simpo", beta=2.0)
    assert outcome.status == 2
    assert "simpo takes no reference; leave out --reference-store" in outcome.message


KILLED = """
import os, signal, sys
from fused_dpo_engine.cli import main
from fused_dpo_engine.reference.store import Store
add, calls = Store.add, []

def counted(self, *arguments):
    result = add(self, *arguments)
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

Store.add = counted
sys.exit(main(sys.argv[2:]))
"""
FULL = """
import resource, sys
from fused_dpo_engine.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def in_a_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join(str(ROOT / part) for part in ("kernels", "engine", ""))
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": roots}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_killed_in_the_middle_of_a_pass(toy_settings, run, store: Path, tmp_path: Path) -> None:
    """Three times: every start goes on where the last one was, and what comes of it is the run of one go."""
    arguments = options(**{**toy_settings, "max_steps": None, "reference_store": store, "output": tmp_path / "killed"})
    seen = []
    for passes in (1, 2, 1):
        finished = in_a_process(KILLED, str(passes), "train", *arguments)
        assert finished.returncode == -signal.SIGKILL, finished.stderr
        seen.append(len(stored(store)))
    assert 0 < seen[0] < seen[1] < seen[2] < 48
    counts, found, _ = run("last")
    assert found is not None
    assert counts.scored == [24 - found[0]]
    assert len(stored(store)) == 48
    whole = store.with_name("whole.db")
    run("whole", reference_store=whole)
    assert stored(store).keys() == stored(whole).keys()
    first_losses = [read_metrics(tmp_path / name)[0]["loss"] for name in ("last", "whole")]
    assert first_losses[0] == pytest.approx(first_losses[1], abs=1e-6)


def test_a_full_disk_costs_the_store_and_not_the_run(toy_settings, run, store: Path, tmp_path: Path) -> None:
    """Model and metrics go elsewhere; here the limit is on every file, so that the run fails when it saves its model.

    What matters is before that: all steps are taken.
    """
    settings = {**toy_settings, "max_steps": None, "reference_store": store, "output": tmp_path / "full"}
    finished = in_a_process(FULL, "33000", "train", *options(**settings))
    assert "cannot be written" in finished.stderr
    assert "log-probs are not in the store" in finished.stderr
    assert json.loads((tmp_path / "full/summary.json").read_text())["steps"] == 4
    counts, found, _ = run("after")
    assert found is not None
    assert counts.scored == [24 - found[0]]
    assert run("again")[0].scored == []


def test_the_command_fails_where_nothing_can_be_kept(toy_settings, store: Path) -> None:
    names = ("model", "data", "max_length", "tokens_per_batch", "dtype", "device")
    arguments = options(**{name: toy_settings[name] for name in names}, store=store)
    finished = in_a_process(FULL, "33000", "reference", *arguments)
    assert finished.returncode == 1
    assert re.search(r"could not be written: .*; free some space", finished.stderr)
