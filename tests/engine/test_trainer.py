"""Runs end to end on a tiny model: what they write, that they learn, repeat, accumulate exactly and stop well."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_dpo.losses import LOSS_TYPES, needs_reference
from fused_dpo_engine.cli import parse_train
from fused_dpo_engine.config import PackingOptions, RunOptions
from fused_dpo_engine.data import Row, read_rows
from fused_dpo_engine.errors import TrainingDivergedError, UserError
from fused_dpo_engine.pairs import TokenPair
from fused_dpo_engine.policy import Policy
from fused_dpo_engine.run import train
from fused_dpo_engine.schedule import Schedule
from fused_dpo_engine.tokenization import tokenize_pairs
from fused_dpo_engine.trainer import Trainer
from tests.engine.helpers import (
    Run,
    assert_same_weights,
    byte_tokenizer,
    largest_difference,
    options,
    own_logps,
    read_metrics,
    read_weights,
    save_folder,
    toy_rows,
    write_rows,
)

LN2 = math.log(2)
FLAT = {"schedule": "constant", "warmup_ratio": 0.0}
"""A course of the learning rate that does not depend on the length of the run."""
CLOCK = ("seconds", "tokens_per_second", "peak_memory_gib")
"""Metrics that differ from run to run."""
DOCUMENTED = {
    "step",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "learning_rate",
    "grad_norm",
    "head/kept",
    "head/tail",
    "tokens_per_second",
}
"""Metrics of every step that users may rely on."""


def without_clock(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in metrics]


def toy_pairs() -> list[TokenPair]:
    """The tokens of the toy data."""
    rows = [Row(values, "toy") for values in toy_rows(24)]
    return tokenize_pairs(rows, byte_tokenizer(), max_length=48).pairs


def toy_steps(steps: int, pairs_per_step: int = 6) -> list[list[int]]:
    """Pair indices of the toy run's steps."""
    run = RunOptions(output="", max_steps=steps, pairs_per_step=pairs_per_step)
    return [step.indices for step in Schedule(toy_pairs(), run, PackingOptions())]


