"""The policy's features against the model's own full logits, its reference, and how it is built."""

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface

from fused_dpo import fused_token_logps
from fused_dpo_engine.attention.interface import ATTENTION_NAME, packed_attention
from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.batching.padding import PaddedBatch, pad
from fused_dpo_engine.config.options import LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.parity import self_test
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.reference.scoring import score_reference
from tests.engine.support.policies import (
    BATCH,
    CPU,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    ORDER,
    ORDERED,
    PAIRS,
    VALUE_TOLERANCE,
    policy_of,
    relative,
)
from tests.engine.support.toys import (
    eager_twin,
    gradients,
    own_logps,
    save_folder,
    set_attention,
    tiny_model,
    worst_gradient_error,
)


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_equal_and_really_recomputed(self, monkeypatch, family, use_reentrant):
        model = tiny_model(family)
        upstream = torch.randn(2 * len(PAIRS), dtype=torch.float64)
        plain = policy_of(model)(BATCH).logps
        plain_grads = gradients(model, plain @ upstream)

        plans = []

        def counted(*tensors, fused_dpo_plan=None, **settings):
            plans.append(fused_dpo_plan)
            return packed_attention(*tensors, fused_dpo_plan=fused_dpo_plan, **settings)

        set_attention(monkeypatch, counted)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        logps = policy_of(model)(BATCH).logps
        (logps @ upstream).backward()  # torch.autograd.grad does not go with reentrant checkpoints
        assert plans == [BATCH.attention] * 4  # two layers, forward and again in the backward
        assert torch.equal(logps, plain)
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert worst_gradient_error(grads, plain_grads) < 1e-12  # the same float64 ops again


class TestPrecision:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_bf16_autocast_keeps_fp32_weights_and_results(self, family):
        model = tiny_model(family, dtype=torch.float32, scale=3.0)
        exact = policy_of(model)(BATCH).logps
        logps = Policy(model, torch.bfloat16)(BATCH).logps
        assert logps.dtype == torch.float32
        counts = torch.stack((BATCH.chosen_lengths, BATCH.rejected_lengths), 1).flatten()
        per_token = ((logps - exact) / counts).abs().max()
        assert 1e-6 < per_token < 0.05  # it is bf16, and a good one
        grads = gradients(model, logps.sum())
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        assert worst_gradient_error(grads, gradients(model, exact.sum())) < 0.1

    def test_float64_as_compute_dtype_means_no_autocast(self, recwarn):
        """ "The dtype of the weights for none", says the class."""
        model = tiny_model()
        assert torch.equal(Policy(model, torch.float64)(BATCH).logps, policy_of(model)(BATCH).logps)
        assert [str(warning.message) for warning in recwarn if "autocast" in str(warning.message)] == []


