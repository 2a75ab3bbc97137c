"""Runs on two and four processes are the run of one process: same steps, losses, norms, weights, files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from tests.engine.support.ranks import read_digests, run_cases
from tests.engine.support.runs import toy_pairs
from tests.engine.support.tensor_parallel_ranks import EXPERTS_REFUSED
from tests.engine.support.toys import (
    largest_difference,
    options,
    read_metrics,
    read_weights,
    save_folder,
    toy_rows,
    write_rows,
)

CLOSE: dict[str, Any] = {"rel": 5e-6, "abs": 1e-7}
"""Losses and norms: some 50 units in the last place of fp32, whose sums are taken in another order."""
CLOSE_PAIRS: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}
"""Rewards, differences of log-probs of some 50 nat, which have units in the last place of 4e-6."""
CLOSE_WEIGHTS = 1e-6
"""Ten units in the last place of the largest, those of the norms, which are around 1."""
BF16: dict[str, Any] = {"rel": 5e-3, "abs": 5e-3}
"""FSDP2 rounds the weights of norms to 8 bits (2^-9), where autocast in one process leaves them: two layers of them."""
BOTH = ("ddp", "fsdp2")
MOE = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": []},
    **{"output_router_logits": True, "router_aux_loss_coef": 0.1, "decoder_sparse_step": 1},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"sft_weight": 0.3, "pairs_per_step": 5},
    "stops early": {
        **{"max_steps": 9, "eval_steps": 1, "early_stopping_patience": 2, "best_metric": "eval_rewards/accuracies"},
        "save_steps": 1,
    },
    "tied, clipped": {"model": "tied", "max_grad_norm": 0.05},
    "lora": {"lora_rank": 2},
    "lora on both ends": {"lora_rank": 2, "lora_target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "experts": {"model": "moe"},
    "checkpointing, padded": {"gradient_checkpointing": True, "packing": False},
    "several passes": {"pairs_per_step": 12},
    "one pair": {"pairs_per_step": 1, "eval_fraction": None, "eval_steps": None},
    "another reference": {"ref_model": "llama", "learning_rate": 1e-2},
    "bfloat16": {"dtype": "bfloat16"},
}
OFFLOADED = ("plain", "lora")
SPLIT = ("plain", "stops early", "tied, clipped", "experts", "checkpointing, padded", "another reference", "bfloat16")
"""On ranks that share the pairs: tensor parallelism."""
HOW: dict[str, dict[str, Any]] = {
    **{strategy: {"strategy": strategy} for strategy in BOTH},
    "offload": {"offload": True},
    "split": {"tensor_parallel": 2},
}
ON_FOUR = ("tied, clipped", "lora", "one pair")
ON_FOUR_SPLIT = ("plain", "tied, clipped", "one pair")
"""Two and two: FSDP2 over those that have other pairs."""


def name_of(case: str, strategy: str, ranks: int) -> str:
    return f"{case}, {strategy}, {ranks}"


class Runs:
    """Every case on one process, and on several with each strategy."""

    def __init__(self, folder: Path, toy_settings: dict[str, Any]) -> None:
        self.folder = folder
        self.models = {name: folder / name for name in ("llama", "tied", "moe")}
        # With a large epsilon, so that Adam does not enlarge what rounding is left.
        common = {"learning_rate": 3e-2, "adam_epsilon": 1e-2, "eval_fraction": 0.25, "eval_steps": 2}
        self.common = {**toy_settings, "data": folder / "toy.jsonl", **common}
        if not folder.exists():
            folder.mkdir()
            self._make()
        self.digests = {**read_digests(2, folder), **read_digests(4, folder)}

    def _make(self) -> None:
        write_rows(self.folder / "toy.jsonl", toy_rows(24))
        save_folder(self.models["llama"])
        save_folder(self.models["tied"], tie_word_embeddings=True)
        save_folder(self.models["moe"], "qwen3_moe", **MOE)
        for case in CASES:
            train(parse("train", self.options(case, case)))
        train(parse("train", self.options("plain, offload, 1", "plain", offload=True)))
        two = {name_of(case, strategy, 2): self.case(case, strategy, 2) for case in CASES for strategy in BOTH}
        two |= {name_of(case, "offload", 2): self.case(case, "offload", 2) for case in OFFLOADED}
        split = [case for case in SPLIT if not (case == "experts" and EXPERTS_REFUSED)]
        two |= {name_of(case, "split", 2): self.case(case, "split", 2) for case in split}
        for broken in ("outside", "local mean"):
            two[broken] = {"options": self.options(broken, "plain", strategy="ddp"), "change": broken}
        two["reduced"] = {"options": self.options("reduced", "several passes", strategy="fsdp2"), "change": "no room"}
        for strategy in BOTH:
            name = f"compiled, {strategy}"
            settings = {"strategy": strategy, "compile": True, "gradient_checkpointing": True, "max_steps": 2}
            two[name] = {"options": self.options(name, "lora", **settings), "change": "traced"}
        run_cases(2, self.folder, two)
        four = {name_of(case, strategy, 4): self.case(case, strategy, 4) for case in ON_FOUR for strategy in BOTH}
        four |= {name_of(case, "split", 4): self.case(case, "split", 4) for case in ON_FOUR_SPLIT}
        run_cases(4, self.folder, four)

    def options(self, name: str, case: str, **more: Any) -> list[str]:
        settings = {**self.common, **CASES[case], **more, "output": self.folder / name}
        settings["model"] = self.models[CASES[case].get("model", "llama")]
        if "ref_model" in settings:
            settings["ref_model"] = self.models[settings["ref_model"]]
        return options(**settings)

    def case(self, case: str, strategy: str, ranks: int) -> dict[str, Any]:
        return {"options": self.options(name_of(case, strategy, ranks), case, **HOW[strategy]), "change": None}

    def metrics(self, name: str) -> list[dict[str, float]]:
        return read_metrics(self.folder / name)

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "summary.json").read_text(encoding="utf-8"))

    def check(self, name: str, case: str) -> None:
        """Compare a run with that of one process."""
        loose = case == "bfloat16" and ", ddp" not in name
        got, expected = self.metrics(name), self.metrics(case)
        assert len(got) == len(expected)
        assert got[0].keys() == expected[0].keys()
        assert got[0]["rewards/chosen"] == got[0]["rewards/rejected"] == 0, "reference and policy in the same passes"
        for ours, theirs in zip(got, expected, strict=True):
            for exact in ("step", "pairs", "tokens", "learning_rate", "epoch", "lengths/gap"):
                assert ours[exact] == theirs[exact], exact
            for close in ("loss", "grad_norm"):
                assert ours[close] == pytest.approx(theirs[close], **(BF16 if loose else CLOSE)), close
            of_pairs = [key for key in theirs if key.startswith(("rewards", "logps", "eval", "aux", "nll"))]
            for close in of_pairs if not loose else ():
                assert ours[close] == pytest.approx(theirs[close], **CLOSE_PAIRS), close
        for folder in ("model", "best") if "eval_loss" in expected[-1] else ("model",):
            got_weights, weights = (read_weights(self.folder / run / folder) for run in (name, case))
            assert largest_difference(got_weights, weights) < (2e-3 if loose else CLOSE_WEIGHTS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy_settings: dict[str, Any]) -> Runs:
    """Made once, by the first of the suite's workers that asks."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(shared / "runs_on_ranks.lock"):
        return Runs(shared / "runs_on_ranks", toy_settings)


