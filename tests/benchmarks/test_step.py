"""The step benchmark: every way scores the same pairs, counts the slots it says, and a wrong one gets no time."""

import dataclasses
import importlib
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import step
from benchmarks.reporting import records
from benchmarks.step import WAYS, build_step, compare, examine, gpu_rows, step_cases
from benchmarks.steps import trl as trl_step
from benchmarks.steps import ways as step_ways
from benchmarks.steps.random_model import build_random_policy, token_pairs
from benchmarks.steps.ways import OURS, Case, OwnStep, Way, true_logps
from fused_dpo import head_of
from fused_dpo_engine.config.options import ModelOptions
from tests.engine.support.toys import toy_rows, write_rows

ROOT = Path(__file__).parents[2]
HERE = [way for way in WAYS if way in OURS or find_spec("trl")]
"""Ways that can be measured here."""
TINY = Case("random:llama-tiny", "hh_helpful", pairs=4, budget=2048)


@pytest.fixture(scope="module")
def case(tiny_llama, tmp_path_factory) -> Case:
    data = write_rows(tmp_path_factory.mktemp("step") / "toy.jsonl", toy_rows(12))
    return Case(str(tiny_llama), str(data), 8, 160, "float32")


@pytest.fixture(scope="module")
def true(case) -> list[list[float]]:
    return true_logps(case)


@pytest.fixture(scope="module")
def rows(case, true) -> dict[str, dict[str, Any]]:
    return {way: examine(case, way, true)[0] for way in HERE}


@pytest.fixture(scope="module")
def true_of_tiny() -> list[list[float]]:
    return true_logps(TINY)


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_score_the_same(case, true, way):
    if way not in HERE:
        pytest.skip("trl is not installed")
    taken = build_step(case, way, true)
    outcome = taken()
    # float32 sums in other orders: 4 eps.
    torch.testing.assert_close(outcome.logps, torch.tensor(true), rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    assert float(outcome.loss) == pytest.approx(math.log(2), rel=1e-5)
    again = taken()
    assert torch.equal(again.logps, outcome.logps)  # no optimizer, and nothing left from the step before


def test_the_loss_depends_on_the_log_probs(case, true):
    zeros = OwnStep(case, OURS["shared"], case.token_pairs(), torch.zeros(8, 2))
    chosen, rejected = torch.tensor(true).unbind(1)
    loss = -torch.nn.functional.logsigmoid(step_ways.BETA * (chosen - rejected)).mean()
    assert float(zeros().loss) == pytest.approx(float(loss), rel=1e-5)
    assert abs(float(loss) - math.log(2)) > 0.01


def test_all_ways_have_the_same_gradient(rows):
    for row in rows.values():
        assert row["grad_norm"] == pytest.approx(rows["padded logits"]["grad_norm"], rel=1e-3)
        assert row["grad_norm"] > 0.01


def test_what_each_way_computes(rows):
    tokens = rows["shared"]["tokens"]
    for row in rows.values():
        assert row["pairs"] == 8
        assert row["tokens"] == tokens
    assert rows["shared"]["slots"] < tokens == rows["packed"]["slots"] == rows["packed logits"]["slots"]
    assert rows["padded"]["slots"] == rows["padded logits"]["slots"] > tokens
    assert rows["shared"]["saved_by_sharing"] > 0.2 > rows["packed"]["saved_by_sharing"] == 0
    assert rows["padded"]["padding"] > 0.05


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_trl_batches_keep_to_the_slots(case, rows):
    row = rows["TRL"]
    lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in case.token_pairs()]
    size = row["pairs_per_batch"]
    widths = [max(lengths[start : start + size]) for start in range(0, 8, size)]
    assert all(2 * size * width <= case.budget for width in widths)
    assert row["forward_passes"] == len(widths)
    with pytest.raises(ValueError, match="more than 10 token slots"):
        trl_step.batch_size(case.token_pairs(), 10)


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_trl_scores_what_counts_alone_where_it_is_told_to(case, true, monkeypatch):
    """Rows that its head is given: all positions of the padded batches, or the scored ones."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    given = []
    own = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", lambda *args: given.append(len(args[0])) or own(*args))
    counted = {}
    for way in ("TRL", "TRL, compact"):
        given.clear()
        row, _ = examine(case, way, true)
        assert "failed" not in row
        counted[way] = sum(given)
    pairs = case.token_pairs()
    assert counted["TRL, compact"] == sum(pair.chosen_length + pair.rejected_length for pair in pairs)
    assert counted["TRL"] == row["slots"] - 2 * len(pairs)


def without_last_token(policy: Any, batch: Any) -> Tensor:
    """Wrong: nothing predicts the end of a response."""
    targets = batch.targets.clone()
    targets[batch.cu_scored[1:].long() - 1] = 0
    return policy(dataclasses.replace(batch, targets=targets)).logps


def without_position_resets(policy: Any, batch: Any) -> Tensor:
    """Wrong: one sequence's positions continue those of the one before."""
    positions = torch.arange(batch.num_slots)[None]
    return policy(dataclasses.replace(batch, position_ids=positions)).logps


