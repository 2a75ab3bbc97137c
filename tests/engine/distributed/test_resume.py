"""Runs on several processes that go on from a checkpoint: the same bits on as many, the same run on others."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.errors import UserError
from tests.engine.support.ranks import asked_to_stop, read_digests, run_cases
from tests.engine.support.runs import without_clock
from tests.engine.support.toys import (
    assert_same_weights,
    largest_difference,
    options,
    read_metrics,
    read_weights,
    save_folder,
    toy_rows,
    write_rows,
)

CLOSE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}
"""As in test_equality, of pair metrics."""
CLOSE_WEIGHTS = 1e-6
HOW: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "split": {"tensor_parallel": 2},
    "offload": {"offload": True},
    "8-bit": {"strategy": "fsdp2", "optimizer": "adamw8bit"},
    "running mean": {"strategy": "ddp", "loss_type": "bco_pair"},
    "LoRA": {"strategy": "fsdp2", "lora_rank": 2},
}
"""On two ranks."""
ONE = {"strategy": "auto", "tensor_parallel": 1}
FROM_ONE = ("ddp", "fsdp2", "split")
TO_FOUR = {"fsdp2 to four": {"strategy": "fsdp2"}, "fsdp2 to four, split": {"strategy": "fsdp2", "tensor_parallel": 2}}


class Runs:
    """Whole runs, runs that were asked to stop after step 3, and how those went on."""

    def __init__(self, folder: Path, toy_settings: dict[str, Any]) -> None:
        self.folder, self.model = folder, folder / "model"
        common = {"learning_rate": 3e-2, "adam_epsilon": 1e-2, "eval_fraction": 0.25, "eval_steps": 2, "max_steps": 5}
        self.common = {**toy_settings, "data": folder / "toy.jsonl", **common}
        write_rows(folder / "toy.jsonl", toy_rows(24))
        save_folder(self.model)
        two: dict[str, Any] = {}
        self.train("one, whole")
        with pytest.MonkeyPatch.context() as patch:
            asked_to_stop(patch)
            with pytest.raises(KeyboardInterrupt):
                self.train("one")
        for name in FROM_ONE:
            shutil.copytree(folder / "one", folder / f"one to {name}")
            two[f"one to {name}"] = self.case(f"one to {name}", resume="auto", **HOW[name])
        for name, how in HOW.items():
            two[f"{name}, whole"] = self.case(f"{name}, whole", **how)
            two[f"{name}, stopped"] = self.case(name, "asked to stop", **how)
            copy = ["--resume", str(folder / name), *self.options(f"{name}, resumed", **how)]
            two[f"{name}, resumed"] = {"options": copy, "change": None}
        run_cases(2, folder, two)
        four = {}
        for name, how in TO_FOUR.items():
            shutil.copytree(folder / "fsdp2", folder / name)
            four[name] = self.case(name, resume="auto", **how)
        run_cases(4, folder, four)
        self.digests = {**read_digests(2, folder), **read_digests(4, folder)}

    def options(self, output: str, **more: Any) -> list[str]:
        return options(**{**self.common, **more, "model": self.model, "output": self.folder / output})

    def case(self, output: str, change: str | None = None, **more: Any) -> dict[str, Any]:
        return {"options": self.options(output, **more), "change": change}

    def train(self, output: str, **more: Any) -> None:
        train(parse("train", self.options(output, **more)))

    def check(self, got: str, expected: str) -> None:
        """Compare two runs on other numbers of processes."""
        ours, theirs = read_metrics(self.folder / got), read_metrics(self.folder / expected)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4, 5]
        for here, there in zip(ours, theirs, strict=True):
            for exact in ("pairs", "tokens", "learning_rate", "epoch", "lengths/gap"):
                assert here[exact] == there[exact], exact
            for close in ("loss", "grad_norm", "rewards/chosen", "logps/rejected"):
                assert here[close] == pytest.approx(there[close], **CLOSE), close
        weights = [read_weights(self.folder / name / "model") for name in (got, expected)]
        assert largest_difference(*weights) < CLOSE_WEIGHTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy_settings: dict[str, Any]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), toy_settings)


@pytest.mark.xdist_group("resume on ranks")
class TestRanks:
    @pytest.mark.parametrize("name", HOW)
    def test_on_as_many_the_same_bits(self, runs: Runs, name: str) -> None:
        assert [line["step"] for line in read_metrics(runs.folder / name)] == [1, 2, 3]
        resumed, whole = (runs.folder / f"{name}, {what}" for what in ("resumed", "whole"))
        assert without_clock(read_metrics(resumed)) == without_clock(read_metrics(whole))
        assert runs.digests[f"{name}, resumed"] == runs.digests[f"{name}, whole"]
        assert_same_weights(read_weights(resumed / "model"), read_weights(whole / "model"))
        assert_same_weights(read_weights(resumed / "best"), read_weights(whole / "best"))

    @pytest.mark.parametrize("name", FROM_ONE)
    def test_from_one_to_two(self, runs: Runs, name: str) -> None:
        runs.check(f"one to {name}", "one, whole")

    @pytest.mark.parametrize("name", TO_FOUR)
    def test_from_two_to_four(self, runs: Runs, name: str) -> None:
        runs.check(name, "one, whole")

    @pytest.mark.parametrize("name", ["ddp", "fsdp2", "split"])
    def test_from_two_to_one(self, runs: Runs, name: str, capfd: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(runs.folder / name, runs.folder / f"{name} to one")
        runs.train(f"{name} to one", resume="auto")
        runs.check(f"{name} to one", "one, whole")
        assert "2 processes, now 1" in capfd.readouterr().err

    def test_8_bit_means_of_shards_do_not_go_on_elsewhere(self, runs: Runs) -> None:
        with pytest.raises(UserError, match="8-bit means of shards: go on with 2 processes"):
            runs.train("8-bit to one", resume=runs.folder / "8-bit", optimizer="adamw8bit")

    def test_full_passes_do_not_go_on_elsewhere(self, runs: Runs) -> None:
        """As their steps would be of other pairs."""
        with pytest.raises(UserError, match="2 processes, now 1"):
            runs.train("passes", resume=runs.folder / "ddp", batches_per_step=1)
