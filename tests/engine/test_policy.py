"""The policy: shared = packed = padded = one-by-one forwards with full logits, values and gradients; its reference."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface

from fused_dpo_engine.attention import ATTENTION_NAME, packed_attention
from fused_dpo_engine.config import LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.packing import PackedBatch, pack, plan_attention
from fused_dpo_engine.padding import pad
from fused_dpo_engine.pairs import TokenPair
from fused_dpo_engine.policy import Policy, build_policy
from fused_dpo_engine.reference import score_reference
from fused_dpo_engine.self_test import self_test
from tests.engine.helpers import (
    FAMILIES,
    GPT_OSS,
    eager_twin,
    gradients,
    make_pairs,
    own_logps,
    save_folder,
    set_attention,
    tiny_model,
    unshared_plan,
    worst_gradient_error,
)
from tests.engine.test_packing import any_pairs

CPU = torch.device("cpu")


def more_pairs(first: TokenPair) -> list[TokenPair]:
    """Another pair on the prompt of `first`, and one on a prompt of its own whose rejected response goes on."""
    start = first.rejected_ids[: first.prompt_length + 4]  # beyond the prompt it begins as another response does
    sides = np.append(start, [50, 51]).astype(np.int32), np.append(start[:-1], [52]).astype(np.int32)
    chosen = np.arange(100, 111, dtype=np.int32)
    longer = np.append(chosen, [60, 61, 62]).astype(np.int32)
    return [TokenPair(first.prompt_length, *sides, "pairs.jsonl:5"), TokenPair(6, chosen, longer, "pairs.jsonl:6")]


PAIRS = make_pairs((5, 7, 3), (12, 1, 16), (1, 9, 9), (20, 2, 1))  # beyond and below the windows of 8, one-token sides
PAIRS += more_pairs(PAIRS[1])
ORDER = [2, 4, 0, 5, 3, 1]
BATCH, UNSHARED = pack(PAIRS, ORDER), pack(PAIRS, ORDER, share=False)
LAYOUTS = {"shared": BATCH, "packed": UNSHARED}
ORDERED = [PAIRS[i] for i in BATCH.pair_indices]

VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 2e-5
"""Relative, in float64: eager attention and RMSNorm go through fp32 inside the models."""
EXACT = {"gpt2": 1e-11}
"""Families that stay in float64 throughout are held to more."""


def policy_of(model: Any, **settings: Any) -> Policy:
    """No autocast, so everything is computed in the dtype of the weights."""
    return Policy(model, torch.float32, **settings)


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest error of a sequence's log-prob."""
    return float(((got - expected) / expected).detach().abs().max())


def replaced(batch: PackedBatch, **changes: Any) -> PackedBatch:
    return dataclasses.replace(batch, **changes)


def merged(batch: PackedBatch) -> PackedBatch:
    """Sequences see each other."""
    return replaced(batch, attention=unshared_plan(0, batch.num_slots))


def rows_before(batch: PackedBatch) -> PackedBatch:
    """Every response token is predicted from one row too early, the first of a sequence from its neighbour."""
    return replaced(batch, scored_rows=(batch.scored_rows - 1) % batch.num_slots)


def rows_after(batch: PackedBatch) -> PackedBatch:
    """Every token "predicts" itself: labels were not shifted."""
    return replaced(batch, scored_rows=batch.scored_rows + 1)


def positions_running_on(batch: PackedBatch) -> PackedBatch:
    """Positions not reset. Rotary embeddings see distances only, so without shared prefixes only learned positions
    notice."""
    return replaced(batch, position_ids=torch.arange(batch.num_slots)[None])


def another_prefix(batch: PackedBatch) -> PackedBatch:
    """Branches see the beginning of another pair."""
    segments = list(batch.attention.segments)
    trunks = [at for at, segment in enumerate(segments) if segment.trunk == at]
    for at, segment in enumerate(segments):
        if segment.shared:
            other = trunks[(trunks.index(segment.trunk) + 1) % len(trunks)]
            length = segments[other].stop - segments[other].start
            segments[at] = segment._replace(trunk=other, shared=min(segment.shared, length))
    return replaced(batch, attention=plan_attention(segments))


def no_prefix(batch: PackedBatch) -> PackedBatch:
    """Branches see themselves alone."""
    return replaced(batch, attention=unshared_plan(*batch.attention.cu_q.tolist()))


def positions_stuck(batch: PackedBatch) -> PackedBatch:
    return replaced(batch, position_ids=torch.zeros_like(batch.position_ids))


