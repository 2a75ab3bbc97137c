"""That a run learns, and by the right numbers: against full logits, a plain loop, and the exact gradients."""

import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fused_dpo.losses import LOSS_TYPES, needs_reference
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.reference.scoring import score_reference
from tests.engine.support.runs import FIRST_LOSS, FLAT, LN2, toy_pairs, toy_steps, without_clock
from tests.engine.support.toys import assert_same_weights, largest_difference, own_logps, read_weights, save_folder


class TestSteps:
    def test_a_run_repeats_epochs(self, train_tiny):
        run = train_tiny(max_steps=6, pairs_per_step=10)  # 24 pairs: 10, 10, 4
        assert run.column("pairs") == [10, 10, 4] * 2
        assert run.column("epoch")[2::3] == [1, 2]
        assert run.summary.pairs == 48


class TestLearning:
    def test_loss_falls(self, train_tiny):
        run = train_tiny(max_steps=30, learning_rate=3e-3)
        assert run.metrics[0]["loss"] == FIRST_LOSS
        assert run.metrics[-1]["loss"] < 0.1
        assert run.metrics[-1]["rewards/accuracies"] == 1
        assert run.metrics[-1]["rewards/margins"] > 3

    @pytest.mark.parametrize("kind", ["full", "lora", "ref_model"])
    def test_rewards_are_those_of_the_saved_weights(self, train_tiny, tiny_llama, toy_data, tmp_path, kind):
        """What the run says of itself, recomputed from its folders with full logits and transformers' own attention."""
        settings: dict[str, Any] = {"eval_data": toy_data, "learning_rate": 3e-3}
        reference: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
        if kind == "lora":
            settings |= {"lora_rank": 4, "learning_rate": 1e-2}
        if kind == "ref_model":
            settings["ref_model"] = save_folder(tmp_path / "reference", seed=5)
            reference = AutoModelForCausalLM.from_pretrained(settings["ref_model"], attn_implementation="eager")
        run = train_tiny(**settings)

        pairs = toy_pairs()
        with torch.no_grad():
            ref = own_logps(reference, pairs)
            if kind == "lora":
                assert (run.output / "model" / "adapter_config.json").exists()
                model: Any = PeftModel.from_pretrained(reference, str(run.output / "model"))
            else:
                model = AutoModelForCausalLM.from_pretrained(run.output / "model", attn_implementation="eager")
            logps = own_logps(model, pairs)
        rewards = 0.1 * (logps - ref)
        chosen, rejected = rewards[0::2], rewards[1::2]
        assert (chosen - rejected).abs().mean() > 0.05  # there is something to be compared
        expected = {
            "eval_rewards/chosen": chosen.mean(),
            "eval_rewards/rejected": rejected.mean(),
            "eval_rewards/margins": (chosen - rejected).mean(),
            "eval_rewards/accuracies": (chosen > rejected).double().mean(),
            "eval_logps/chosen": logps[0::2].mean(),
            "eval_logps/rejected": logps[1::2].mean(),
            "eval_loss": -torch.nn.functional.logsigmoid(chosen - rejected).mean(),
        }
        for name, value in expected.items():
            # fp32: log-probs of some tens, in units of 2e-6, by another attention.
            assert run.summary.eval_after[name] == pytest.approx(float(value), abs=2e-5), name

        first = run.metrics[0]
        if kind == "ref_model":
            assert abs(first["rewards/margins"]) > 0.01
            assert abs(first["loss"] - LN2) > 1e-3
        else:
            assert first["loss"] == FIRST_LOSS
            assert first["rewards/chosen"] == first["rewards/rejected"] == 0

    def test_against_a_plain_loop(self, train_tiny, tiny_llama):
        """DPO as the paper has it, a pair at a time with full logits, and torch's AdamW.

        Both round in fp32, and with a large epsilon Adam does not enlarge what is left of that.
        """
        run = train_tiny(max_steps=6, adam_epsilon=1e-2, learning_rate=1e-2, max_grad_norm=2.0, beta=0.3, **FLAT)

        pairs = toy_pairs()
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
        with torch.no_grad():
            ref = own_logps(model, pairs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, weight_decay=0)
        for line, indices in zip(run.metrics, toy_steps(6), strict=True):
            losses, margins = [], []
            for i in indices:
                chosen, rejected = own_logps(model, [pairs[i]]) - ref[2 * i : 2 * i + 2]
                margins.append(0.3 * (chosen - rejected))
                losses.append(-torch.nn.functional.logsigmoid(margins[-1]))
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
            assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
            assert line["rewards/margins"] == pytest.approx(torch.stack(margins).mean().item(), abs=1e-5)
        assert abs(run.metrics[-1]["loss"] - LN2) > 0.1  # the steps have done something
        assert largest_difference(run.weights(), dict(model.state_dict())) < 1e-6

    @pytest.mark.parametrize("packing", [True, False])
    def test_desensitized_preferences_beside_a_plain_sft_term(self, train_tiny, tiny_llama, toy_data, packing):
        """LD-DPO weighs tokens to compare two responses; the likelihood of a token is what it is."""
        settings: dict[str, Any] = {"ld_alpha": 0.25, "sft_weight": 0.5, "eval_data": toy_data, "packing": packing}
        run = train_tiny(**settings, max_steps=1, max_grad_norm=0)

        def check(got: dict[str, float], prefix: str, indices: list[int]) -> torch.Tensor:
            chosen = [pairs[i] for i in indices]
            logps = own_logps(model, chosen)
            lengths = torch.tensor([[pair.chosen_length, pair.rejected_length] for pair in chosen])
            nll_loss = -logps[0::2].sum() / lengths[:, 0].sum()
            likelier = logps[0::2] / lengths[:, 0] > logps[1::2] / lengths[:, 1]
            expected = {
                "nll_loss": nll_loss,
                "logps/chosen": logps[0::2].mean(),
                "logps/rejected": logps[1::2].mean(),
                "logps/accuracies": likelier.double().mean(),
                "loss": LN2 + 0.5 * nll_loss,  # before the first update
            }
            for name, value in expected.items():
                assert got[prefix + name] == pytest.approx(value.item(), abs=2e-5), name
            return nll_loss

        model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
        pairs = toy_pairs()
        assert any(pair.chosen_length > pair.rejected_length for pair in pairs)  # the weights matter
        check(run.summary.eval_before, "eval_", list(range(24)))
        (indices,) = toy_steps(1)
        nll_loss = check(run.metrics[0], "", indices)
        assert run.metrics[0]["rewards/margins"] == 0

        # The gradient: that of DPO at margin 0 on weighted sums, and that of the plain likelihood.
        total = 0.5 * nll_loss
        for i in indices:
            shorter = min(pairs[i].chosen_length, pairs[i].rejected_length)
            for sign, ids in ((1, pairs[i].chosen_ids), (-1, pairs[i].rejected_ids)):
                tokens = torch.tensor(ids.tolist())
                token_logps = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
                scored = token_logps.gather(1, tokens[1:, None])[pairs[i].prompt_length - 1 :, 0]
                total = total - sign * 0.05 * (scored[:shorter].sum() + 0.25 * scored[shorter:].sum()) / len(indices)
        grads = torch.autograd.grad(total, list(model.parameters()))
        norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        assert run.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)

    def test_reference_sees_the_batches_of_training(self, train_tiny, monkeypatch):
        """In larger models another batch shape gives other last bits, and the first rewards were not exactly 0."""
        scored, trained = [], []
        forward, passes = Policy.forward, []

        def recorded(self, batch):
            passes.append(batch)
            if torch.is_grad_enabled():
                trained.append(batch.pair_indices)
            return forward(self, batch)

        def recorded_score(policy, pairs, batches, *arguments, **settings):
            batches = list(batches)
            scored.extend(batch.pair_indices for batch in batches)
            return score_reference(policy, pairs, batches, *arguments, **settings)

        monkeypatch.setattr(Policy, "forward", recorded)
        monkeypatch.setattr("fused_dpo_engine.reference.run.score_reference", recorded_score)
        train_tiny(max_steps=6)
        assert sorted(i for indices in scored for i in indices) == list(range(24))
        assert trained[: len(scored)] == scored
        assert len(trained) > len(scored)
        assert len(passes) == len(trained) + len(scored) + 1, "and the set-up test"

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_every_loss(self, train_tiny, tiny_llama, monkeypatch, loss_type):
        scored = []
        score = Policy.as_reference
        monkeypatch.setattr(Policy, "as_reference", lambda self: scored.append(self) or score(self))
        run = train_tiny(loss_type=loss_type, max_steps=2, eval_fraction=0.2)
        values = [value for line in run.metrics for value in line.values()]
        assert all(math.isfinite(value) for value in values)
        assert all(math.isfinite(value) for value in run.summary.eval_after.values())
        assert all(norm > 0 for norm in run.column("grad_norm"))
        assert largest_difference(run.weights(), read_weights(tiny_llama)) > 1e-4
        assert bool(scored) == needs_reference(loss_type)

    def test_ld_alpha(self, train_tiny):
        plain, same, other = (
            train_tiny(name, ld_alpha=alpha, max_steps=2)
            for name, alpha in (("plain", None), ("one", 1.0), ("half", 0.5))
        )
        assert other.metrics[0]["loss"] == FIRST_LOSS
        assert other.metrics[0]["rewards/chosen"] == 0
        assert same.metrics[1]["loss"] == pytest.approx(plain.metrics[1]["loss"], abs=1e-6)  # fp32
        assert other.metrics[0]["logps/chosen"] == plain.metrics[0]["logps/chosen"]  # what the model says of the texts
        assert abs(other.metrics[1]["rewards/chosen"] - plain.metrics[1]["rewards/chosen"]) > 0.01

    def test_sft_term(self, train_tiny):
        run = train_tiny(sft_weight=0.5, max_steps=1)
        (line,) = run.metrics
        assert line["loss"] == pytest.approx(LN2 + 0.5 * line["nll_loss"], abs=1e-6)  # fp32
        assert line["nll_loss"] > 0.1

    def test_bfloat16_keeps_fp32_weights(self, train_tiny, tiny_llama):
        """Updates far below the spacing of bf16 numbers arrive."""
        run = train_tiny(dtype="bfloat16", learning_rate=1e-6, **FLAT)
        weights = run.weights()
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert 1e-6 < largest_difference(weights, read_weights(tiny_llama)) < 4e-6
        assert run.metrics[0]["loss"] == FIRST_LOSS
        assert run.metrics[0]["rewards/chosen"] == 0

    def test_the_gradient_is_clipped(self, train_tiny, tiny_llama):
        """With a large epsilon Adam's first update is the gradient itself, as much of it as is left.

        Up to its own size, which Adam adds to epsilon: a thousandth.
        """
        settings = {"adam_epsilon": 1e3, "learning_rate": 1e3, "max_steps": 1, **FLAT}
        moves = {}
        for limit in (0, 0.1, 1e6):
            run = train_tiny(f"limit {limit}", max_grad_norm=limit, **settings)
            weights, start = run.weights(), read_weights(tiny_llama)
            moves[limit] = math.sqrt(sum(float((weights[n] - start[n]).square().sum()) for n in start))
            assert run.metrics[0]["grad_norm"] == pytest.approx(moves[0], rel=1e-3)  # reported before clipping
        assert moves[1e6] == moves[0] > 1
        assert moves[0.1] == pytest.approx(0.1, rel=1e-3)

    def test_gradient_checkpointing_changes_nothing(self, train_tiny):
        plain, checkpointed = train_tiny("plain"), train_tiny("checkpointed", gradient_checkpointing=True)
        assert without_clock(plain.metrics) == without_clock(checkpointed.metrics)
        assert_same_weights(checkpointed.weights(), plain.weights())