NAMED = [(name_of(case, strategy, 2), case) for case in CASES for strategy in BOTH]
NAMED += [(name_of(case, "offload", 2), case) for case in OFFLOADED]
NAMED += [("reduced", "several passes")]
NAMED += [(name_of(case, "split", 2), case) for case in SPLIT]
NAMED += [(name_of(case, strategy, 4), case) for case in ON_FOUR for strategy in BOTH]
NAMED += [(name_of(case, "split", 4), case) for case in ON_FOUR_SPLIT]


class TestAgainstOneProcess:
    @pytest.mark.parametrize(("name", "case"), NAMED, ids=[name for name, _ in NAMED])
    def test_the_same_run(self, runs: Runs, name: str, case: str) -> None:
        if name == "experts, split, 2" and EXPERTS_REFUSED:
            pytest.skip("torch before 2.13 cannot gather experts to save them")
        runs.check(name, case)
        assert len(set(runs.digests[name])) == 1, "the ranks' weights, bit for bit"

    @pytest.mark.parametrize("strategy", BOTH)
    def test_compiled(self, runs: Runs, strategy: str) -> None:
        """Two steps, the first two of three: the rate of the second is not used before its end."""
        for got, expected in zip(runs.metrics(f"compiled, {strategy}"), runs.metrics("lora"), strict=False):
            for name in ("loss", "grad_norm", "logps/chosen"):
                assert got[name] == pytest.approx(expected[name], **CLOSE), name
        assert len(set(runs.digests[f"compiled, {strategy}"])) == 1

    def test_offload_on_one_process_is_bit_equal(self, runs: Runs) -> None:
        offloaded, plain = (read_weights(runs.folder / name / "model") for name in ("plain, offload, 1", "plain"))
        assert largest_difference(offloaded, plain) == 0

    @pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])
    def test_there_is_something_to_compare(self, runs: Runs, case: str) -> None:
        losses = [line["loss"] for line in runs.metrics(case)]
        assert max(losses) - min(losses) > 1e-2
        if case in ("tied, clipped",):
            assert all(line["grad_norm"] > 0.05 for line in runs.metrics(case)), "clipped in every step"

    def test_ranks_have_uneven_shares(self, runs: Runs) -> None:
        """Two passes a step in one process, and one on each of two ranks, of other numbers of tokens."""
        assert [line["micro_batches"] for line in runs.metrics("plain")] == [2, 2, 2]
        assert [line["micro_batches"] for line in runs.metrics("plain, ddp, 2")] == [1, 1, 1]
        assert all(line["packing/fill"] < 0.99 for line in runs.metrics("plain"))

    @pytest.mark.parametrize("strategy", BOTH)
    def test_ranks_have_several_passes(self, runs: Runs, strategy: str) -> None:
        """Of which all but the last add up gradients on the rank."""
        assert any(line["micro_batches"] > 1 for line in runs.metrics(f"several passes, {strategy}, 2"))

    @pytest.mark.parametrize("strategy", BOTH)
    def test_decisions_are_the_same(self, runs: Runs, strategy: str) -> None:
        one, two = (runs.summary(name) for name in ("stops early", f"stops early, {strategy}, 2"))
        assert one["stopped"].startswith("early stopping after step")
        for name in ("steps", "stopped", "best_step", "saved", "pairs", "tokens"):
            assert two[name] == one[name], name

    def test_saved_models_load(self, runs: Runs) -> None:
        for case in ("plain", "tied, clipped", "experts"):
            model: Any = AutoModelForCausalLM.from_pretrained(runs.folder / f"{case}, fsdp2, 2" / "model")
            ids = torch.from_numpy(toy_pairs()[0].chosen_ids).long()[None]
            assert model(input_ids=ids).logits.isfinite().all()

    def test_fsdp2_computes_in_half_precision_in_the_layers(self, runs: Runs) -> None:
        """Control: the looser bound of bfloat16 is needed, so weights are rounded before they are gathered."""
        differs = [
            abs(a["loss"] - b["loss"]) / b["loss"]
            for a, b in zip(runs.metrics("bfloat16, fsdp2, 2"), runs.metrics("bfloat16"), strict=True)
        ]
        assert max(differs) > CLOSE["rel"]


class TestControls:
    def test_a_loss_outside_of_the_wrapper_is_seen(self, runs: Runs) -> None:
        assert len(set(runs.digests["outside"])) == 2

    def test_a_local_mean_is_seen(self, runs: Runs) -> None:
        assert len(set(runs.digests["local mean"])) == 1, "silently the same wrong weights everywhere"
        with pytest.raises(AssertionError):
            runs.check("local mean", "plain")
