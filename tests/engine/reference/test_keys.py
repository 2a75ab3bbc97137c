"""Keys of the reference store: every option of a run is decided on, and tokens, positions and weights count."""

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fused_dpo_engine.attention.models import attention_needs
from fused_dpo_engine.cli import parse
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.reference import keys
from fused_dpo_engine.reference.keys import scorer_settings, sequence_keys
from fused_dpo_engine.reference.store import digest_of
from tests.engine.model.test_adapters import save_adapters
from tests.engine.support.toys import make_pair, options, save_folder

CPU = torch.device("cpu")
ATTENTION = keys._attention

DECIDES: dict[str, Any] = {
    "dtype": "bfloat16",
    "attention": "flex",
    "liger": True,
    "compile": True,
    "load_in_4bit": True,
}
"""Options that decide about the scorer, with another value than the default."""
OTHERWISE = {
    "model": "what its files hold, by the fingerprint",
    "ref_model": "what its files hold, by the fingerprint; the policy's options apply to it",
    "device": "cpu and cuda have other implementations; tested by itself, as there is no GPU here",
    "trust_remote_code": "changes the fingerprint where the model brings code, tested there",
    "lora_rank": "with bfloat16 alone: the frozen base is kept in it; tested by itself",
    "strategy": "fsdp2 with bfloat16 alone, which rounds the weights of norms; tested by itself",
}
"""Options that decide under a condition."""
OF_SEQUENCES = {
    **dict.fromkeys(("data", "split", "eval_data", "eval_split", "eval_fraction"), "decides which tokens there are"),
    **dict.fromkeys(("max_length", "truncate_prompts", "pairs", "skip_bad_rows"), "decides which tokens there are"),
    **dict.fromkeys(("chat_template", "columns"), "decides which tokens there are"),
    "score": "decides which positions are scored",
    "ld_alpha": "in the keys of those sequences whose weights it changes",
}
"""Options whose effect is in the sequences."""
NOTHING: dict[str, Any] = {
    # rounding at most, by other shapes of the same products, or memory
    "tokens_per_batch": 96,
    "packing": False,  # with float32; tested by itself
    "prefix_sharing": False,
    "batches_per_step": 3,
    "plan_window": 7,
    "workspace_mib": 1,
    "gradient_checkpointing": True,
    "offload_activations": True,
    "grad_mode": "exact",
    "tensor_parallel": 2,
    "offload": True,
    "timeout_minutes": 1.0,
    # the loss and the optimizer, which come after the reference
    "beta": 0.5,
    "loss_type": "ipo",
    "label_smoothing": 0.1,
    "sft_weight": 0.5,
    "simpo_gamma": 0.1,
    "dpop_lambda": 1.0,
    "odpo_alpha": 0.1,
    "learning_rate": 1e-3,
    "optimizer": "adamw8bit",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.5,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.0,
    # adapters that are new, and off in the reference
    "lora_alpha": 3.0,
    "lora_target_modules": ("q_proj",),
    # the run
    "output": "elsewhere",
    "overwrite": True,
    "max_steps": 3,
    "epochs": 2.0,
    "pairs_per_step": 3,
    "seed": 5,
    "eval_steps": 1,
    "save_steps": 1,
    "best_metric": "eval_rewards/margins",
    "early_stopping_patience": 2,
    "report_to": ("none",),
    "resume": "auto",
    "checkpoint_every": 3,
    "checkpoint_minutes": 4.0,
    "checkpoints_kept": 5,
    "reference_store": "x.db",
    "reference_columns": "never",
}
"""Options that decide nothing of a log-prob but its rounding, with another value than the default."""