class TestHead:
    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_and_untied(self, tied):
        model = tiny_model(tie_word_embeddings=tied)
        twin = eager_twin(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        logps, expected = policy_of(model)(BATCH).logps, own_logps(twin, ORDERED)
        assert relative(logps, expected) < VALUE_TOLERANCE
        grads, expected_grads = gradients(model, logps.sum()), gradients(twin, expected.sum())
        assert ("lm_head.weight" in grads) != tied
        assert worst_gradient_error(grads, expected_grads) < GRADIENT_TOLERANCE

    @pytest.mark.parametrize(("family", "setting"), [("cohere", "logit_scale"), ("granite", "logits_scaling")])
    def test_logit_factors_are_applied(self, family, setting):
        factor: dict[str, Any] = {setting: 4.0}
        model = tiny_model(family, **factor)
        expected = own_logps(eager_twin(model), ORDERED)
        assert relative(policy_of(model)(BATCH).logps, expected) < VALUE_TOLERANCE
        holder = model if hasattr(model, setting) else model.config  # Cohere's forward reads its own copy
        setattr(holder, setting, 1.0)  # negative control
        assert relative(policy_of(model)(BATCH).logps, expected) > 0.01


class TestScoredRows:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_head_is_told_that_all_rows_are_scored(self, monkeypatch, layout):
        """Finding them by itself, it would wait for the device in forward and backward."""
        seen = []

        def record(*arguments, **settings):
            seen.append(settings)
            return fused_token_logps(*arguments, **settings)

        monkeypatch.setattr("fused_dpo.models.fused_head.fused_token_logps", record)
        policy, batch = policy_of(tiny_model(), workspace_mib=7), LAYOUTS[layout]
        policy(batch)
        (settings,) = seen
        assert settings["row_index"].tolist() == list(range(len(batch.targets)))
        assert settings["options"].workspace_mib == 7


def with_lora(model: Any, *targets: str) -> Any:
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM"))


class TestLora:
    @pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("v_proj", "lm_head")])
    def test_reference_is_the_model_without_adapters(self, targets):
        base = policy_of(tiny_model())(BATCH).logps
        model = with_lora(tiny_model(), *targets)
        policy = policy_of(model)
        with policy.as_reference():
            reference = policy(BATCH).logps
        assert torch.equal(reference, base)
        assert torch.equal(policy(BATCH).logps, reference)  # lora_B starts at 0

        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        moved = policy(BATCH).logps
        with policy.as_reference():
            assert torch.equal(policy(BATCH).logps, reference)
        assert (moved - reference).abs().min() > 1e-3
        expected = own_logps(model, ORDERED)
        assert relative(moved, expected) < VALUE_TOLERANCE
        grads = gradients(model, moved.sum())
        assert grads
        assert all("lora_" in name for name in grads)
        assert worst_gradient_error(grads, gradients(model, expected.sum())) < GRADIENT_TOLERANCE
        self_test(policy, PAIRS, PackingOptions())

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_with_a_frozen_base(self, use_reentrant):
        plain = with_lora(tiny_model(), "q_proj")
        expected = gradients(plain, policy_of(plain)(BATCH).logps.sum())
        base = tiny_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model = with_lora(base, "q_proj")
        model.load_state_dict(plain.state_dict())
        model.train()
        policy_of(model)(BATCH).logps.sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(grad is not None for grad in grads.values())
        assert worst_gradient_error(grads, expected) < 1e-12  # the same float64 ops again

    def test_dora_on_the_head_is_refused(self):
        """Instead of scored without its magnitude."""
        model = get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head"], use_dora=True))
        with pytest.raises(NotImplementedError, match="DoRA"):
            policy_of(model)(BATCH)