class TestHeadGradients:
    """`--grad-mode`: what the head keeps of the vocabulary is logged, and hardly changes the training."""

    def test_filtered_beside_exact(self, train_tiny, tmp_path):
        model = save_folder(tmp_path / "peaked", scale=60.0)  # of flat distributions everything is kept
        common = {"model": model, "max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-2}
        exact = train_tiny("exact", grad_mode="exact", **common)
        filtered = train_tiny("filtered", grad_mode="filtered", **common)
        assert exact.column("head/kept") == [1.0] * 4
        assert exact.column("head/tail") == [0.0] * 4
        assert all(0 < kept < 0.5 for kept in filtered.column("head/kept"))
        assert all(0 < tail < 0.01 for tail in filtered.column("head/tail"))
        assert filtered.column("loss")[0] == FIRST_LOSS
        assert exact.column("loss")[0] == FIRST_LOSS
        assert filtered.column("loss") != exact.column("loss")
        # Gradients are off by 2.2 % at most (see `fused_dpo.filtering`), which moves the loss by 1.5e-5 in four steps.
        assert filtered.column("loss") == pytest.approx(exact.column("loss"), abs=1e-4)
        assert max(exact.column("loss")) - min(exact.column("loss")) > 0.01, "the steps do something"

    def test_auto_is_exact_in_float32(self, train_tiny):
        assert train_tiny("auto", max_steps=1).column("head/kept") == [1.0]