@pytest.fixture(autouse=True)
def _attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device with several backends would answer."""

    def named(_: Any, __: Any, options: ModelOptions, *___: Any) -> str:
        return "sdpa" if options.attention == "auto" else options.attention

    monkeypatch.setattr(keys, "_attention", named)


def digest_of_run(config: TrainConfig, changes: dict[str, Any] | None = None) -> bytes:
    """Of the policy as its own reference, some options replaced in whatever group they are."""
    groups = {
        name: replace_known(group, changes or {})
        for name, group in vars(config).items()
        if dataclasses.is_dataclass(group)
    }
    return digest_of(
        scorer_settings(
            groups["model"],
            groups["lora"],
            CPU,
            frozen=False,
            packing=groups["packing"].packing,
            strategy=groups["parallel"].strategy,
        )
    )


def replace_known(group: Any, changes: dict[str, Any]) -> Any:
    """A copy with other values, unchecked: some are refused without others."""
    copy = object.__new__(type(group))
    copy.__dict__.update({name: changes.get(name, value) for name, value in vars(group).items()})
    return copy


@pytest.fixture
def config(tiny_llama: Path) -> TrainConfig:
    return parse("train", options(model=tiny_llama, data="x", output="y", dtype="float32", device="cpu"))


def test_every_option_is_decided_on(config: TrainConfig) -> None:
    """A new option has to be put into one of the tables above."""
    tables = (DECIDES, OTHERWISE, OF_SEQUENCES, NOTHING)
    listed = [name for table in tables for name in table]
    assert len(listed) == len(set(listed))
    known = set(config.flat())
    assert known - set(listed) == set(), "decide whether these change a log-prob"


@pytest.mark.parametrize("name", DECIDES)
def test_options_that_decide(config: TrainConfig, name: str) -> None:
    assert getattr(config.model, name) != DECIDES[name]
    assert digest_of_run(config, {name: DECIDES[name]}) != digest_of_run(config)


@pytest.mark.parametrize("name", NOTHING)
def test_options_that_do_not(config: TrainConfig, name: str) -> None:
    assert config.flat().get(name) != NOTHING[name]
    assert digest_of_run(config, {name: NOTHING[name]}) == digest_of_run(config)


@pytest.mark.parametrize(("dtype", "matters"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("change", [{"lora_rank": 4}, {"strategy": "fsdp2"}, {"packing": False}])
def test_what_decides_in_half_precision_alone(
    config: TrainConfig, dtype: str, matters: bool, change: dict[str, Any]
) -> None:
    """A base below adapters is kept in it, layers that FSDP2 gathers are, and padded batches take other attention.

    Adapters of another rank are off like any.
    """
    before = digest_of_run(config, {"dtype": dtype})
    assert (digest_of_run(config, {"dtype": dtype, **change}) != before) is matters
    if "lora_rank" in change:
        assert digest_of_run(config, {"dtype": dtype, "lora_rank": 9}) == digest_of_run(
            config, {"dtype": dtype, **change}
        )


def settings(model: Path | str, lora: int = 0, device: str = "cpu", **more: Any) -> dict[str, Any]:
    how = {"frozen": False, "packing": True, "strategy": "ddp", **more}
    return scorer_settings(
        ModelOptions(str(model), dtype="float32"), LoraOptions(lora_rank=lora), torch.device(device), **how
    )


def test_the_model_counts_and_its_name_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert settings(copy) == settings(tiny_llama)
    assert settings(save_folder(tmp_path / "other", seed=1)) != settings(tiny_llama)


def test_the_device_counts(tiny_llama: Path) -> None:
    assert settings(tiny_llama, device="cuda") != settings(tiny_llama)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 16, "num_key_value_heads": 1}])
def test_a_gpus_attention_is_found_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Asks for the backend with what the loaded model needs, but loads none of its weights."""
    folder = save_folder(tmp_path / "model", **changes)
    asked = []

    def named(model: Any, device: torch.device, dtype: torch.dtype, wanted: str) -> str:
        asked.append((attention_needs(model), device.type, dtype, wanted))
        return "varlen"

    monkeypatch.setattr(keys, "_attention", ATTENTION)
    monkeypatch.setattr(keys, "attention_for", named)
    assert settings(folder, device="cuda")["attention"] == "varlen"
    assert settings(folder)["attention"] == "sdpa", "no GPU"
    needs = attention_needs(AutoModelForCausalLM.from_pretrained(folder))
    assert asked == [(needs, "cuda", torch.float32, "auto")]
    assert needs.head_dim == changes.get("head_dim", 8)