MISTAKES: list[Callable[[PackedBatch], PackedBatch]] = [merged, rows_before, rows_after, positions_stuck]
MISTAKES_OF_SHARING = [another_prefix, no_prefix, positions_running_on]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(family):
    """A model, and the truth about `BATCH`: log-probs, a direction, and all gradients along it."""
    model = tiny_model(family)
    twin = eager_twin(model)
    expected = own_logps(twin, ORDERED)
    upstream = torch.randn(len(expected), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = gradients(twin, expected @ upstream)
    return family, model, expected.detach(), upstream, grads


class TestEveryLayoutEqualsOneByOne:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_values_and_every_gradient(self, case, layout):
        family, model, expected, upstream, expected_grads = case
        logps = policy_of(model)(LAYOUTS[layout])
        assert relative(logps, expected) < EXACT.get(family, VALUE_TOLERANCE)
        grads = gradients(model, logps @ upstream)
        assert worst_gradient_error(grads, expected_grads) < EXACT.get(family, GRADIENT_TOLERANCE)

    def test_padded_through_the_models_own_attention(self, family):
        # In float64 eager's bound of masked scores overflows its fp32 softmax: padding beyond a window becomes NaN.
        exact = family != "gemma2"
        settings: dict[str, Any] = {} if exact else {"dtype": torch.float32, "scale": 3.0}
        model = tiny_model(family, attention="sdpa" if exact else "eager", **settings)
        expected = own_logps(model, ORDERED)
        logps = policy_of(model)(pad(PAIRS, ORDER))
        assert relative(logps, expected) < (VALUE_TOLERANCE if exact else 1e-5)
        grads = gradients(model, logps.sum())
        assert worst_gradient_error(grads, gradients(model, expected.sum())) < (GRADIENT_TOLERANCE if exact else 1e-4)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_attention_sinks(self, layout):
        model = tiny_model("gpt_oss", dtype=torch.float32, scale=3.0, **GPT_OSS)
        twin = eager_twin(model)
        logps, expected = policy_of(model)(LAYOUTS[layout]), own_logps(twin, ORDERED)
        assert relative(logps, expected) < 1e-5  # all in fp32
        assert worst_gradient_error(gradients(model, logps.sum()), gradients(twin, expected.sum())) < 1e-4

    @pytest.mark.parametrize(
        ("layout", "mistake"),
        [(layout, mistake) for layout in LAYOUTS for mistake in MISTAKES]
        + [("shared", mistake) for mistake in MISTAKES_OF_SHARING],
        ids=lambda value: value if isinstance(value, str) else value.__name__,
    )
    def test_mistakes_show(self, case, layout, mistake):
        """Negative control: the comparison above would notice."""
        _, model, expected, upstream, expected_grads = case
        logps = policy_of(model)(mistake(LAYOUTS[layout]))
        assert relative(logps, expected) > 1000 * VALUE_TOLERANCE
        assert worst_gradient_error(gradients(model, logps @ upstream), expected_grads) > 1000 * GRADIENT_TOLERANCE

    def test_positions_that_run_on_show(self, case):
        family, model, expected, *_ = case
        few = pack(PAIRS, ORDER[:3], share=False)  # as many tokens as models have positions
        error = relative(policy_of(model)(positions_running_on(few)), expected[:6])
        assert error > 0.01 if family in ("gpt2", "opt") else error < VALUE_TOLERANCE

    def test_the_company_does_not_matter(self, case):
        _, model, expected, *_ = case
        policy = policy_of(model)
        alone = torch.cat([policy(pack(PAIRS, [i])) for i in ORDER])
        assert relative(alone, expected) < VALUE_TOLERANCE

    def test_sharing_computes_less(self):
        assert BATCH.num_slots < 0.7 * UNSHARED.num_slots == 0.7 * BATCH.num_tokens


class TestAnyShapes:
    """Small alphabets make equal prompts, equal responses, responses that extend others, and rarely nothing shared."""

    @pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
    @settings(deadline=None, max_examples=30)
    @given(pairs=any_pairs(), order=st.randoms(use_true_random=False))
    def test_shared_equals_packed_equals_one_by_one(self, family, pairs, order):
        model = model_for_shapes(family)
        indices = order.sample(range(len(pairs)), len(pairs))
        expected = own_logps(model, [pairs[i] for i in indices])
        with torch.no_grad():
            for share in (True, False):
                logps = policy_of(model)(pack(pairs, indices, share=share))
                torch.testing.assert_close(logps, expected, rtol=1e-9, atol=1e-9)


@cache
def model_for_shapes(family: str) -> Any:
    """Attention of its own on one side and no other rounding: `own_logps` runs it without a plan."""
    return tiny_model(family, num_hidden_layers=2, sliding_window=3).requires_grad_(False)


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_equal_and_really_recomputed(self, monkeypatch, family, use_reentrant):
        model = tiny_model(family)
        upstream = torch.randn(2 * len(PAIRS), dtype=torch.float64)
        plain = policy_of(model)(BATCH)
        plain_grads = gradients(model, plain @ upstream)

        plans = []

        def counted(*tensors, fused_dpo_plan=None, **settings):
            plans.append(fused_dpo_plan)
            return packed_attention(*tensors, fused_dpo_plan=fused_dpo_plan, **settings)

        set_attention(monkeypatch, counted)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        logps = policy_of(model)(BATCH)
        (logps @ upstream).backward()  # torch.autograd.grad does not go with reentrant checkpoints
        assert plans == [BATCH.attention] * 4  # two layers, forward and again in the backward
        assert torch.equal(logps, plain)
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert worst_gradient_error(grads, plain_grads) < 1e-12


class TestPrecision:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_bf16_autocast_keeps_fp32_weights_and_results(self, family):
        model = tiny_model(family, dtype=torch.float32, scale=3.0)
        exact = policy_of(model)(BATCH)
        logps = Policy(model, torch.bfloat16)(BATCH)
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
        assert torch.equal(Policy(model, torch.float64)(BATCH), policy_of(model)(BATCH))
        assert [str(warning.message) for warning in recwarn if "autocast" in str(warning.message)] == []


class TestHead:
    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_and_untied(self, tied):
        model = tiny_model(tie_word_embeddings=tied)
        twin = eager_twin(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        logps, expected = policy_of(model)(BATCH), own_logps(twin, ORDERED)
        assert relative(logps, expected) < VALUE_TOLERANCE
        grads, expected_grads = gradients(model, logps.sum()), gradients(twin, expected.sum())
        assert ("lm_head.weight" in grads) != tied
        assert worst_gradient_error(grads, expected_grads) < GRADIENT_TOLERANCE

    @pytest.mark.parametrize(("family", "setting"), [("cohere", "logit_scale"), ("granite", "logits_scaling")])
    def test_logit_factors_are_applied(self, family, setting):
        factor: dict[str, Any] = {setting: 4.0}
        model = tiny_model(family, **factor)
        expected = own_logps(eager_twin(model), ORDERED)
        assert relative(policy_of(model)(BATCH), expected) < VALUE_TOLERANCE
        setattr(model.config, setting, 1.0)  # negative control
        assert relative(policy_of(model)(BATCH), expected) > 0.01


def with_lora(model: Any, *targets: str) -> Any:
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM"))


class TestLora:
    @pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("v_proj", "lm_head")])
    def test_reference_is_the_model_without_adapters(self, targets):
        base = policy_of(tiny_model())(BATCH)
        model = with_lora(tiny_model(), *targets)
        policy = policy_of(model)
        with policy.as_reference():
            reference = policy(BATCH)
        assert torch.equal(reference, base)
        assert torch.equal(policy(BATCH), reference)  # lora_B starts at 0

        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        moved = policy(BATCH)
        with policy.as_reference():
            assert torch.equal(policy(BATCH), reference)
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
        expected = gradients(plain, policy_of(plain)(BATCH).sum())
        base = tiny_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model = with_lora(base, "q_proj")
        model.load_state_dict(plain.state_dict())
        model.train()
        policy_of(model)(BATCH).sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(grad is not None for grad in grads.values())
        assert worst_gradient_error(grads, expected) < 1e-12

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
        logps = policy_of(model, ld_alpha=alpha)(LAYOUTS.get(layout) or pad(PAIRS, ORDER))
        assert relative(logps, torch.stack(expected)) < VALUE_TOLERANCE
        grads = gradients(model, logps.sum())
        assert worst_gradient_error(grads, gradients(twin, torch.stack(expected).sum())) < GRADIENT_TOLERANCE

    def test_one_is_plain(self):
        model = tiny_model()
        plain = policy_of(model)(BATCH)
        torch.testing.assert_close(policy_of(model, ld_alpha=1.0)(BATCH), plain, rtol=1e-6, atol=1e-6)
        assert (policy_of(model, ld_alpha=0.5)(BATCH) - plain).abs().max() > 0.1


class TestReference:
    def test_bit_equal_to_the_policy_on_the_same_batches(self):
        policy = policy_of(tiny_model(dtype=torch.float32))
        batches = [pack(PAIRS, [3, 1]), pack(PAIRS, [0])]
        reference = score_reference(policy, PAIRS, batches, 3, progress=False)
        assert reference.logps.shape == (len(PAIRS), 2)
        assert reference.logps.dtype == torch.float32
        for batch in batches:
            logps = policy(batch)
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
        policy(BATCH).sum().backward()
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
        first, again = policy(BATCH), policy(BATCH)
        assert torch.equal(first, again)
        self_test(policy, PAIRS, PackingOptions())


def test_the_attention_is_registered():
    assert AttentionInterface._global_mapping[ATTENTION_NAME] is packed_attention
