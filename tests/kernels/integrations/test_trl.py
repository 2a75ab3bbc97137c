"""TRL's DPOTrainer, unpatched, with the fused head, and packed: the same losses, metrics and weights, in fp32."""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
from fused_dpo.integrations import trl as our_trl
from fused_dpo.integrations.trl import patch_trl
from tests.fresh_process import ROOT
from tests.kernels.support.trl import PAIRS, STEPS, Result, build, rows, run, tokenizer, worst_metric, worst_weight

WEIGHTS, METRICS = 5e-5, 1e-3
"""Adam divides by the size of each gradient, so that those of 1e-6, which are sums in another order, move weights by
1e-5 of theirs. Margins are differences of log-probs of size 100."""
MODULES = ("dpo_trainer", "kto_trainer", "sft_trainer", "utils")
PATCHES = {"plain": {"packed": False}, "packed": {"packed": True}}


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **settings)


def prompt_tuning() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


CASES: dict[str, dict[str, Any]] = {
    "all weights, evaluated": {"evaluate": True},
    "checkpointed": {"gradient_checkpointing": True},
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "untied": {"family": "qwen2"},
    "softcap and window": {"family": "gemma2"},
    "experts": {"family": "qwen3_moe"},
    "reference stored": {"precompute_ref_log_probs": True, "evaluate": True},
    "sigmoid, sft and ipo": {"loss_type": ["sigmoid", "sft", "ipo"]},
    "apo_zero and bco_pair": {"loss_type": ["apo_zero", "bco_pair"]},
    "aot": {"loss_type": ["aot"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "ld_alpha": {"ld_alpha": 0.5},
    "WPO": {"use_weighting": True},
    "cut at the start": {"max_length": 14, "truncation_mode": "keep_end"},
    "cut at the end": {"max_length": 18},
    "LoRA": {"peft_config": lambda: lora(target_modules=["q_proj", "v_proj"])},
    "LoRA, head trained": {"peft_config": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"])},
    "prompt tuning": {"peft_config": prompt_tuning},
}


def result(case: str, patch: str | None) -> Result:
    settings = dict(CASES[case])
    make = settings.pop("peft_config", lambda: None)
    return run(**settings, peft_config=make(), patch=PATCHES[patch] if patch else None)


own = cache(lambda case: result(case, None))


@pytest.mark.filterwarnings("ignore:fused_dpo computes batches with:UserWarning")
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("case", CASES)
def test_the_same_training(case: str, patch: str) -> None:
    expected, got = own(case), result(case, patch)
    difference, name = worst_metric(got, expected)
    assert difference < METRICS, name
    assert worst_weight(got, expected) < WEIGHTS
    start = build(CASES[case].get("family", "llama")).state_dict()
    moved = [not torch.equal(w, start[n]) for n, w in expected.weights.items() if n in start]
    assert all(moved), "control: training changes every weight"
    counts = got.counts
    assert counts is not None
    policy_and_reference = 2 * STEPS
    if case in ("all weights, evaluated", "LoRA"):
        accuracies = [entry["mean_token_accuracy"] for entry in expected.log if "mean_token_accuracy" in entry]
        assert any(accuracies), "control: some tokens are the likeliest"
    if patch == "plain":
        assert counts.packed_calls == 0
    elif case == "prompt tuning":  # embeddings of virtual tokens: the reference alone, without them, is packed
        assert counts.packed_calls == counts.calls // 2 == policy_and_reference // 2
    else:
        assert counts.packed_calls == counts.calls >= policy_and_reference


def test_sharing_saves_slots() -> None:
    slots = {}
    for patch in PATCHES:
        counts = result("untied", patch).counts
        assert counts is not None
        slots[patch] = counts.slots
    ids = tokenizer()
    lengths = [
        [len(ids(row["prompt"] + row[side]).input_ids) + 1 for side in ("chosen", "rejected")]
        for row in rows(STEPS * PAIRS)
    ]
    assert slots["packed"] < 2 * sum(map(sum, lengths)) < slots["plain"]


def test_control_another_head_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With log-probs that belong to the positions beside, losses and weights are others."""
    forward = our_trl._forward

    def rolled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if kwargs.get("fused_lm_head"):
            output.log_probs = output.log_probs.roll(1, -1)
        return output

    monkeypatch.setattr(our_trl, "_forward", rolled)
    got, expected = result("ld_alpha", "packed"), own("ld_alpha")
    assert worst_metric(got, expected)[0] > 10 * METRICS
    assert worst_weight(got, expected) > 10 * WEIGHTS


def test_lora_on_the_head() -> None:
    """TRL refuses it; patched it is trained, packed as plain."""
    settings = {"target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        run("qwen2", peft_config=lora(**settings))
    plain, packed = (run("qwen2", peft_config=lora(**settings), patch=patch) for patch in PATCHES.values())
    assert worst_weight(packed, plain) < WEIGHTS
    moved = [float(w.abs().max()) for n, w in packed.weights.items() if "lm_head.lora_B" in n]
    assert moved
    assert min(moved) > 1e-4


def test_stored_reference_log_probs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TRL stored is not taken for ours, nor what is of other settings; what is of the same is found."""
    from trl.trainer.dpo_trainer import DPOTrainer

    prepare, prepared = DPOTrainer._prepare_dataset, []

    def prepare_once(self: Any, *args: Any) -> Any:  # TRL's store is found by the data's fingerprint too
        prepared.append(prepared[0] if prepared else prepare(self, *args))
        return prepared[0]

    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", prepare_once)
    calls = []
    filtered = {"packed": False, "grad_mode": "filtered"}
    for patch in (None, PATCHES["plain"], PATCHES["plain"], PATCHES["packed"], filtered, PATCHES["packed"]):
        got = run(precompute_ref_log_probs=True, folder=str(tmp_path), patch=patch)
        calls.append(got.counts.calls - STEPS if got.counts else None)
    assert calls == [None, STEPS, 0, STEPS, STEPS, 0]


def test_two_processes(tmp_path: Path) -> None:
    """Two processes of two pairs each train as one with four."""
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        settings = {"patch": {}, "batch_size": PAIRS // processes, "folder": str(folder)}
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [
            sys.executable,
            *(launch if processes > 1 else []),
            "-m",
            "tests.kernels.support.trl",
            json.dumps(settings),
        ]
        paths = [str(ROOT / part) for part in ("kernels", "engine", ".")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    one, first, second = (
        Result(*torch.load(tmp_path / name, weights_only=False))
        for name in ("1/result0.pt", "2/result0.pt", "2/result1.pt")
    )
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    losses = [[entry["loss"] for entry in each.log if "loss" in entry] for each in (one, first)]
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-5, atol=0)
    assert worst_weight(first, one) < WEIGHTS


class TestOtherCallsOfTheModel:
    def test_generation_and_logits(self) -> None:
        dpo_trainer: Any = importlib.import_module("trl.trainer.dpo_trainer")
        model, unpatched = build("qwen2"), build("qwen2")
        with patch_trl():
            dpo_trainer.add_fused_lm_head(model)
        ids = torch.tensor([[0, 0, 70, 71, 72], [65, 66, 67, 68, 69]])
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        inputs = {"input_ids": ids, "attention_mask": mask}
        written = [
            each.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0) for each in (model, unpatched)
        ]
        assert torch.equal(*written)
        with torch.no_grad():
            got, expected = (each(**inputs, labels=ids).loss for each in (model, unpatched))
        torch.testing.assert_close(got, expected)

    def test_other_trainers_keep_their_head(self) -> None:
        modules: list[Any] = [importlib.import_module(f"trl.trainer.{name}") for name in MODULES]
        dpo_trainer, kto_trainer, sft_trainer, utils = modules
        with patch_trl():
            assert sft_trainer.add_fused_lm_head is kto_trainer.add_fused_lm_head is utils.add_fused_lm_head
            assert dpo_trainer.add_fused_lm_head is not utils.add_fused_lm_head
        assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head


class TestRefusals:
    def test_two_patches(self) -> None:
        with patch_trl(), pytest.raises(RuntimeError, match="patched already"):
            patch_trl()
        patch_trl().undo()

    def test_a_trainer_from_before(self, tmp_path: Path) -> None:
        trainer = self.trainer(build("llama"), tmp_path)
        with patch_trl(), pytest.raises(RuntimeError, match=r"built before patch_trl\(\)"):
            trainer.train()
        with patch_trl(), pytest.raises(RuntimeError, match=r"built before patch_trl\(\)"):
            trainer.evaluate(trainer.train_dataset)

    def test_a_trainer_from_within_goes_on(self, tmp_path: Path) -> None:
        with patch_trl() as patch:
            trainer = self.trainer(build("llama"), tmp_path)
        trainer.train()
        assert patch.counts.packed_calls == 2

    def test_a_head_that_cannot_be_read(self, tmp_path: Path) -> None:
        model = build("qwen2")
        model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
        with patch_trl(), pytest.raises(NotImplementedError, match="hook"):
            self.trainer(model, tmp_path)

    @pytest.mark.parametrize("version", ["0.29.1", "1.9.0", "1.14.2"])
    def test_versions_without_a_place_for_it(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trl.__version__", version)
        with pytest.raises(NotImplementedError, match=rf"TRL {version} .*full logits.*pip install 'trl>=1.15,<1.17'"):
            patch_trl()

    def test_versions_to_come(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trl.__version__", "1.17.0")
        with pytest.raises(NotImplementedError, match=r"TRL 1.17.0 is not known.*pip install 'trl>=1.15,<1.17'"):
            patch_trl()

    def test_another_signature(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dpo_trainer: Any = importlib.import_module("trl.trainer.dpo_trainer")
        monkeypatch.setattr(dpo_trainer, "add_fused_lm_head", lambda model, outputs: None)
        with pytest.raises(NotImplementedError, match="is not known to work"):
            patch_trl()

    def trainer(self, model: Any, folder: Path) -> Any:
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        config = DPOConfig(
            str(folder), max_steps=1, report_to=[], bf16=False, use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        dataset = Dataset.from_list(rows(4))
        return DPOTrainer(model, build("llama"), config, train_dataset=dataset, processing_class=tokenizer())
