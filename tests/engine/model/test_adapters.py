"""A folder of adapters as `--model`: the base it names, the reference it makes, and what is saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fused_dpo_engine.config.options import DataOptions, LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.loading import check_model, choose_max_length, load_tokenizer
from fused_dpo_engine.model.source import find_source
from fused_dpo_engine.training.trainer import Trainer
from tests.engine.support.policies import BATCH, CPU, ORDERED, relative
from tests.engine.support.runs import FIRST_LOSS, FLAT
from tests.engine.support.toys import byte_tokenizer, own_logps, read_weights, save_folder

RANK = 3


def save_adapters(folder: Path, base: Path | str, config: Any = None, **settings: Any) -> Path:
    """Adapters that do something, as peft saves them."""
    model: Any = AutoModelForCausalLM.from_pretrained(settings.pop("of", base))
    config = config or LoraConfig(**{"r": RANK, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **settings})
    config.task_type = settings.get("task_type", "CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    config.base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(tmp_path, tiny_llama) -> Path:
    return save_adapters(tmp_path / "sft", tiny_llama)


def plain(base: Path, adapters: Path) -> Any:
    """Base and adapters as peft itself loads them."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters).eval()


def policy_on(folder: Path, rank: int = 0, **settings: Any) -> Any:
    return build_policy(ModelOptions(str(folder), dtype="float32", **settings), LoraOptions(rank), CPU)


