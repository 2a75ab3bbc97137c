"""More than two answers: Plackett-Luce over rankings, offsets from scores, and DPO-Positive's penalty."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fused_dpo.losses import PairLogps, dpop_loss, plackett_luce_loss, sigmoid_loss
from fused_dpo.losses.module import DPOLoss
from tests.kernels.support.losses import CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, example, random_pairs

FLOAT64 = 1e-13
"""Relative, of exponentials and logarithms in two orders (eps 2e-16)."""
BETA = 0.3
SIZES = [2, 5, 3, 2, 4]
"""Answers of each ranking."""


def plackett_luce(rewards: list[float]) -> float:
    """-log of the probability of drawing the answers in this order, as products of probabilities."""
    strengths = [math.exp(reward) for reward in rewards]
    return -math.log(math.prod(strength / sum(strengths[k:]) for k, strength in enumerate(strengths)))


def with_ties(rewards: list[float], scores: list[float]) -> float:
    """The same where an answer is drawn from itself and those that score lower."""
    terms = []
    for reward, score in zip(rewards, scores, strict=True):
        lower = [math.exp(r) for r, s in zip(rewards, scores, strict=True) if s < score]
        terms.append(-math.log(math.exp(reward) / (math.exp(reward) + sum(lower))))
    return sum(terms)


def rankings(
    sizes: list[int], dtype: torch.dtype = torch.float64, *, seed: int = 0, tied: bool = False
) -> tuple[PairLogps, list[list[float]], list[list[float]]]:
    """Pairs of rankings, in a random order, with the logratios and scores of each ranking's answers, best first."""
    generator = torch.Generator().manual_seed(seed)
    rows, logratios, scores = [], [], []
    for number, size in enumerate(sizes):
        logps = (-8 * torch.rand(2, size, generator=generator, dtype=torch.float64)).to(dtype)
        levels = [-(k // 2 if tied and k else k) * 0.5 for k in range(size)]  # tied: 0, 0, -1, -1, -2, but the best one
        if tied:
            levels[0] = 1.0
        logratios.append((logps[0].double() - logps[1].double()).tolist())
        scores.append(levels)
        rows += [
            (*logps[:, [0, k]].T.flatten().tolist(), levels[0] - levels[k], number)
            for k in range(1, size)  # chosen, its reference, rejected, its reference
        ]
    order = torch.randperm(len(rows), generator=generator).tolist()
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*(rows[i] for i in order), strict=True)]
    chosen, ref_chosen, rejected, ref_rejected, margins = (column.to(dtype) for column in columns[:5])
    leaves = chosen.requires_grad_(), rejected.requires_grad_()
    pairs = PairLogps(*leaves, ref_chosen, ref_rejected, margins=margins, rankings=columns[5].long())
    return pairs, logratios, scores


def totals(losses: Tensor, pairs: PairLogps) -> list[float]:
    """Sums over each ranking."""
    assert pairs.rankings is not None
    count = int(pairs.rankings.max()) + 1
    return torch.zeros(count, dtype=losses.dtype).index_add(0, pairs.rankings, losses.detach()).tolist()