def test_adapters_merged_or_attached_are_other_scorers(tiny_llama: Path, tmp_path: Path) -> None:
    adapters = save_adapters(tmp_path / "adapters", tiny_llama)
    merged, attached, base = settings(adapters), settings(adapters, lora=3), settings(tiny_llama)
    assert (merged["adapters"], attached["adapters"], base["adapters"]) == ("merged", "attached", None)
    assert len({digest_of(each) for each in (merged, attached, base)}) == 3
    assert settings(tiny_llama, lora=3) == base, "new adapters are off"


def test_a_model_of_its_own_is_never_compiled(tiny_llama: Path) -> None:
    compiled = ModelOptions(str(tiny_llama), dtype="float32", compile=True)
    how: dict[str, Any] = {"packing": True, "strategy": "ddp"}
    frozen = scorer_settings(compiled, LoraOptions(), CPU, frozen=True, **how)
    assert frozen == settings(tiny_llama, frozen=True)
    assert scorer_settings(compiled, LoraOptions(), CPU, frozen=False, **how) != frozen


def test_the_numerics_of_a_release_count(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings(tiny_llama)
    monkeypatch.setattr(keys, "NUMERICS", keys.NUMERICS + 1)
    assert settings(tiny_llama) != before


class TestSequences:
    PAIR = make_pair(5, 7, 3)

    def test_tokens_and_positions(self) -> None:
        chosen, rejected = sequence_keys(self.PAIR)
        assert len(chosen) == len(rejected) == 16
        assert chosen != rejected
        ids = self.PAIR.chosen_ids.copy()
        ids[6] += 1
        assert sequence_keys(replace(self.PAIR, chosen_ids=ids)) != (chosen, rejected)
        assert sequence_keys(replace(self.PAIR, chosen_ids=ids))[1] == rejected
        assert sequence_keys(replace(self.PAIR, prompt_length=4))[0] != chosen
        some = replace(self.PAIR, chosen_scored=np.array([6, 8]))
        assert sequence_keys(some)[0] != chosen
        assert sequence_keys(some)[1] == rejected

    def test_all_positions_are_the_same_however_they_are_said(self) -> None:
        said = replace(self.PAIR, chosen_scored=np.arange(5, 12), rejected_scored=np.arange(5, 8))
        assert sequence_keys(said) == sequence_keys(self.PAIR)

    def test_what_is_no_part_of_a_sequence(self) -> None:
        other = replace(self.PAIR, where="x:9", margin=2.0, ranking=4, reference=(-1.0, -2.0))
        assert sequence_keys(other) == sequence_keys(self.PAIR)
        swapped = replace(self.PAIR, chosen_ids=self.PAIR.rejected_ids, rejected_ids=self.PAIR.chosen_ids)
        assert sequence_keys(swapped) == sequence_keys(self.PAIR)[::-1]

    def test_tokens_do_not_run_into_positions(self) -> None:
        """The same numbers, otherwise divided."""
        one = keys._key(np.array([7, 1, 2, 0], np.int32), np.array([2]), 1, None, None)
        other = keys._key(np.array([7, 1], np.int32), np.array([2, 0]), 1, None, None)
        assert one != other

    def test_weights_of_length_desensitisation(self) -> None:
        """They change the longer response alone, and with 1 none."""
        chosen, rejected = sequence_keys(self.PAIR)
        longer = sequence_keys(self.PAIR, 0.5)
        assert longer[0] != chosen
        assert longer[1] == rejected
        assert sequence_keys(self.PAIR, 0.25)[0] not in (chosen, longer[0])
        assert sequence_keys(self.PAIR, 1.0) == (chosen, rejected)
        shorter = replace(self.PAIR, rejected_ids=self.PAIR.rejected_ids[:-1])
        assert sequence_keys(shorter, 0.5)[0] != longer[0], "the tail begins earlier"
        assert sequence_keys(shorter, 0.5)[0] != chosen