@pytest.mark.parametrize("score", [without_last_token, without_position_resets])
def test_a_wrong_way_gets_no_time(case, true, monkeypatch, score):
    monkeypatch.setitem(OURS, "wrong", Way({}, score))
    row, taken = examine(case, "wrong", true)
    assert taken is None
    assert "token_logp_rms_nat" in row["failed"]
    assert "median_s" not in step.measure(case, "wrong", true, 1)


def test_a_wrong_way_gets_no_time_in_bfloat16(true_of_tiny, monkeypatch):
    monkeypatch.setitem(OURS, "wrong", Way({}, without_last_token))
    assert "failed" in examine(TINY, "wrong", true_of_tiny)[0]
    assert step.wrong({"token_logp_rms_nat": math.nan, "worst_difference_per_root_token": 0.0}, "bfloat16")


def test_trl_not_installed(case, true, monkeypatch):
    monkeypatch.setattr(trl_step, "find_spec", lambda name: None)
    row, taken = examine(case, "TRL", true)
    assert (row["id"], row["failed"], taken) == (f"step/{case.name}/TRL", "trl is not installed", None)


def test_the_random_model_has_realistic_logits():
    policy = build_random_policy(ModelOptions(TINY.model, dtype="float32"), torch.device("cpu"), packing=False)
    pair = token_pairs("llama-tiny", "hh_helpful", 1, 1024)[0]
    inputs = torch.from_numpy(pair.chosen_ids).long()[None]
    with torch.no_grad():
        hidden = policy.causal_lm.base_model(input_ids=inputs).last_hidden_state[0]
        entropy = torch.distributions.Categorical(logits=hidden @ head_of(policy.model).weight.T).entropy().mean()
    assert 1.5 < entropy < 3.5 < math.log(policy.causal_lm.config.vocab_size) / 2


def test_the_random_model_through_all_of_it(true_of_tiny):
    taken = build_step(TINY, "shared", true_of_tiny)
    assert isinstance(taken, OwnStep)
    taken()
    assert taken.describe()["kept_fraction"] < 0.25
    for layer in taken.model.causal_lm.base_model.layers:
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
    exact, logits = (examine(TINY, way, true_of_tiny)[0] for way in ("packed, exact", "padded logits"))
    assert exact["kept_fraction"] == 1
    assert exact["token_logp_rms_nat"] < 1e-3 < logits["token_logp_rms_nat"]  # the head's rounding is all there is


def test_the_gradient_passes_through_the_replay_unchanged():
    policy = build_random_policy(ModelOptions(TINY.model, dtype="float32"), torch.device("cpu"), packing=False)
    norm = policy.causal_lm.base_model.norm
    backbone: list[Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: (output.retain_grad(), backbone.append(output))[0])
    hidden = policy.causal_lm.base_model(input_ids=torch.tensor([[5, 1029, 6]])).last_hidden_state
    assert torch.equal(hidden[0, 0], hidden[0, 1])  # the ids are the same modulo the hidden states replayed
    assert not torch.equal(hidden[0, 0], hidden[0, 2])
    upstream = torch.randn_like(hidden)
    hidden.backward(upstream)
    assert not torch.equal(backbone[0], hidden)
    assert backbone[0].grad is not None
    assert torch.equal(backbone[0].grad, upstream)