class TestWhatIsLoaded:
    @pytest.mark.parametrize("rank", [0, RANK])
    def test_policy_and_reference_are_base_plus_adapters(self, adapters, tiny_llama, rank):
        policy = policy_on(adapters, rank)
        with torch.no_grad():
            expected = own_logps(plain(tiny_llama, adapters), ORDERED)
            bare = own_logps(AutoModelForCausalLM.from_pretrained(tiny_llama), ORDERED)
            with policy.as_reference():
                reference = policy(BATCH).logps
        # 1e-5: log-probs of up to 150 nat, in fp32 on both sides.
        assert relative(reference, expected) < 1e-5
        assert torch.equal(policy(BATCH).logps, reference)
        assert relative(bare, expected) > 1e-2, "control: the adapters do something"

    def test_what_is_trained(self, adapters):
        merged, trained_on = policy_on(adapters), policy_on(adapters, RANK)
        assert all(parameter.requires_grad for parameter in merged.parameters())
        assert not any("lora_" in name for name, _ in merged.named_parameters())
        assert all(("lora_" in name) == p.requires_grad for name, p in trained_on.named_parameters())
        assert {p.dtype for p in trained_on.parameters() if p.requires_grad} == {torch.float32}

    def test_a_configuration_beside_the_adapters(self, adapters, tiny_llama):
        """As Trainer and axolotl leave it."""
        shutil.copy(tiny_llama / "config.json", adapters)
        assert policy_on(adapters, RANK)(BATCH).logps.isfinite().all()

    def test_dropout_of_adapters_is_off(self, tmp_path, tiny_llama):
        folder = save_adapters(tmp_path / "a", tiny_llama, lora_dropout=0.5)
        policy = policy_on(folder, RANK)
        assert torch.equal(policy(BATCH).logps, policy(BATCH).logps)
        with policy.as_saved():
            policy.model.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert (saved["lora_dropout"], policy.model.peft_config["default"].lora_dropout) == (0.5, 0.0)

    @pytest.mark.parametrize("settings", [{"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
    def test_other_kinds_of_lora(self, tmp_path, tiny_llama, settings):
        folder = save_adapters(tmp_path / "a", tiny_llama, **settings)
        expected = own_logps(plain(tiny_llama, folder), ORDERED)
        for rank in (0, RANK):
            assert relative(policy_on(folder, rank)(BATCH).logps, expected) < 1e-5

    @pytest.mark.parametrize(
        "settings",
        [
            {"target_modules": ["lm_head", "q_proj"]},
            {"target_modules": ["embed_tokens"]},
            {"modules_to_save": ["lm_head"]},
            {"modules_to_save": ["lm_head", "embed_tokens"]},
        ],
    )
    def test_tied_embeddings(self, tmp_path, train_tiny, settings):
        """Adapters on one of the two must not be merged into both, neither here nor in what is saved."""
        base = save_folder(tmp_path / "tied", tie_word_embeddings=True)
        folder = save_adapters(tmp_path / "a", base, **settings)
        expected = own_logps(plain(base, folder), ORDERED)
        for rank in (0, RANK):
            assert relative(policy_on(folder, rank)(BATCH).logps, expected) < 1e-5
        run = train_tiny(model=folder, learning_rate=1e-12)
        saved = AutoModelForCausalLM.from_pretrained(run.output / "model").eval()
        assert relative(own_logps(saved, ORDERED), expected) < 1e-5
        assert saved.config.tie_word_embeddings is False

    def test_whole_modules_are_trained_in_float32(self, tmp_path, tiny_llama):
        folder = save_adapters(tmp_path / "a", tiny_llama, modules_to_save=["lm_head"])
        policy = build_policy(ModelOptions(str(folder), dtype="bfloat16"), LoraOptions(RANK), CPU)
        assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
        policy(BATCH).logps.sum().backward()
        assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)

    def test_adapters_that_are_merged_only(self, tmp_path, tiny_llama):
        config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        folder = save_adapters(tmp_path / "a", tiny_llama, config)
        expected = own_logps(plain(tiny_llama, folder), ORDERED)
        assert relative(policy_on(folder)(BATCH).logps, expected) < 1e-5
        with pytest.raises(UserError, match="are IA3, of which --lora-rank trains no more; leave --lora-rank out"):
            policy_on(folder, RANK)

    def test_tokenizer(self, adapters, tiny_llama):
        assert load_tokenizer(str(adapters), ModelOptions("")).chat_template == byte_tokenizer().chat_template
        own = byte_tokenizer()
        template, own.chat_template = own.chat_template, "{{ messages }}"
        try:
            own.save_pretrained(adapters)
        finally:
            own.chat_template = template
        assert load_tokenizer(str(adapters), ModelOptions("")).chat_template == "{{ messages }}"

    def test_positions_are_those_of_the_base(self, adapters):
        assert choose_max_length(ModelOptions(str(adapters)), DataOptions("d"), PackingOptions()) == 128


class TestRuns:
    @pytest.mark.parametrize("rank", [None, RANK])
    def test_training_goes_on_from_them(self, adapters, tiny_llama, train_tiny, monkeypatch, rank):
        trained, save = [], Trainer._save

        def score_and_save(self, name):
            trained.append(self.policy(BATCH).logps.detach())
            save(self, name)

        monkeypatch.setattr(Trainer, "_save", score_and_save)
        run = train_tiny(model=adapters, lora_rank=rank, learning_rate=1e-2, **FLAT)
        assert run.column("loss")[0] == FIRST_LOSS  # policy and reference are the same function
        saved = run.output / "model"
        assert (saved / "adapter_config.json").exists() == (rank is not None)
        base = AutoModelForCausalLM.from_pretrained(saved) if rank is None else plain(tiny_llama, saved)
        assert relative(own_logps(base, ORDERED), trained[-1]) < 1e-5
        again = policy_on(saved, rank or 0)(BATCH).logps  # and it can be the --model of the next run
        assert relative(again, trained[-1]) < 1e-5
        assert relative(policy_on(adapters, rank or 0)(BATCH).logps, trained[-1]) > 1e-3, "control: it has been trained"

    def test_trained_on_as_without_the_trainer(self, adapters, tiny_llama, train_tiny):
        """What is saved is what the steps left, on the base alone: nothing of the loaded adapters is lost."""
        run = train_tiny(model=adapters, lora_rank=RANK, learning_rate=1e-12, **FLAT)
        before, after = read_weights(adapters), read_weights(run.output / "model")
        assert before.keys() == after.keys()
        assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-9

    def test_own_adapters(self, train_tiny, tiny_llama, monkeypatch):
        """The model/ of a run with --lora-rank, whose base was named by a relative path from another folder."""
        monkeypatch.chdir(tiny_llama.parent)
        first = train_tiny("first", model=tiny_llama.name, lora_rank=RANK)
        monkeypatch.chdir(first.output)
        second = train_tiny("second", model="model", lora_rank=RANK)
        assert second.column("loss")[0] == FIRST_LOSS
        config = json.loads((second.output / "model" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_llama)

    def test_as_reference_model(self, adapters, train_tiny, tiny_llama):
        run = train_tiny(model=tiny_llama, ref_model=adapters)
        assert run.column("loss")[0] != FIRST_LOSS

    def test_the_base_is_not_overwritten(self, adapters, train, tiny_llama):
        outcome = train("--overwrite", model=adapters, output=tiny_llama)
        assert outcome.status == 2  # although no run has marked it
        assert f"--output {tiny_llama} is what --model names" in outcome.message
        assert (tiny_llama / "model.safetensors").exists()

    def test_the_run_says_so(self, adapters, train, tiny_llama):
        outcome = train(model=adapters, max_steps=1)
        assert f"adapters: those of {adapters} on {tiny_llama}, merged into it" in outcome.message


class TestRefusals:
    @pytest.mark.parametrize(
        ("lora", "message"),
        [
            (LoraOptions(8), rf"have rank {RANK}: --lora-rank {RANK} trains them on; for other ranks merge them first"),
            (LoraOptions(RANK, 7.0), "have lora-alpha 5; leave --lora-alpha out"),
            (LoraOptions(RANK, None, ("v_proj",)), "are on down_proj q_proj; leave --lora-target-modules out"),
        ],
    )
    def test_settings_that_differ(self, adapters, lora, message):
        with pytest.raises(UserError, match=message):
            check_model(ModelOptions(str(adapters)), lora)
        check_model(ModelOptions(str(adapters)), LoraOptions(RANK, 5.0, ("q_proj", "down_proj")))

    def test_another_task(self, adapters):
        path = adapters / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))
        with pytest.raises(UserError, match="are for the task SEQ_CLS; only CAUSAL_LM"):
            check_model(ModelOptions(str(adapters)), LoraOptions())

    def test_prompts(self, tmp_path, tiny_llama):
        folder = save_adapters(tmp_path / "a", tiny_llama, PromptTuningConfig(num_virtual_tokens=2))
        with pytest.raises(UserError, match="are PROMPT_TUNING: tokens before the prompt"):
            check_model(ModelOptions(str(folder)), LoraOptions())

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ("/nowhere/at/all", "belong to the model in /nowhere/at/all, which does not exist"),
            ("", "do not say which model they belong to"),
            (None, "do not say which model they belong to"),
            ("nobody/nothing", "no model configuration could be read from nobody/nothing, the base of the adapters in"),
        ],
    )
    def test_base_that_is_not_there(self, adapters, train, base, message):
        path = adapters / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
        outcome = train(model=adapters)
        assert outcome.status == 2
        assert message in outcome.message
        assert str(adapters) in outcome.message

    def test_base_beside_the_adapters(self, tmp_path):
        save_folder(tmp_path / "sft" / "base", tokenizer=None)
        folder = save_adapters(tmp_path / "sft", "base", of=tmp_path / "sft" / "base")
        assert find_source(str(folder)).base == str(folder / "base")

    def test_adapters_on_adapters(self, tmp_path, adapters, tiny_llama):
        folder = save_adapters(tmp_path / "b", adapters, of=tiny_llama)
        with pytest.raises(UserError, match=rf"belong to {adapters}, which holds adapters itself"):
            find_source(str(folder))

    def test_adapters_in_a_whole_model(self, adapters, tiny_llama):
        shutil.copy(tiny_llama / "model.safetensors", adapters)
        with pytest.raises(UserError, match=r"holds adapters .* and the weights of a whole model as well"):
            find_source(str(adapters))

    def test_broken_configuration(self, adapters):
        (adapters / "adapter_config.json").write_text("{")
        with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
            find_source(str(adapters))

    def test_weights_of_another_model(self, adapters, tmp_path):
        other = save_adapters(tmp_path / "b", save_folder(tmp_path / "wide", tokenizer=None, hidden_size=64))
        shutil.copy(other / "adapter_model.safetensors", adapters)
        for rank in (0, RANK):
            with pytest.raises(UserError, match=rf"the adapters in {adapters} do not go on"):
                policy_on(adapters, rank)

    def test_pickled_weights_are_not_loaded(self, adapters):
        torch.save(read_weights(adapters), adapters / "adapter_model.bin")
        (adapters / "adapter_model.safetensors").unlink()
        with pytest.raises(UserError, match=r"no weights of adapters \(adapter_model\.safetensors\)"):
            policy_on(adapters)

    def test_adapters_on_the_head_that_the_kernels_do_not_know(self, tmp_path, tiny_llama):
        folder = save_adapters(tmp_path / "a", tiny_llama, target_modules=["lm_head"], use_dora=True)
        with pytest.raises(UserError, match="not plain LoRA"):
            policy_on(folder, RANK)
        assert policy_on(folder)(BATCH).logps.isfinite().all()