def swapped(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


class TestFiles:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory, toy_settings) -> Run:
        output = tmp_path_factory.mktemp("runs") / "new" / "run"
        settings = {**toy_settings, "output": output, "tensorboard": True, "eval_fraction": 0.25, "eval_steps": 2}
        return Run(output, train(parse_train(options(**settings))))

    def test_what_is_there(self, run):
        names = {path.name for path in run.output.iterdir()}
        assert names == {"config.json", "metrics.jsonl", "summary.json", "tensorboard", "model", "best"}

    def test_config_is_resolved_and_readable_again(self, run):
        path = run.output / "config.json"
        again = parse_train(["--config", str(path)])
        assert json.loads(json.dumps(again.flat())) == json.loads(path.read_text(encoding="utf-8"))
        assert again.model.device in ("cpu", "cuda")
        assert again.model.dtype == "float32"
        assert again.optimizer.learning_rate == 1e-3
        assert parse_train(["--config", str(path), "--output", "elsewhere"]).run.output == "elsewhere"

    def test_automatic_choices_are_in_the_config(self, train_tiny):
        run = train_tiny(max_length=None, dtype="auto", device=None, max_steps=1)
        flat = json.loads((run.output / "config.json").read_text(encoding="utf-8"))
        assert flat["max_length"] == 48  # half of tokens_per_batch, as the model has 128 positions
        assert flat["dtype"] in ("float32", "bfloat16")
        assert flat["device"] in ("cpu", "cuda")

    def test_metrics(self, run):
        metrics = run.metrics
        assert [line["step"] for line in metrics] == [1, 2, 3]
        for line in metrics:
            assert line.keys() >= DOCUMENTED
            assert all(math.isfinite(value) for value in line.values())
            assert line["grad_norm"] > 0
            assert line["tokens_per_second"] > 0
            assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)
        assert run.column("learning_rate") == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])  # no warm-up in three steps
        evaluated = [{name for name in line if name.startswith("eval_")} for line in metrics]
        assert not evaluated[0]
        assert evaluated[1] == evaluated[2] == run.summary.eval_before.keys()
        assert {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= evaluated[1]

    def test_first_step_is_exact(self, run):
        first = run.metrics[0]
        assert first["loss"] == pytest.approx(LN2, abs=1e-6)
        assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
        assert run.summary.eval_before["eval_loss"] == pytest.approx(LN2, abs=1e-6)
        assert run.summary.eval_before["eval_rewards/margins"] == 0

    def test_summary(self, run):
        summary = json.loads((run.output / "summary.json").read_text(encoding="utf-8"))
        assert summary == run.summary.as_dict()
        assert (summary["steps"], summary["pairs"], summary["stopped"]) == (3, 18, "all steps done")
        assert summary["tokens"] == sum(run.column("tokens"))
        assert summary["eval_after"]["eval_loss"] == run.metrics[-1]["eval_loss"]

    @pytest.mark.parametrize("name", ["model", "best"])
    def test_model_loads_and_has_moved(self, run, tiny_llama, name):
        model: Any = AutoModelForCausalLM.from_pretrained(run.output / name)
        tokenizer = AutoTokenizer.from_pretrained(run.output / name)
        start = read_weights(tiny_llama)
        assert 1e-4 < largest_difference(run.weights(name), start) < 1e-2
        assert tokenizer.chat_template == byte_tokenizer().chat_template
        ids = torch.tensor([tokenizer("is it? ").input_ids])
        assert model(input_ids=ids).logits.isfinite().all()

    def test_tensorboard_shows_the_same_numbers(self, run):
        board = EventAccumulator(str(run.output / "tensorboard"))
        board.Reload()
        tags = board.Tags()["scalars"]
        for tag, name in (("train/loss", "loss"), ("rewards/margins", "rewards/margins"), ("train/grad_norm",) * 2):
            assert tag in tags
            values = board.Scalars(tag)
            assert [event.step for event in values] == [1, 2, 3]
            assert [event.value for event in values] == pytest.approx(run.column(name.removeprefix("train/")))
        assert [event.step for event in board.Scalars("train/eval_loss")] == [0, 2, 3]

    def test_no_tensorboard(self, train_tiny):
        assert not (train_tiny(max_steps=1).output / "tensorboard").exists()


class TestSteps:
    def test_a_run_repeats_epochs(self, train_tiny):
        run = train_tiny(max_steps=6, pairs_per_step=10)  # 24 pairs: 10, 10, 4
        assert run.column("pairs") == [10, 10, 4] * 2
        assert run.column("epoch")[2::3] == [1, 2]
        assert run.summary.pairs == 48


class TestLearning:
    def test_loss_falls(self, train_tiny):
        run = train_tiny(max_steps=30, learning_rate=3e-3)
        assert run.metrics[0]["loss"] == pytest.approx(LN2, abs=1e-6)
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

        pairs = tokenize_pairs(read_rows(toy_data), byte_tokenizer(), max_length=48).pairs
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
            assert run.summary.eval_after[name] == pytest.approx(float(value), abs=1e-4), name

        first = run.metrics[0]
        if kind == "ref_model":
            assert abs(first["rewards/margins"]) > 0.01
            assert abs(first["loss"] - LN2) > 1e-3
        else:
            assert first["loss"] == pytest.approx(LN2, abs=1e-6)
            assert first["rewards/chosen"] == first["rewards/rejected"] == 0

    def test_against_a_plain_loop(self, train_tiny, tiny_llama, toy_data):
        """DPO as the paper has it, a pair at a time with full logits, and torch's AdamW."""
        run = train_tiny(max_steps=6, adam_epsilon=1e-2, learning_rate=1e-2, max_grad_norm=2.0, beta=0.3, **FLAT)

        pairs = tokenize_pairs(read_rows(toy_data), byte_tokenizer(), max_length=48).pairs
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
            assert line["loss"] == pytest.approx(loss.item(), abs=1e-4)
            assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
            assert line["rewards/margins"] == pytest.approx(torch.stack(margins).mean().item(), abs=1e-3)
        assert abs(run.metrics[-1]["loss"] - LN2) > 0.1  # the steps have done something
        assert largest_difference(run.weights(), dict(model.state_dict())) < 1e-4

    def test_reference_sees_the_batches_of_training(self, train_tiny, monkeypatch):
        """In larger models another batch shape gives other last bits, and the first rewards were not exactly 0."""
        scored, trained = [], []
        forward = Policy.forward

        def recorded(self, batch):
            (trained if torch.is_grad_enabled() else scored).append(batch.pair_indices)
            return forward(self, batch)

        monkeypatch.setattr(Policy, "forward", recorded)
        train_tiny(max_steps=6)
        assert sorted(i for indices in scored for i in indices) == list(range(24))
        assert trained[: len(scored)] == scored
        assert len(trained) > len(scored)

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
        assert other.metrics[0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert other.metrics[0]["rewards/chosen"] == 0
        assert same.metrics[1]["loss"] == pytest.approx(plain.metrics[1]["loss"], abs=1e-5)
        assert abs(other.metrics[0]["logps/chosen"] - plain.metrics[0]["logps/chosen"]) > 0.1

    def test_sft_term(self, train_tiny):
        run = train_tiny(sft_weight=0.5, max_steps=1)
        (line,) = run.metrics
        assert line["loss"] == pytest.approx(LN2 + 0.5 * line["nll_loss"], abs=1e-5)
        assert line["nll_loss"] > 0.1

    def test_bfloat16_keeps_fp32_weights(self, train_tiny, tiny_llama):
        """Updates far below the spacing of bf16 numbers arrive."""
        run = train_tiny(dtype="bfloat16", learning_rate=1e-6, **FLAT)
        weights = run.weights()
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert 1e-6 < largest_difference(weights, read_weights(tiny_llama)) < 4e-6
        assert run.metrics[0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert run.metrics[0]["rewards/chosen"] == 0

    def test_the_gradient_is_clipped(self, train_tiny, tiny_llama):
        """With a large epsilon Adam's first update is the gradient itself, as much of it as is left."""
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

    def test_filtered_beside_exact(self, train_tiny):
        common = {"max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-2}
        exact = train_tiny("exact", grad_mode="exact", **common)
        filtered = train_tiny("filtered", grad_mode="filtered", **common)
        assert exact.column("head/kept") == [1.0] * 4
        assert exact.column("head/tail") == [0.0] * 4
        assert all(0 < kept <= 1 for kept in filtered.column("head/kept"))
        assert filtered.column("loss")[0] == pytest.approx(exact.column("loss")[0], abs=1e-6)
        assert filtered.column("loss") == pytest.approx(exact.column("loss"), abs=1e-3)
        assert max(exact.column("loss")) - min(exact.column("loss")) > 0.01, "the steps do something"

    def test_auto_is_exact_in_float32(self, train_tiny):
        assert train_tiny("auto", max_steps=1).column("head/kept") == [1.0]


class TestAccumulation:
    @pytest.mark.parametrize(
        ("settings", "micro_batches"),
        [
            ({"pairs_per_step": 5}, [1, 1, 1, 1, 1]),  # 24 pairs: the last step has 4
            ({"pairs_per_step": 5, "sft_weight": 0.5}, [1, 1, 1, 1, 1]),
            ({"pairs_per_step": 7, "loss_type": "ipo_norm", "sft_weight": 1.0}, [1, 1, 1, 1]),
        ],
    )
    def test_tokens_per_batch_sets_no_result(self, train_tiny, settings, micro_batches):
        # Adam divides by the gradient's own size, which turns rounding of tiny gradients into whole updates: damped.
        common = {
            "max_steps": len(micro_batches),
            "learning_rate": 3e-2,
            "adam_epsilon": 1e-2,
            "max_length": 30,
            **settings,
        }
        whole = train_tiny("whole", tokens_per_batch=4000, **common)
        split = train_tiny("split", tokens_per_batch=60, **common)
        assert whole.column("micro_batches") == micro_batches
        assert all(count >= 2 for count in split.column("micro_batches"))
        assert len({*split.column("micro_batches")}) > 1  # uneven
        assert whole.column("tokens") == split.column("tokens")
        losses = whole.column("loss")
        assert max(losses) - min(losses) > 1e-3  # the steps do something
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/gap"):
            assert split.column(name) == pytest.approx(whole.column(name), rel=1e-4, abs=1e-4), name
        assert largest_difference(split.weights(), whole.weights()) < 2e-5

    def test_four_times_one_is_one_times_four(self, train_tiny, tmp_path):
        """Pairs of one length, so that a budget of one pair gives four micro-batches of one."""
        rows = [{"prompt": f"is it {i}? ", "chosen": "yes", "rejected": "non"} for i in range(8)]
        data = write_rows(tmp_path / "even.jsonl", rows)
        common = {"data": data, "pairs_per_step": 4, "max_length": 14, "max_steps": 4, "adam_epsilon": 1e-2}
        four = train_tiny("four", tokens_per_batch=28, sft_weight=0.3, **common)
        one = train_tiny("one", tokens_per_batch=4 * 28, sft_weight=0.3, **common)
        assert four.column("micro_batches") == [4] * 4
        assert one.column("micro_batches") == [1] * 4
        assert four.column("loss") == pytest.approx(one.column("loss"), rel=1e-5)
        assert largest_difference(four.weights(), one.weights()) < 1e-6


LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "packed": {"prefix_sharing": False},
    "padded": {"packing": False},
}


class TestLayouts:
    @pytest.fixture(scope="class")
    @staticmethod
    def runs(tmp_path_factory, toy_settings) -> dict[str, Run]:
        """The same run in every layout; with a large epsilon, so that Adam does not enlarge what rounding is left."""
        made = {}
        for name, layout in LAYOUTS.items():
            output = tmp_path_factory.mktemp("layouts") / name
            settings = {**toy_settings, "eval_fraction": 0.25, "adam_epsilon": 1e-2, "learning_rate": 3e-2, **layout}
            made[name] = Run(output, train(parse_train(options(**{**settings, "output": output}))))
        return made

    @pytest.mark.parametrize("layout", ["packed", "padded"])
    def test_all_give_the_same_run(self, runs, layout):
        shared, other = runs["shared"], runs[layout]
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "pairs", "tokens"):
            assert other.column(name) == pytest.approx(shared.column(name), rel=1e-4, abs=1e-5), name
        assert other.summary.eval_after["eval_loss"] == pytest.approx(shared.summary.eval_after["eval_loss"], abs=1e-5)
        assert abs(shared.metrics[-1]["loss"] - LN2) > 0.01  # there is something to be compared
        assert largest_difference(other.weights(), shared.weights()) < 1e-5

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_first_step_is_exact(self, runs, layout):
        first = runs[layout].metrics[0]
        assert first["loss"] == pytest.approx(LN2, abs=1e-6)
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0
        assert runs[layout].summary.eval_before["eval_rewards/margins"] == 0

    def test_what_becomes_of_the_token_slots(self, runs):
        pairs = toy_pairs()
        for name, run in runs.items():
            for line in run.metrics:
                assert (line["packing/shared"] > 0.2) == (name == "shared")
                assert (line["packing/padding"] > 0.05) == (name == "padded")
                assert 0 < line["packing/fill"] <= 1
            summary = run.summary
            assert summary.shared == pytest.approx(0 if name != "shared" else summary.shared, abs=1e-9)
            # Real tokens whatever the layout, and the slots that follow from them.
            slots = summary.fill * 96 * sum(run.column("micro_batches"))
            assert slots == pytest.approx(summary.tokens * (1 - summary.shared) / (1 - summary.padding))
        assert runs["shared"].summary.tokens == runs["padded"].summary.tokens <= sum(pair.num_tokens for pair in pairs)
        assert runs["shared"].summary.fill > 0.6

    def test_steps_of_full_forward_passes(self, train_tiny):
        run = train_tiny(batches_per_step=2, max_steps=None, epochs=2, tokens_per_batch=160, pairs_per_step=1)
        steps = len(run.metrics)
        assert run.summary.steps == run.summary.planned_steps == steps
        assert run.column("micro_batches")[0] == 2
        assert run.summary.pairs == 48
        assert len({*run.column("pairs")}) > 1  # as many as fit
        assert run.summary.fill > 0.8
        assert run.metrics[0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert run.metrics[0]["rewards/chosen"] == 0

    def test_the_log_names_layout_and_attention(self, train_tiny, capfd):
        expected = {
            "shared": "packed, prefixes shared, attention sdpa",
            "packed": "packed, prefixes not shared, attention sdpa",
            "padded": "padded batches, attention sdpa",
        }
        for name, layout in LAYOUTS.items():
            train_tiny(name, max_steps=1, **layout)
            assert expected[name] in capfd.readouterr().err

    def test_a_backend_that_is_not_there(self, train_tiny):
        with pytest.raises(UserError, match="--attention flash_attn_3"):
            train_tiny(attention="flash_attn_3")

    def test_compile_comes_after_the_self_test_and_before_any_score(self, train_tiny, monkeypatch):
        done = []
        monkeypatch.setattr("fused_dpo_engine.run.self_test", lambda *_: done.append("self-test"))
        monkeypatch.setattr(Policy, "compile_backbone", lambda _: done.append("compile"))
        training_forward(monkeypatch, lambda _, __, logps: done.append("step") or logps)
        train_tiny(compile=True, max_steps=1)
        assert done[:3] == ["self-test", "compile", "step"]


class TestRepeatability:
    @pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"dtype": "bfloat16"}], ids=str)
    def test_same_seed_same_bits(self, train_tiny, settings):
        runs = [train_tiny(name, seed=7, eval_fraction=0.25, **settings) for name in ("a", "b")]
        assert without_clock(runs[0].metrics) == without_clock(runs[1].metrics)
        assert_same_weights(runs[0].weights(), runs[1].weights())

    def test_another_seed_differs(self, train_tiny):
        a, b = train_tiny("a", seed=1), train_tiny("b", seed=2)
        assert without_clock(a.metrics) != without_clock(b.metrics)
        assert largest_difference(a.weights(), b.weights()) > 1e-5

    def test_the_seed_draws_the_adapters(self, train_tiny):
        a, b = (train_tiny(name, seed=seed, lora_rank=2, max_steps=1) for name, seed in (("a", 1), ("b", 2)))
        assert largest_difference(a.weights(), b.weights()) > 1e-3


