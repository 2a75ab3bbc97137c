"""What changes no result: micro-batches, another run of the same seed; test_equivalence_classes has the whole table."""

from typing import Any

import pytest

from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.policy import Policy
from tests.engine.support.runs import FIRST_LOSS, toy_pairs, training_forward, without_clock
from tests.engine.support.toys import Run, assert_same_weights, largest_difference, options, write_rows

CLOSE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}
"""Metrics of runs that do the same: fp32 sums in another order, over a few steps that do not enlarge what is left."""
CLOSE_WEIGHTS = 1e-6
"""Ten units in the last place of the largest, those of the norms, which are around 1."""


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
            assert split.column(name) == pytest.approx(whole.column(name), **CLOSE), name
        assert largest_difference(split.weights(), whole.weights()) < CLOSE_WEIGHTS

    def test_four_times_one_is_one_times_four(self, train_tiny, tmp_path):
        """Pairs of one length, so that a budget of one pair gives four micro-batches of one."""
        rows = [{"prompt": f"is it {i}? ", "chosen": "yes", "rejected": "non"} for i in range(8)]
        data = write_rows(tmp_path / "even.jsonl", rows)
        common = {"data": data, "pairs_per_step": 4, "max_length": 14, "max_steps": 4, "adam_epsilon": 1e-2}
        four = train_tiny("four", tokens_per_batch=28, sft_weight=0.3, **common)
        one = train_tiny("one", tokens_per_batch=4 * 28, sft_weight=0.3, **common)
        assert four.column("micro_batches") == [4] * 4
        assert one.column("micro_batches") == [1] * 4
        assert four.column("loss") == pytest.approx(one.column("loss"), rel=CLOSE["rel"])
        assert largest_difference(four.weights(), one.weights()) < CLOSE_WEIGHTS


LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "packed": {"prefix_sharing": False},
    "padded": {"packing": False},
}


class TestLayouts:
    @pytest.fixture(scope="class")
    @staticmethod
    def runs(tmp_path_factory, toy_settings) -> dict[str, Run]:
        """A run in every layout."""
        made = {}
        for name, layout in LAYOUTS.items():
            output = tmp_path_factory.mktemp("layouts") / name
            settings = {**toy_settings, "eval_fraction": 0.25, **layout}
            made[name] = Run(output, train(parse("train", options(**{**settings, "output": output}))))
        return made

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_first_step_is_exact(self, runs, layout):
        first = runs[layout].metrics[0]
        assert first["loss"] == FIRST_LOSS
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
            assert summary.shared > 0.2 if name == "shared" else summary.shared == 0
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
        assert run.metrics[0]["loss"] == FIRST_LOSS
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
        monkeypatch.setattr("fused_dpo_engine.commands.train.self_test", lambda *_: done.append("self-test"))
        monkeypatch.setattr(Policy, "compile_backbone", lambda *_, **__: done.append("compile"))
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


class TestOneWayIn:
    """DDP, FSDP2 and hooks act when the policy is called: a pass that went past the call would miss them."""

    def test_every_forward_is_a_call_of_the_policy(self, train_tiny, monkeypatch):
        forwards, calls = count_forwards(monkeypatch)
        run = train_tiny(eval_fraction=0.2, eval_steps=1, tokens_per_batch=60, max_length=30)
        passes = sum(run.column("micro_batches"))
        assert len(calls) == len(forwards) > 3 * passes / 2, "training, reference, set-up test and evaluations"

    def test_control_a_forward_past_the_call_is_seen(self, train_tiny, monkeypatch):
        forwards, calls = count_forwards(monkeypatch)
        monkeypatch.setattr(Policy, "__call__", lambda self, batch: self.forward(batch))
        train_tiny()
        assert len(calls) < len(forwards)


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> tuple[list[None], list[None]]:
    """Lists that grow by one with every `Policy.forward`, and with every call of a policy that hooks can see."""
    forwards: list[None] = []
    calls: list[None] = []
    forward, build = Policy.forward, Policy.__init__

    def counted(self: Policy, batch: Any) -> Any:
        forwards.append(None)
        return forward(self, batch)

    def hooked(self: Policy, *arguments: Any, **settings: Any) -> None:
        build(self, *arguments, **settings)
        self.register_forward_hook(lambda *_: calls.append(None))

    monkeypatch.setattr(Policy, "forward", counted)
    monkeypatch.setattr(Policy, "__init__", hooked)
    return forwards, calls
