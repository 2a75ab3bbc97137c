"""Training on more than two answers: whole rankings and pairs with margins, against plain code and in every layout."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fused_dpo import DPOLoss
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.batching.packing import pack
from fused_dpo_engine.batching.padding import pad
from fused_dpo_engine.cli import parse
from fused_dpo_engine.commands.train import train
from fused_dpo_engine.data.pairs import TokenPair, split_pairs
from fused_dpo_engine.errors import UserError
from tests.engine.support.policies import GRADIENT_TOLERANCE, VALUE_TOLERANCE, policy_of
from tests.engine.support.rankings import SHAPES, ranked_pairs_of
from tests.engine.support.runs import FIRST_LOSS, LN2, without_clock
from tests.engine.support.toys import (
    Run,
    assert_same_weights,
    eager_twin,
    gradients,
    largest_difference,
    options,
    own_logps,
    tiny_model,
    worst_gradient_error,
    write_rows,
)

BETA = 0.3
LAYOUTS: dict[str, dict[str, Any]] = {"shared": {}, "packed": {"prefix_sharing": False}, "padded": {"packing": False}}
CLOSE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}
CLOSE_WEIGHTS = 1e-6
"""As in test_equivalence: fp32 sums in another order."""
SETTINGS: dict[str, Any] = {
    **{"loss_type": "plackett_luce", "tokens_per_batch": 150, "max_length": 16, "pairs_per_step": 8},
    **{"adam_epsilon": 1e-2, "learning_rate": 3e-2},
}
ROWS = SHAPES * 3


@pytest.fixture
def train_ranked(train_tiny, monkeypatch):
    """Train on pairs that are there already: (name, pairs, held-out pairs, settings)."""

    def run(name: str, pairs: list[TokenPair], held_out: Sequence[TokenPair] = (), **settings: Any) -> Run:
        monkeypatch.setattr("fused_dpo_engine.commands.train.load_pairs", lambda *_, **__: (pairs, list(held_out)))
        return train_tiny(name, **{**SETTINGS, **settings})

    return run


class TestAgainstPlainCode:
    """In float64, on a model that scores one answer at a time with its own attention and full logits."""

    PAIRS = ranked_pairs_of()
    REFERENCE = torch.linspace(-40, -20, len(PAIRS) + len(SHAPES), dtype=torch.float64)
    """Of every answer, row by row, best first."""

    def expected(self, model: Any) -> torch.Tensor:
        """The mean loss over pairs: the probability of each ranking, answer by answer."""
        terms: list[torch.Tensor] = []
        for number in range(len(SHAPES)):
            here = [pair for pair in self.PAIRS if pair.where == f"pairs.jsonl:{number + 1}"]
            logps = own_logps(model, here)
            first = len(terms) + number
            rewards = BETA * (torch.cat((logps[:1], logps[1::2])) - self.REFERENCE[first : first + len(here) + 1])
            terms += [-(rewards[k].exp() / rewards[k:].exp().sum()).log() for k in range(len(here))]
        return torch.stack(terms).mean()

    def reference_of_pairs(self) -> torch.Tensor:
        """[pairs, 2], the best answer's beside each of the others."""
        rows = self.REFERENCE.split([len(lengths) for _, lengths in SHAPES])
        return torch.cat([torch.stack((row[:1].expand(len(row) - 1), row[1:]), 1) for row in rows])

    @pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
    def test_loss_and_gradients(self, layout):
        model = tiny_model(attention="eager" if layout == "padded" else ATTENTION_NAME)
        every = range(len(self.PAIRS))
        batch = pad(self.PAIRS, every) if layout == "padded" else pack(self.PAIRS, every, share=layout == "shared")
        logps, references = policy_of(model)(batch).logps, self.reference_of_pairs().T
        module = DPOLoss(BETA, loss_type="plackett_luce")
        settings = {"margins": batch.margins, "rankings": batch.rankings}
        loss = module(logps[0::2], logps[1::2], *references, **settings).loss
        twin = eager_twin(model)
        expected = self.expected(twin)
        assert loss.item() == pytest.approx(expected.item(), rel=VALUE_TOLERANCE)
        assert worst_gradient_error(gradients(model, loss), gradients(twin, expected)) < GRADIENT_TOLERANCE
        # Negative control: pairs that stand alone are another loss.
        alone = module(logps[0::2], logps[1::2], *references, margins=batch.margins).loss
        assert abs(alone.item() - expected.item()) > 0.01