class TestEvaluation:
    @pytest.mark.parametrize("metric", ["eval_loss", "eval_rewards/margins"])
    @pytest.mark.parametrize("better", [True, False])
    def test_best_is_the_best_evaluation(self, train_tiny, tmp_path, metric, better):
        """Held-out pairs like the training pairs get better to the end, pairs with the sides swapped only worse."""
        rows = toy_rows(24)
        data = write_rows(tmp_path / "held_out.jsonl", rows if better else swapped(rows))
        run = train_tiny(max_steps=4, eval_data=data, eval_steps=1, best_metric=metric, learning_rate=3e-3, **FLAT)
        values = run.column(metric)
        best = 4 if better else 1
        assert values[best - 1] == (min(values) if metric == "eval_loss" else max(values))
        assert (run.summary.best_step, run.summary.best_value) == (best, values[best - 1])
        assert run.summary.eval_after["eval_loss"] == run.metrics[-1]["eval_loss"]
        alone = train_tiny("alone", max_steps=best, learning_rate=3e-3, **FLAT)
        assert_same_weights(run.weights("best"), alone.weights())

    @pytest.fixture
    def told(self, monkeypatch) -> Callable[..., None]:
        """Evaluations say what they are told to, the one before training first."""

        def tell(*values: float) -> None:
            coming = iter(values)

            def evaluate(_) -> dict[str, float]:
                value = next(coming)
                return {"eval_loss": value, "eval_rewards/accuracies": value, "eval_rewards/margins": value}

            monkeypatch.setattr(Trainer, "evaluate", evaluate)

        return tell

    def test_early_stopping(self, train_tiny, told):
        told(9, 0.6, 0.4, 0.5, 0.4, 0.1)  # a tie is no gain
        settings = {"max_steps": 9, "eval_fraction": 0.25, "eval_steps": 1, **FLAT}
        run = train_tiny(early_stopping_patience=2, **settings)
        assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
        assert "early stopping" in run.summary.stopped
        assert (run.summary.steps, run.summary.best_step, run.summary.best_value) == (4, 2, 0.4)
        for name, steps in (("best", 2), ("model", 4)):
            told(9, 9)
            alone = train_tiny(f"until {steps}", **{**settings, "max_steps": steps, "eval_steps": 0})
            assert_same_weights(run.weights(name), alone.weights())

    def test_a_gain_resets_patience(self, train_tiny, told):
        told(9, 0.6, 0.7, 0.5, 0.6, 0.4)
        run = train_tiny(max_steps=5, eval_fraction=0.25, eval_steps=1, early_stopping_patience=2)
        assert (run.summary.steps, run.summary.best_step, run.summary.stopped) == (5, 5, "all steps done")

    def test_no_patience_never_stops(self, train_tiny, told):
        told(0, 1, 2, 3, 4)
        run = train_tiny(max_steps=4, eval_fraction=0.25, eval_steps=1)
        assert (run.summary.steps, run.summary.best_step) == (4, 1)

    def test_an_evaluation_without_a_number_is_never_the_best(self, train_tiny, told):
        told(9, math.nan, 0.5, 0.6)
        run = train_tiny(max_steps=3, eval_fraction=0.25, eval_steps=1)
        assert (run.summary.best_step, run.summary.best_value) == (2, 0.5)

    def test_without_held_out_pairs_there_is_no_best(self, train_tiny):
        run = train_tiny()
        assert not (run.output / "best").exists()
        assert run.summary.best_step is None
        assert not any(name.startswith("eval_") for name in run.metrics[-1])

    def test_eval_fraction_takes_pairs_away(self, train_tiny, capfd):
        run = train_tiny(eval_fraction=0.25, pairs_per_step=18, max_steps=1)
        assert run.column("epoch") == [1]  # 18 of 24 are left
        assert "held out: 6 of 24 pairs" in capfd.readouterr().err