class TestLengthDesensitization:
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("layout", [*LAYOUTS, "padded"])
    def test_against_slow_sums(self, alpha, layout):
        model = tiny_model(attention="eager" if layout == "padded" else ATTENTION_NAME)
        twin = eager_twin(model)
        expected = []
        for pair in ORDERED:
            shorter = min(pair.chosen_length, pair.rejected_length)
            for ids in (pair.chosen_ids, pair.rejected_ids):
                tokens = torch.tensor(ids.tolist())
                token_logps = twin(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
                total = torch.zeros((), dtype=torch.float64)
                for i, position in enumerate(range(pair.prompt_length, len(ids))):
                    weight = 1.0 if i < shorter else alpha
                    total = total + weight * token_logps[position - 1, tokens[position]]
                expected.append(total)
        logps = policy_of(model, ld_alpha=alpha)(LAYOUTS.get(layout) or pad(PAIRS, ORDER)).logps
        assert relative(logps, torch.stack(expected)) < VALUE_TOLERANCE
        grads = gradients(model, logps.sum())
        assert worst_gradient_error(grads, gradients(twin, torch.stack(expected).sum())) < GRADIENT_TOLERANCE

    def test_one_is_plain(self):
        model = tiny_model()
        plain = policy_of(model)(BATCH).logps
        assert torch.equal(policy_of(model, ld_alpha=1.0)(BATCH).logps, plain)
        assert torch.equal(policy_of(model, ld_alpha=0.5)(BATCH).plain, plain)
        assert (policy_of(model, ld_alpha=0.5)(BATCH).logps - plain).abs().max() > 0.1

    @pytest.mark.parametrize("batch", [BATCH, pad(PAIRS, ORDER)], ids=["packed", "padded"])
    def test_lengths_are_not_read_from_the_device(self, batch):
        policy = policy_of(
            tiny_model(attention="eager") if isinstance(batch, PaddedBatch) else tiny_model(), ld_alpha=0.5
        )
        nowhere = dataclasses.replace(
            batch, chosen_lengths=batch.chosen_lengths.to("meta"), rejected_lengths=batch.rejected_lengths.to("meta")
        )
        assert torch.equal(policy(nowhere).logps, policy(batch).logps)


class TestReference:
    def test_bit_equal_to_the_policy_on_the_same_batches(self):
        policy = policy_of(tiny_model(dtype=torch.float32))
        batches = [pack(PAIRS, [3, 1]), pack(PAIRS, [0])]
        reference = score_reference(policy, PAIRS, batches, 3, progress=False)
        assert reference.logps.shape == (len(PAIRS), 2)
        assert reference.logps.dtype == torch.float32
        for batch in batches:
            logps = policy(batch).logps
            assert logps.requires_grad
            assert not reference.logps.requires_grad
            chosen, rejected = reference.of(batch, CPU)
            assert torch.equal(chosen, logps[0::2])
            assert torch.equal(rejected, logps[1::2])
        assert reference.logps[2].isnan().all()  # nobody asked for it

    def test_names_the_rows_without_a_number(self):
        model = tiny_model(dtype=torch.float32)
        token = int(PAIRS[1].rejected_ids[-2])
        others = [ids for i in (0, 2, 3, 4, 5) for ids in (PAIRS[i].chosen_ids, PAIRS[i].rejected_ids)]
        assert not any(token in ids for ids in others)
        with torch.no_grad():
            model.model.embed_tokens.weight[token] = torch.nan
        with pytest.raises(UserError, match=r"no finite log-prob to pairs\.jsonl:2; "):
            score_reference(policy_of(model), PAIRS, [BATCH], 6, progress=False)


class TestBuilding:
    def test_full_training_keeps_fp32_weights(self, tiny_llama):
        policy = build_policy(ModelOptions(str(tiny_llama), dtype="bfloat16"), LoraOptions(), CPU)
        assert policy.compute_dtype == torch.bfloat16
        assert {(p.dtype, p.requires_grad) for p in policy.parameters()} == {(torch.float32, True)}
        assert policy.causal_lm.config._attn_implementation == ATTENTION_NAME

    def test_lora_freezes_the_base_in_the_compute_dtype(self, tiny_llama):
        options = ModelOptions(str(tiny_llama), dtype="bfloat16", gradient_checkpointing=True)
        policy = build_policy(options, LoraOptions(lora_rank=2, lora_target_modules=("q_proj",)), CPU)
        kinds = {("lora_" in name, p.requires_grad, p.dtype) for name, p in policy.named_parameters()}
        assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}
        assert policy.model.peft_config["default"].lora_alpha == 4  # twice the rank
        assert any(getattr(module, "gradient_checkpointing", False) for module in policy.modules())
        policy(BATCH).logps.sum().backward()
        assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)

    def test_unknown_target_modules(self, tiny_llama):
        with pytest.raises(UserError, match=r"--lora-target-modules nothing: .*not found"):
            build_policy(ModelOptions(str(tiny_llama)), LoraOptions(2, None, ("nothing",)), CPU)

    @pytest.mark.parametrize(
        ("family", "rates"),
        [
            ("gpt2", dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)),
            ("gpt_neox", dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.5)),
            ("opt", dict.fromkeys(("dropout", "attention_dropout"), 0.5)),
            ("starcoder2", dict.fromkeys(("residual_dropout", "embedding_dropout", "attention_dropout"), 0.5)),
            ("seed_oss", dict.fromkeys(("residual_dropout", "attention_dropout"), 0.5)),
        ],
    )
    def test_nothing_is_dropped_out(self, tmp_path, family, rates):
        """Dropout would make policy and reference two functions; some models call it without a module."""
        folder = save_folder(tmp_path / family, family, tokenizer=None, **rates)
        policy = build_policy(ModelOptions(str(folder), dtype="float32"), LoraOptions(), CPU)
        first, again = policy(BATCH).logps, policy(BATCH).logps
        assert torch.equal(first, again)
        self_test(policy, PAIRS, PackingOptions())


def test_the_attention_is_registered():
    assert AttentionInterface._global_mapping[ATTENTION_NAME] is packed_attention
