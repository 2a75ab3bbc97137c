"""What sets memory and speed sets no result: a table of ways to take the same steps, through the real command.

Elsewhere: accumulation with other losses and uneven steps (test_equivalence), ranks and FSDP2
(distributed/test_equality), passes split for want of memory (test_splitting), compiled backbones (model/test_compile).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import save_file

from fused_dpo_engine.cli import main
from tests.engine.support.runs import without_clock
from tests.engine.support.toys import assert_same_weights, largest_difference, options, read_metrics, read_weights

STEPS = 8
CLOSE = 1e-6
"""Of metrics, relative, and absolute below 1: fp32 sums in another order. The largest that was measured is 3e-7."""
CLOSE_WEIGHTS = 5e-7
"""Of weights, absolute: some units in the last place of the norms, which are around 1; 1.2e-7 was measured."""
COMMON: dict[str, Any] = {
    **{"max_steps": STEPS, "eval_fraction": 0.25, "eval_steps": 4},
    **{"max_length": 30, "tokens_per_batch": 110},
    # With a large epsilon, so that Adam does not enlarge what rounding is left.
    **{"adam_epsilon": 1e-2, "learning_rate": 3e-2, "beta": 0.3},
}


class Way(NamedTuple):
    """One way to take the steps of the run that has COMMON alone."""

    settings: dict[str, Any]
    bits: bool = False
    """Gives the very same bits."""
    close: float = CLOSE
    close_weights: float = CLOSE_WEIGHTS
    shows: str | None = None
    """A metric that tells that the setting acts: it differs from the plain run's."""
    before: tuple[dict[str, Any], ...] = ()
    """Settings of runs that come before in the same folder, such as one that is interrupted."""


WAYS: dict[str, Way] = {
    "again": Way({}, bits=True),
    "small passes": Way({"tokens_per_batch": 60}, shows="micro_batches"),
    "one pass a step": Way({"tokens_per_batch": 4000}, shows="micro_batches"),
    "not shared": Way({"prefix_sharing": False}, shows="packing/shared"),
    "padded": Way({"packing": False}, shows="packing/padding"),
    "padded, small passes": Way({"packing": False, "tokens_per_batch": 60}, shows="micro_batches"),
    # Gradients that are off by the filter's error, which is no rounding: 2.2e-5 and 1.9e-5 were measured.
    "filtered gradients": Way({"grad_mode": "filtered"}, close=5e-5, close_weights=5e-5, shows="head/kept"),
    "a small workspace": Way({"workspace_mib": 1}),
    "checkpointed layers": Way({"gradient_checkpointing": True}, bits=True),
    "activations on the host": Way({"offload_activations": True}, bits=True),
    "both": Way({"gradient_checkpointing": True, "offload_activations": True}, bits=True),
    "saved on the way": Way({"save_steps": 2}, bits=True),
    "checkpoints on the way": Way({"checkpoint_every": 3}, bits=True),
    "a filled store": Way(
        {"reference_store": "{folder}/filled.db", "overwrite": True},
        bits=True,
        before=({"reference_store": "{folder}/filled.db", "tokens_per_batch": 60, "seed": 5},),
    ),
    "resumed": Way(
        {"checkpoint_every": 3, "resume": "{folder}/resumed/checkpoints/step-00000003"},
        bits=True,
        before=({"checkpoint_every": 3},),
    ),
    "overwritten": Way({"overwrite": True}, bits=True, before=({"seed": 5, "max_steps": 2},)),
}


OF_THE_LAYOUT = ("micro_batches", "packing/", "head/")
"""Beginnings of metrics that tell how the steps were taken."""


class Runs:
    """The plain run, and all others as they are asked for."""

    def __init__(self, folder: Path, toy_settings: dict[str, Any]) -> None:
        """Of a model with a peaked softmax, as a trained one has: filtered gradients leave nothing else out."""
        model = shutil.copytree(toy_settings["model"], folder / "peaked")
        weights = read_weights(model)
        weights["lm_head.weight"] *= 16
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        self.folder, self.common = folder, {**toy_settings, "model": model, **COMMON}
        self.plain = self.run("plain")

    def run(self, name: str, **changes: Any) -> Path:
        output = self.folder / name
        given = [argument.format(folder=self.folder) for argument in options(**changes)]
        assert main(["train", *options(**{**self.common, "output": output}), *given]) == 0
        return output

    def differences(self, output: Path) -> tuple[dict[str, float], float]:
        """Of every metric, and of all weights, the largest difference from the plain run."""
        expected, got = (without_clock(read_metrics(folder)) for folder in (self.plain, output))
        found: dict[str, float] = {}
        for before, after in zip(expected, got, strict=True):
            assert before.keys() == after.keys()
            for name, value in before.items():
                if name.startswith(OF_THE_LAYOUT):
                    continue
                off = abs(after[name] - value) / max(1, abs(value))
                found[name] = max(found.get(name, 0), math.inf if math.isnan(off) else off)
        return found, largest_difference(read_weights(output / "model"), read_weights(self.plain / "model"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy_settings) -> Runs:
    return Runs(tmp_path_factory.mktemp("ways"), toy_settings)


@pytest.mark.parametrize("name", WAYS)
def test_the_same_run(runs, name):
    way = WAYS[name]
    for before in way.before:
        runs.run(name, **before)
    output = runs.run(name, **way.settings)
    metrics, weights = runs.differences(output)
    assert {metric: off for metric, off in metrics.items() if off > way.close} == {}
    assert weights < way.close_weights
    if way.bits:
        assert without_clock(read_metrics(output)) == without_clock(read_metrics(runs.plain))
        assert_same_weights(read_weights(output / "model"), read_weights(runs.plain / "model"))
    if way.shows:
        columns = [[line[way.shows] for line in read_metrics(folder)] for folder in (output, runs.plain)]
        assert columns[0] != columns[1]


def test_settings_from_a_file(runs, tmp_path):
    """Of the plain run's own config.json."""
    settings = {**json.loads((runs.plain / "config.json").read_text(encoding="utf-8")), "output": str(tmp_path / "run")}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert main(["train", "--config", str(file)]) == 0
    assert without_clock(read_metrics(tmp_path / "run")) == without_clock(read_metrics(runs.plain))


def test_the_steps_do_something(runs):
    losses = [line["loss"] for line in read_metrics(runs.plain)]
    assert len(losses) == STEPS
    assert max(losses) - min(losses) > 0.01
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "changed", [{"beta": 1.001}, {"seed": 1}, {"max_grad_norm": 0.3}, {"pairs_per_step": 5}], ids=str
)
def test_control_other_runs_are_told_apart(runs, changed):
    metrics, weights = runs.differences(runs.run(f"{changed}", **changed))
    assert max(metrics.values()) > 10 * CLOSE
    assert weights > 10 * CLOSE_WEIGHTS