class TestRuns:
    @pytest.fixture(scope="class")
    @staticmethod
    def layouts(tmp_path_factory, toy_settings) -> dict[str, Run]:
        made = {}
        with pytest.MonkeyPatch.context() as patch:
            sides = split_pairs(ranked_pairs_of(ROWS), 0.25, seed=0)
            patch.setattr("fused_dpo_engine.commands.train.load_pairs", lambda *_, **__: sides)
            for name, layout in LAYOUTS.items():
                output = tmp_path_factory.mktemp("rankings") / name
                settings = {**toy_settings, **SETTINGS, "eval_fraction": 0.25, **layout, "output": output}
                made[name] = Run(output, train(parse("train", options(**settings))))
        return made

    @pytest.mark.parametrize("layout", ["packed", "padded"])
    def test_every_layout_gives_the_same_run(self, layouts, layout):
        shared, other = layouts["shared"], layouts[layout]
        names = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "pairs", "tokens")
        for name in names:
            assert other.column(name) == pytest.approx(shared.column(name), **CLOSE), name
        assert other.summary.eval_after == pytest.approx(shared.summary.eval_after, **CLOSE)
        losses = shared.column("loss")
        assert max(losses) - min(losses) > 1e-3  # there is something to be compared
        assert largest_difference(other.weights(), shared.weights()) < CLOSE_WEIGHTS
        assert min(shared.column("packing/shared")) > 0.5
        assert sum(other.column("micro_batches")) > sum(shared.column("micro_batches"))

    def test_the_first_loss_is_that_of_random_orders(self, layouts):
        """Policy and reference are equal, so every order of K answers has the probability 1 / K!."""
        for run in layouts.values():
            first = run.metrics[0]
            assert first["rewards/margins"] == first["rewards/accuracies"] == 0
            held_out = split_pairs(ranked_pairs_of(ROWS), 0.25, seed=0)[1]
            sizes = Counter(pair.where for pair in held_out).values()
            expected = sum(math.lgamma(others + 2) for others in sizes) / len(held_out)
            assert run.summary.eval_before["eval_loss"] == pytest.approx(expected, rel=1e-6)

    def test_accumulation(self, train_ranked):
        """Steps of one forward pass, and of several."""
        pairs = ranked_pairs_of(ROWS)
        whole = train_ranked("whole", pairs, tokens_per_batch=4000, sft_weight=0.5)
        split = train_ranked("split", pairs, tokens_per_batch=32, sft_weight=0.5)
        assert whole.column("micro_batches") == [1, 1, 1]
        assert all(count > 1 for count in split.column("micro_batches"))
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "nll_loss"):
            assert split.column(name) == pytest.approx(whole.column(name), **CLOSE), name
        assert largest_difference(split.weights(), whole.weights()) < CLOSE_WEIGHTS

    def test_control_of_accumulation_rankings_that_are_cut_differ(self, train_ranked):
        """Without their numbers pairs go where there is room, and each is a ranking of its own."""
        pairs = ranked_pairs_of(ROWS)
        apart = [dataclasses.replace(pair, ranking=None) for pair in pairs]
        whole = train_ranked("whole", pairs, tokens_per_batch=4000)
        other = train_ranked("apart", apart, tokens_per_batch=4000)
        assert other.metrics[0]["loss"] == FIRST_LOSS
        assert abs(whole.metrics[0]["loss"] - LN2) > 0.01

    def test_rows_of_a_file(self, train_tiny, tmp_path):
        rows = [{"prompt": f"is it {i}? ", "responses": ["no", "yes", "maybe"], "scores": [1, 3, 2]} for i in range(4)]
        data = write_rows(tmp_path / "rows.jsonl", rows)
        run = train_tiny(data=data, loss_type="plackett_luce", max_steps=1)
        # All 3! orders are alike before the first update, and a ranking of three counts as two pairs.
        assert run.metrics[0]["loss"] == pytest.approx(math.log(6) / 2, rel=1e-5)
        run = train_tiny("offset", data=data, odpo_alpha=0.5, pairs="all", max_steps=1)
        offsets = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) * 0.5
        expected = torch.nn.functional.softplus(offsets).mean().item()
        assert run.metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)

    def test_two_answers_train_as_the_sigmoid_loss(self, train_tiny):
        """Bit for bit, from a file."""
        ranked, plain = (train_tiny(name, loss_type=name) for name in ("plackett_luce", "sigmoid"))
        assert without_clock(ranked.metrics) == without_clock(plain.metrics)
        assert_same_weights(ranked.weights(), plain.weights())

    def test_a_ranking_that_does_not_fit_is_found_before_a_model_is_loaded(self, train_ranked, monkeypatch):
        monkeypatch.setattr("fused_dpo_engine.commands.train.build_policy", lambda *_, **__: pytest.fail("loaded"))
        small, large = ranked_pairs_of(SHAPES[1:2] * 3), ranked_pairs_of()
        for name, sides in (("a", (large, small)), ("b", (small, large))):
            with pytest.raises(
                UserError, match=r"pairs\.jsonl:1: its 3 answers .* 21 tokens, more than tokens-per-batch"
            ):
                train_ranked(name, *sides, tokens_per_batch=20, max_length=10)


class TestOffset:
    def test_the_first_loss_is_that_of_the_margins(self, train_ranked):
        pairs = ranked_pairs_of(pairing="all", together=False)
        settings = {"loss_type": "sigmoid", "odpo_alpha": 0.8, "pairs_per_step": len(pairs)}
        first = train_ranked("offset", pairs, **settings).metrics[0]
        expected = sum(math.log1p(math.exp(0.8 * pair.margin)) for pair in pairs) / len(pairs)
        assert first["loss"] == pytest.approx(expected, rel=1e-6)
        assert expected > LN2 + 0.1

    def test_layouts_and_accumulation(self, train_ranked):
        pairs = ranked_pairs_of(ROWS, pairing="all", together=False)
        runs = [
            train_ranked(name, pairs, loss_type="sigmoid", odpo_alpha=0.8, pairs_per_step=16, **settings)
            for name, settings in (("one", {"tokens_per_batch": 4000}), ("many", {}), ("padded", {"packing": False}))
        ]
        assert [count > 1 for count in (run.column("micro_batches")[0] for run in runs)] == [False, False, True]
        for run in runs[1:]:
            for name in ("loss", "grad_norm", "rewards/margins"):
                assert run.column(name) == pytest.approx(runs[0].column(name), **CLOSE), name
            assert largest_difference(run.weights(), runs[0].weights()) < CLOSE_WEIGHTS

    def test_without_scores_it_is_refused(self, train_tiny):
        with pytest.raises(
            UserError, match="odpo-alpha is an offset by the difference of two answers' scores, and no pai"
        ):
            train_tiny(odpo_alpha=0.5)