class TestSaving:
    def test_save_steps(self, train_tiny, monkeypatch):
        saved = []
        save = Trainer._save
        monkeypatch.setattr(
            Trainer, "_save", lambda self, name: (saved.append((name, self.summary.steps)), save(self, name))
        )
        train_tiny(max_steps=5, save_steps=2)
        assert saved == [("model", 2), ("model", 4), ("model", 5)]

    def test_overwrite_replaces_the_files_of_the_run_alone(self, train_tiny):
        first = train_tiny(eval_fraction=0.25)
        (first.output / "notes.txt").write_text("mine")
        again = train_tiny(overwrite=True, max_steps=2)
        assert [line["step"] for line in again.metrics] == [1, 2]
        assert not (again.output / "best").exists()
        assert (again.output / "notes.txt").read_text() == "mine"

    def test_a_run_can_go_on_from_its_own_model(self, train_tiny):
        first = train_tiny(**FLAT)
        before = first.weights()
        again = train_tiny(model=first.output / "model", overwrite=True, max_steps=1, **FLAT)
        assert 1e-4 < largest_difference(again.weights(), before) < 3e-3

    def test_a_lora_run_saves_adapters_alone(self, train_tiny):
        run = train_tiny(lora_rank=2)
        weights = run.weights()
        assert weights
        assert all("lora_" in name for name in weights)
        assert AutoTokenizer.from_pretrained(run.output / "model").eos_token == "</s>"


