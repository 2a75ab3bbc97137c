"""Properties of the losses: smoothing, order, gradients, extreme margins."""

import math

import pytest
import torch

from fused_dpo import losses
from fused_dpo.losses import LOSS_TYPES, PairLogps, loss_spec
from fused_dpo.losses.module import DPOLoss
from tests.kernels.support.losses import ACROSS_PAIRS, SMOOTHED, example, random_pairs, run


class TestProperties:
    @pytest.mark.parametrize("loss_type", sorted(SMOOTHED - {"exo_pair"}))
    def test_no_smoothing_is_the_plain_loss(self, loss_type):
        function = loss_spec(loss_type).function
        assert torch.equal(function(example(), 0.3, label_smoothing=0.0), function(example(), 0.3))
        if loss_type == "robust":
            assert torch.equal(function(example(), 0.3), losses.sigmoid_loss(example(), 0.3))

    @staticmethod
    def swapped(pairs: PairLogps) -> PairLogps:
        return PairLogps(
            pairs.rejected,
            pairs.chosen,
            pairs.ref_rejected,
            pairs.ref_chosen,
            pairs.rejected_lengths,
            pairs.chosen_lengths,
        )

    @pytest.mark.parametrize("eps", [0.1, 0.45])
    @pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
    def test_conservative_is_the_mean_over_flips(self, loss_type, eps):
        function, pairs = loss_spec(loss_type).function, example()
        expected = (1 - eps) * function(pairs, 0.3) + eps * function(self.swapped(pairs), 0.3)
        torch.testing.assert_close(function(pairs, 0.3, eps), expected)

    @pytest.mark.parametrize("eps", [0.1, 0.45])
    def test_robust_is_unbiased_under_flips(self, eps):
        pairs = example()
        mean = (1 - eps) * losses.robust_loss(pairs, 0.3, eps) + eps * losses.robust_loss(self.swapped(pairs), 0.3, eps)
        torch.testing.assert_close(mean, losses.sigmoid_loss(pairs, 0.3))

    def test_exo_is_zero_where_the_policy_agrees_with_the_smoothed_label(self):
        eps, beta, zero = 0.1, 0.5, torch.zeros(1, dtype=torch.float64)
        agree = torch.full_like(zero, math.log((1 - eps) / eps) / beta).requires_grad_()
        loss = losses.exo_pair_loss(PairLogps(agree, zero, zero, zero), beta, eps).sum()
        (grad,) = torch.autograd.grad(loss, agree)
        # float64: the logarithm of 9, divided and multiplied by beta, is off by 4e-16.
        assert abs(loss.item()) < 1e-15
        assert abs(grad.item()) < 1e-15
        assert (losses.exo_pair_loss(example(), beta, eps) > 0).all()

    @pytest.mark.parametrize("loss_type", sorted(ACROSS_PAIRS))
    def test_aot_does_not_depend_on_the_order_of_pairs(self, loss_type):
        module, pairs = DPOLoss(loss_type=loss_type), random_pairs(7)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        permuted = PairLogps(*(value[order] for value in vars(pairs).values()))
        torch.testing.assert_close(run(module, permuted).losses, run(module, pairs).losses)

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_gradcheck(self, loss_type):
        module, pairs = DPOLoss(0.4, loss_type=loss_type).eval(), random_pairs(4)
        others = (pairs.ref_chosen, pairs.ref_rejected)
        lengths = {"chosen_lengths": pairs.chosen_lengths, "rejected_lengths": pairs.rejected_lengths}
        assert torch.autograd.gradcheck(
            lambda chosen, rejected: module(chosen, rejected, *others, **lengths).loss, (pairs.chosen, pairs.rejected)
        )

    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("beta", [0.1, 1.0])
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_stable_at_extreme_margins(self, loss_type, beta, sign):
        near, far = torch.tensor([-1e-3, -1.0, 0.0]), torch.tensor([-1e4, -2e4, -1e4])
        chosen, rejected = [logps.clone().requires_grad_() for logps in ((near, far) if sign > 0 else (far, near))]
        one = torch.ones(3)
        got = DPOLoss(beta, loss_type=loss_type).eval()(
            chosen, rejected, near, near, chosen_lengths=one, rejected_lengths=one
        )
        got.loss.backward()
        for values in (got.loss, got.losses, chosen.grad, rejected.grad, *got.metrics.values()):
            assert values is not None
            assert values.isfinite().all()

    def test_orpo_at_probability_one(self):
        zero = torch.zeros(2, requires_grad=True)
        ones = torch.ones(2)
        loss = losses.orpo_loss(PairLogps(zero, zero, chosen_lengths=ones, rejected_lengths=ones), 1.0)
        loss.sum().backward()
        assert loss.tolist() == pytest.approx([math.log(2)] * 2)
        assert zero.grad is not None
        assert zero.grad.isfinite().all()

    def test_empty_sequences_count_as_one_token(self):
        pairs = PairLogps(
            *(torch.zeros(1) for _ in range(4)), chosen_lengths=torch.zeros(1), rejected_lengths=torch.zeros(1)
        )
        assert losses.sigmoid_norm_loss(pairs, 0.1).item() == pytest.approx(math.log(2))