class TestPlackettLuce:
    @pytest.mark.parametrize("seed", range(3))
    def test_value(self, seed):
        pairs, logratios, _ = rankings(SIZES, seed=seed)
        expected = [plackett_luce([BETA * x for x in ranking]) for ranking in logratios]
        assert totals(plackett_luce_loss(pairs, BETA), pairs) == pytest.approx(expected, rel=FLOAT64)

    def test_the_probabilities_of_all_orders_add_up_to_one(self):
        """Of the loss itself: it is the probability of an order of five answers, and not only of the right one."""
        logps = torch.tensor([-1.0, -2.5, -0.5, -3.0, -1.5], dtype=torch.float64)
        zero, margins = torch.zeros(4, dtype=torch.float64), torch.arange(1.0, 5.0, dtype=torch.float64)
        together = torch.zeros(4, dtype=torch.int64)
        total = 0.0
        for order in itertools.permutations(range(5)):
            ranked = logps[list(order)]
            pairs = PairLogps(ranked[:1].expand(4), ranked[1:], zero, zero, margins=margins, rankings=together)
            total += math.exp(-plackett_luce_loss(pairs, 0.7).sum().item())
        assert total == pytest.approx(1, rel=FLOAT64)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_two_answers_are_the_sigmoid_loss_bit_for_bit(self, dtype):
        pairs = example(dtype)
        for name in ("chosen", "rejected"):
            getattr(pairs, name).requires_grad_()
        leaves = (pairs.chosen, pairs.rejected)
        expected = sigmoid_loss(pairs, BETA)
        numbered = PairLogps(*leaves, pairs.ref_chosen, pairs.ref_rejected, rankings=torch.tensor([7, 3, 5, 1, 0]))
        for alone in (pairs, numbered):
            got = plackett_luce_loss(alone, BETA)
            assert torch.equal(got, expected)
            for grad, wanted in zip(
                torch.autograd.grad(got.sum(), leaves),
                torch.autograd.grad(expected.sum(), leaves, retain_graph=True),
                strict=True,
            ):
                assert torch.equal(grad, wanted)

    def test_ties_have_no_part_in_each_other(self):
        pairs, logratios, scores = rankings(SIZES, tied=True)
        scaled = [[BETA * x for x in ranking] for ranking in logratios]
        expected = [with_ties(*ranking) for ranking in zip(scaled, scores, strict=True)]
        got = totals(plackett_luce_loss(pairs, BETA), pairs)
        assert got == pytest.approx(expected, rel=FLOAT64)
        # Negative control: taken in the order given instead, answers that are tied change the loss.
        in_order = [plackett_luce(ranking) for ranking in scaled]
        assert [abs(a - b) > 1e-3 for a, b in zip(got, in_order, strict=True)] == [size > 3 for size in SIZES]

    def test_without_margins_the_best_is_drawn_from_all_others_in_no_order(self):
        pairs, logratios, _ = rankings([4])
        bare = PairLogps(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, rankings=pairs.rankings)
        strengths = [math.exp(BETA * x) for x in logratios[0]]
        expected = -math.log(strengths[0] / sum(strengths))
        assert plackett_luce_loss(bare, BETA).sum().item() == pytest.approx(expected, rel=FLOAT64)

    def test_only_the_order_of_margins_counts(self):
        pairs, _, _ = rankings(SIZES)
        assert pairs.margins is not None
        stretched = PairLogps(**{**vars(pairs), "margins": 3 * pairs.margins**2})
        assert torch.equal(plackett_luce_loss(stretched, BETA), plackett_luce_loss(pairs, BETA))
        reverse = PairLogps(**{**vars(pairs), "margins": 9 - pairs.margins})
        assert (plackett_luce_loss(reverse, BETA) - plackett_luce_loss(pairs, BETA)).abs().max() > 1e-3

    @pytest.mark.parametrize("tied", [False, True])
    def test_gradcheck(self, tied):
        pairs, _, _ = rankings(SIZES, tied=tied)
        others = {name: value for name, value in vars(pairs).items() if name not in ("chosen", "rejected")}
        module = DPOLoss(0.4, loss_type="plackett_luce")
        references = [others.pop("ref_chosen"), others.pop("ref_rejected")]
        assert torch.autograd.gradcheck(
            lambda chosen, rejected: module(chosen, rejected, *references, **others).loss,
            (pairs.chosen, pairs.rejected),
        )

    def test_fp32_is_as_close_as_its_inputs(self):
        pairs, logratios, _ = rankings(SIZES, torch.float32)
        expected = [plackett_luce([BETA * x for x in ranking]) for ranking in logratios]
        got = plackett_luce_loss(pairs, BETA)
        assert got.dtype == torch.float32
        # Some units (6e-8) of each term's numbers, of which there are up to five.
        assert totals(got, pairs) == pytest.approx(expected, rel=2e-6)

    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_stable_where_probabilities_underflow(self, dtype, sign):
        """Rewards thousands apart: their exponentials are 0 and infinite, the loss is their difference, or 0."""
        rewards = sign * torch.tensor([2e4, 1e4, 0.0, -1e4], dtype=dtype)
        chosen, rejected = rewards[:1].repeat(3).requires_grad_(), rewards[1:].clone().requires_grad_()
        zero, margins = torch.zeros(3, dtype=dtype), torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
        pairs = PairLogps(chosen, rejected, zero, zero, margins=margins, rankings=torch.zeros(3, dtype=torch.int64))
        losses = plackett_luce_loss(pairs, 0.1)
        # Worst first: every answer but the last lies below the last, by 3000, 2000 and 1000.
        assert losses.sum().item() == pytest.approx(0.0 if sign > 0 else 6000.0, rel=1e-6, abs=1e-30)
        for grad in torch.autograd.grad(losses.sum(), (chosen, rejected)):
            assert grad.isfinite().all()
            assert (grad.abs().max() > 0.01) == (sign < 0)

    def test_other_rankings_do_not_matter_be_they_infinite(self):
        """Not even where the log-probs of another ranking are no numbers."""
        pairs, _, _ = rankings([3, 3])
        assert pairs.rankings is not None
        hit = pairs.rankings == 1
        with torch.no_grad():
            whole = plackett_luce_loss(pairs, BETA)
            pairs.chosen[hit], pairs.rejected[hit] = -math.inf, math.nan
        losses = plackett_luce_loss(pairs, BETA)
        assert torch.equal(losses[~hit], whole[~hit])
        assert not losses[hit].isfinite().any()
        for grad in torch.autograd.grad(losses[~hit].sum(), (pairs.chosen, pairs.rejected)):
            assert grad[~hit].isfinite().all()

    def test_accumulation_by_whole_rankings(self):
        module, (pairs, _, _) = DPOLoss(BETA, loss_type="plackett_luce"), rankings(SIZES)
        assert pairs.rankings is not None

        def parts(masks: list[Tensor]) -> Tensor:
            chosen = []
            for mask in masks:
                values = {name: None if value is None else value[mask] for name, value in vars(pairs).items()}
                logps = [values.pop(name) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
                chosen.append(module(*logps, **values, num_pairs=len(pairs.chosen)).loss)
            return torch.stack(chosen).sum()

        whole = parts([torch.ones_like(pairs.rankings, dtype=torch.bool)])
        by_ranking = parts([pairs.rankings <= 1, pairs.rankings > 1])
        torch.testing.assert_close(by_ranking, whole, rtol=1e-14, atol=0)
        # Negative control: a ranking in two micro-batches is two other rankings.
        first = torch.arange(len(pairs.chosen)) < 4
        assert abs((parts([first, ~first]) - whole).item()) > 1e-3

    def test_metrics_are_of_the_best_against_each_other_one(self):
        pairs, logratios, _ = rankings([4])
        values = dict(vars(pairs))
        logps = [values.pop(name) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
        got = DPOLoss(BETA, loss_type="plackett_luce")(*logps, **values)
        best, *others = logratios[0]
        assert got.metrics["rewards/accuracies"].item() == pytest.approx(sum(best > other for other in others) / 3)
        margin = BETA * sum(best - other for other in others) / 3
        assert got.metrics["rewards/margins"].item() == pytest.approx(margin, rel=1e-6)  # fp32
        assert got.loss.item() == pytest.approx(plackett_luce([BETA * x for x in logratios[0]]) / 3, rel=FLOAT64)

    def test_rankings_are_integers(self):
        two = torch.zeros(2)
        with pytest.raises(TypeError, match=r"rankings must be integers, got torch.float32"):
            PairLogps(two, two, rankings=two)
        with pytest.raises(ValueError, match=r"margins must have shape \[B\] = \[2\]"):
            PairLogps(two, two, margins=torch.zeros(3))
        with pytest.raises(TypeError, match=r"margins must be float32 or float64, got torch\.int64"):
            PairLogps(two, two, margins=torch.zeros(2, dtype=torch.int64))


class TestOffset:
    def test_value(self):
        pairs = random_pairs(5)
        assert pairs.margins is not None
        got = sigmoid_loss(pairs, BETA, 0.2, odpo_alpha=1.5)
        for i, (delta, margin) in enumerate(zip(pairs.delta.tolist(), pairs.margins.tolist(), strict=True)):
            p = 1 / (1 + math.exp(-(BETA * delta - 1.5 * margin)))
            assert got[i].item() == pytest.approx(-0.8 * math.log(p) - 0.2 * math.log(1 - p), rel=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_margin_of_zero_is_the_plain_loss_bit_for_bit(self, dtype):
        pairs = random_pairs(50, dtype)
        none = PairLogps(**{**vars(pairs), "margins": torch.zeros(50, dtype=dtype)})
        assert torch.equal(sigmoid_loss(none, BETA, odpo_alpha=1.0), sigmoid_loss(none, BETA))
        assert torch.equal(sigmoid_loss(pairs, BETA, odpo_alpha=0.0), sigmoid_loss(pairs, BETA))
        assert (sigmoid_loss(pairs, BETA, odpo_alpha=1.0) > sigmoid_loss(pairs, BETA)).all()  # control

    def test_gradcheck(self):
        pairs = random_pairs(4)
        module = DPOLoss(0.4, odpo_alpha=2.0)
        assert torch.autograd.gradcheck(
            lambda c, r: module(c, r, pairs.ref_chosen, pairs.ref_rejected, margins=pairs.margins).loss,
            (pairs.chosen, pairs.rejected),
        )

    def test_errors(self):
        logps = [torch.zeros(2)] * 4
        with pytest.raises(ValueError, match="margins is None, but this loss needs it; pass the difference of the sco"):
            DPOLoss(odpo_alpha=1.0)(*logps)
        with pytest.raises(ValueError, match=r"odpo_alpha must be left at 0.0 .* used by sigmoid$"):
            DPOLoss(loss_type="hinge", odpo_alpha=1.0)
        with pytest.raises(ValueError, match=r"odpo_alpha must be >= 0 and finite, got -1.0"):
            DPOLoss(odpo_alpha=-1.0)


class TestDPOPositive:
    def test_without_a_loss_of_likelihood_it_is_plain(self):
        pairs = example()
        plain, got = sigmoid_loss(pairs, BETA), dpop_loss(pairs, BETA)
        fell = pairs.chosen_logratios < 0
        assert 0 < fell.sum() < len(fell)
        assert torch.equal(got[~fell], plain[~fell])
        assert (got[fell] > plain[fell] + 1).all()
        assert torch.equal(dpop_loss(pairs, BETA, dpop_lambda=0.0), plain)

    def test_lambda(self):
        pairs = example()
        got = dpop_loss(pairs, BETA, dpop_lambda=2.0)
        inside = [BETA * (a - b - 2 * max(0.0, -a)) for a, b in zip(CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, strict=True)]
        assert got.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in inside], rel=1e-12)
        module = DPOLoss(BETA, loss_type="dpop", dpop_lambda=2.0)
        assert torch.equal(module(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected).losses, got)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"dpop_lambda must be left at 50.0 .* used by dpop$"):
            DPOLoss(dpop_lambda=1.0)
        with pytest.raises(ValueError, match=r"dpop_lambda must be >= 0 and finite, got -1.0"):
            DPOLoss(loss_type="dpop", dpop_lambda=-1.0)