def test_pairs_of_a_random_model():
    pairs = token_pairs("llama-tiny", "hh_helpful", 8, 1024)
    assert [(p.prompt_length, p.chosen_length, p.rejected_length) for p in pairs[:2]] == [(43, 46, 180), (124, 72, 67)]
    for pair in pairs:
        assert pair.chosen_ids[: pair.prompt_length].tolist() == pair.rejected_ids[: pair.prompt_length].tolist()
        assert 0 <= pair.chosen_ids.min() <= pair.chosen_ids.max() < 16384
    for pair in token_pairs("llama-tiny", "hh_helpful", 4, 100):
        assert max(len(pair.chosen_ids), len(pair.rejected_ids)) <= 100
    with pytest.raises(ValueError, match="has 128 pairs of at most 4096 tokens a sequence, not 200"):
        token_pairs("llama-tiny", "hh_helpful", 200, 4096)
    with pytest.raises(ValueError, match="one of hh_helpful, qa_long_prompts, dpo_en, got 'other'"):
        token_pairs("llama-tiny", "other", 8, 4096)
    with pytest.raises(ValueError, match="random:llama-1b, random:llama-tiny"):
        token_pairs("llama-9b", "hh_helpful", 8, 4096)


def test_names_of_cases(monkeypatch):
    assert Case("/models/Small", "/data/hh.conversational.jsonl").name == "Small-hh-16pairs"
    assert dataclasses.replace(TINY, dtype="float32").name == "random:llama-tiny-hh_helpful-4pairs-2048slots-float32"
    monkeypatch.setattr(step, "compute_dtype", lambda device: "bfloat16" if device == "cuda" else "float32")
    large = step_cases("random:llama-1b", (), full=False, device="cuda")
    assert [case.name for case in large] == ["random:llama-1b-hh_helpful-64pairs-16384slots"]


def test_rows_are_written_and_read_back(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "isolated", lambda function, *arguments: function(*arguments))
    measured = compare(TINY.model, TINY.data, 2, 2048, "bfloat16", 2, ("shared", "padded"))
    assert "one step on 2 pairs" in capsys.readouterr().out
    records.write(tmp_path / "step.json", measured)
    read = records.read(tmp_path / "step.json").rows
    assert list(read) == [f"step/random:llama-tiny-hh_helpful-2pairs-2048slots/{way}" for way in ("shared", "padded")]
    for row in read.values():
        assert row["suite"] == "step"
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["tokens_per_s"] == row["tokens"] / row["median_s"]


def test_a_way_that_fails_leaves_the_others(monkeypatch):
    def breaks(policy: Any, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(OURS, "breaks", Way({}, breaks))
    case = dataclasses.replace(TINY, pairs=2)
    monkeypatch.setattr(step, "step_cases", lambda *_, **__: [case])
    monkeypatch.setattr(step, "isolated", lambda function, *arguments: function(*arguments))
    failed, packed = gpu_rows(TINY.model, ways=("breaks", "packed"), rounds=1)
    assert failed["failed"] == "OutOfMemoryError: no room"
    assert packed["median_s"] > 0
    monkeypatch.setattr(step, "step_cases", lambda *_, **__: [dataclasses.replace(case, data="other")])
    (row,) = gpu_rows(TINY.model, ways=("packed",))
    assert "take their lengths from one of" in row["failed"]


def test_through_pytest(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_step.py"]
    command += ["--model", TINY.model, "--results", str(out), "-k", "shared and not exact"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, and takes this process for one by its environment.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=alone)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = records.read(out).rows.values()
    assert row["implementation"] == "shared"
    assert row["tokens_per_s"] > 0