def training_forward(monkeypatch, change: Callable[[Policy, Any, Any], Any]) -> None:
    """Let `change(policy, batch, logps)` have the last word in every forward pass of training."""
    forward = Policy.forward

    def changed(self, batch):
        logps = forward(self, batch)
        return change(self, batch, logps) if torch.is_grad_enabled() else logps

    monkeypatch.setattr(Policy, "forward", changed)


def second_step_pair() -> int:
    """A pair that the second step of the toy run sees first."""
    return toy_steps(2)[1][0]


class TestDivergence:
    def check(self, train_tiny: Callable[..., Run], tmp_path: Path, **settings: Any) -> str:
        """The error's message, after the checks that hold for every divergence in step 2."""
        with pytest.raises(TrainingDivergedError, match="step 2: ") as caught:
            train_tiny("diverged", **{**FLAT, **settings})
        output = tmp_path / "diverged"
        assert str(output / "model") in str(caught.value)
        assert [line["step"] for line in read_metrics(output)] == [1]
        assert json.loads((output / "summary.json").read_text(encoding="utf-8"))["steps"] == 1
        AutoModelForCausalLM.from_pretrained(output / "model")
        return str(caught.value)

    def test_one_bad_pair_is_named(self, train_tiny, tmp_path, toy_data, monkeypatch):
        bad = second_step_pair()

        def poison(_, batch, logps):
            if bad not in batch.pair_indices:
                return logps
            row = torch.arange(len(logps)) == 2 * batch.pair_indices.index(bad)
            return logps.masked_fill(row, math.nan)

        with monkeypatch.context() as patch:
            training_forward(patch, poison)
            message = self.check(train_tiny, tmp_path)
        assert f"in pairs {toy_data}:{bad + 1}." in message
        last_good = train_tiny("good", max_steps=1, **FLAT)
        assert_same_weights(read_weights(tmp_path / "diverged" / "model"), last_good.weights())

    def test_a_bad_gradient_alone(self, train_tiny, tmp_path, monkeypatch):
        def poison(_, batch, logps):
            if second_step_pair() in batch.pair_indices:
                logps.register_hook(lambda gradient: gradient * math.nan)
            return logps

        with monkeypatch.context() as patch:
            training_forward(patch, poison)
            message = self.check(train_tiny, tmp_path)
        assert "in the gradient alone" in message
        last_good = train_tiny("good", max_steps=1, **FLAT)
        assert_same_weights(read_weights(tmp_path / "diverged" / "model"), last_good.weights())

    def test_a_learning_rate_far_too_high(self, train_tiny, tmp_path, toy_data):
        message = self.check(train_tiny, tmp_path, learning_rate=1e30)
        assert f"{toy_data}:" in message
        assert "and 4 more" not in message  # six pairs fit on the line
        assert all(tensor.isfinite().all() for tensor in read_weights(tmp_path / "diverged" / "model").values())

    @pytest.mark.parametrize("settings", [{"adam_epsilon": 0.0}, {"learning_rate": math.inf}], ids=str)
    def test_an_update_that_breaks_the_weights(self, train_tiny, tmp_path, settings):
        """Refused as a setting or undone as a step: either way no broken weights are left in model/."""
        with pytest.raises((TrainingDivergedError, ValueError, SystemExit)):
            train_tiny("broken", **{**FLAT, **settings})
        model = tmp_path / "broken" / "model"
        if model.exists():
            assert all(tensor.isfinite().all() for tensor in read_weights(model).values())


class TestInterruption:
    def test_inside_a_step(self, train_tiny, tmp_path, monkeypatch):
        """Ctrl-C between two micro-batches of step 3 leaves the weights of step 2."""
        whole = train_tiny("whole", max_steps=2, **FLAT)
        calls = 0

        def interrupt(_, __, logps):
            nonlocal calls
            calls += 1
            if calls == sum(whole.column("micro_batches")) + 2:
                raise KeyboardInterrupt
            return logps

        training_forward(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("interrupted", max_steps=9, **FLAT)
        output = tmp_path / "interrupted"
        assert without_clock(read_metrics(output)) == without_clock(whole.metrics)
        assert_same_weights(read_weights(output / "model"), whole.weights())
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        assert (summary["steps"], summary["stopped"]) == (2, "interrupted")
