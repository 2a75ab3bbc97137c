"""The values of the losses against their papers' equations in plain `math`."""

import math

import pytest
import torch

from fused_dpo import losses
from fused_dpo.losses import LOSS_TYPES, LOSSES, PairLogps, desensitized_weights
from fused_dpo.losses.module import DPOLoss
from tests.kernels.support.losses import (
    ACROSS_PAIRS,
    CHOSEN_LOGRATIOS,
    EQUATIONS,
    REJECTED_LOGRATIOS,
    SMOOTHED,
    by_hand,
    example,
    run,
    sigma,
)

FLOAT64 = 1e-12
"""Relative, of a dozen operations (eps 2e-16) with exponentials and logarithms of numbers of order 10 among them."""


class TestEquations:
    def test_every_loss_has_an_equation(self):
        assert set(EQUATIONS) | ACROSS_PAIRS == set(LOSS_TYPES) == set(LOSSES)

    @pytest.mark.parametrize("beta", [0.1, 0.7])
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_value(self, loss_type, beta):
        got = run(DPOLoss(beta, loss_type=loss_type).eval(), example())
        expected = by_hand(loss_type, beta)
        assert got.losses.tolist() == pytest.approx(expected, rel=FLOAT64, abs=FLOAT64)
        assert got.loss.item() == pytest.approx(sum(expected) / 5, rel=FLOAT64)

    @pytest.mark.parametrize("loss_type", sorted(SMOOTHED))
    def test_value_with_label_smoothing(self, loss_type):
        got = run(DPOLoss(0.3, 0.2, loss_type), example()).losses
        assert got.tolist() == pytest.approx(by_hand(loss_type, 0.3, 0.2), rel=FLOAT64)

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_fp32_stays_fp32_and_close(self, loss_type):
        got = run(DPOLoss(0.3, loss_type=loss_type).eval(), example(torch.float32))
        assert got.loss.dtype == got.losses.dtype == got.chosen_rewards.dtype == torch.float32
        # Some units (1.2e-7) of what is subtracted, which may exceed the loss.
        assert got.losses.tolist() == pytest.approx(by_hand(loss_type, 0.3), rel=2e-6, abs=1e-6)

    def test_worked_by_hand(self):
        """One pair with round numbers: logratios 3 and 1, delta 2, means -1 and -2."""
        values = [torch.tensor([v], dtype=torch.float64) for v in (-2.0, -8.0, -5.0, -9.0, 2.0, 4.0)]
        pairs = PairLogps(*values)
        half = 0.5
        assert losses.hinge_loss(pairs, 0.25).item() == 0.5
        assert losses.ipo_loss(pairs, half).item() == 1.0  # (2 - 1)^2
        assert losses.ipo_norm_loss(pairs, half).item() == 0.0625  # (3/2 - 1/4 - 1)^2
        assert losses.sppo_hard_loss(pairs, half).item() == 8.0  # (3 - 1)^2 + (1 + 1)^2
        assert losses.sigmoid_loss(pairs, half).item() == pytest.approx(math.log(1 + math.exp(-1)))
        assert losses.simpo_loss(pairs, half, simpo_gamma=0.5).item() == pytest.approx(math.log(2))  # 0.5 * 1 - 0.5
        # Odds e^-1/(1 - e^-1) and e^-2/(1 - e^-2) have the ratio e + 1, so sigmoid(log ratio) = (e + 1)/(e + 2).
        assert losses.orpo_loss(pairs, half).item() == pytest.approx(half * math.log((math.e + 2) / (math.e + 1)))

    @pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "aot", "aot_unpaired", "discopop", "robust"])
    def test_policy_equal_to_reference(self, loss_type):
        """At step 0 the logistic losses are ln 2; DiscoPOP's is the mean of ln 2 and 1; rewards are 0."""
        logps = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -1.0])
        lengths = {"chosen_lengths": torch.tensor([2, 3]), "rejected_lengths": torch.tensor([2, 3])}
        got = DPOLoss(loss_type=loss_type)(*logps, *logps, **lengths)
        expected = 0.5 * (math.log(2) + 1) if loss_type == "discopop" else math.log(2)
        assert got.losses.tolist() == pytest.approx([expected, expected], rel=1e-6)  # fp32
        assert got.chosen_rewards.tolist() == got.rejected_rewards.tolist() == [0.0, 0.0]
        assert got.metrics["rewards/accuracies"].item() == 0.0

    def test_bco_shift(self):
        got = losses.bco_pair_loss(example(), 0.5, reward_shift=0.25)
        expected = [
            -math.log(sigma(0.5 * a - 0.25)) - math.log(sigma(-(0.5 * b - 0.25)))
            for a, b in zip(CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, strict=True)
        ]
        assert got.tolist() == pytest.approx(expected, rel=FLOAT64)

    def test_discopop_tau(self):
        """Far below any margin, tau turns the blend into a switch at 0."""
        margins = [0.4 * (a - b) for a, b in zip(CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, strict=True)]
        expected = [math.exp(-x) if x > 0 else -math.log(sigma(x)) for x in margins]
        assert losses.discopop_loss(example(), 0.4, tau=1e-4).tolist() == pytest.approx(expected, rel=FLOAT64)


class TestPaper:
    """Rafailov et al.: a policy with parameters, probabilities rather than log-probs, autograd on one side only."""

    beta = 0.3

    def policy(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        theta = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        ref = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        return theta, ref

    @staticmethod
    def probability(parameters: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        p = parameters.exp() / parameters.exp().sum(-1, keepdim=True)
        return torch.stack([p[t, token] for t, token in enumerate(tokens)]).prod()

    def test_equation_7_and_its_gradient(self):
        theta, ref = self.policy()
        y_w, y_l = [0, 3, 2, 5], [1, 1, 4]
        pi_w, pi_l = self.probability(theta, y_w), self.probability(theta, y_l)
        ref_w, ref_l = self.probability(ref, y_w), self.probability(ref, y_l)

        inside = self.beta * torch.log(pi_w / ref_w) - self.beta * torch.log(pi_l / ref_l)
        equation_7 = -torch.log(1 / (1 + torch.exp(-inside)))
        got = DPOLoss(self.beta)(*(p.log().reshape(1) for p in (pi_w, pi_l, ref_w, ref_l)))
        torch.testing.assert_close(got.loss, equation_7, rtol=2e-15, atol=0)  # float64, four logarithms

        # grad L = -beta * sigmoid(r_l - r_w) * (grad log pi(y_w) - grad log pi(y_l))
        (grad_w,) = torch.autograd.grad(pi_w.log(), theta, retain_graph=True)
        (grad_l,) = torch.autograd.grad(pi_l.log(), theta, retain_graph=True)
        weight = self.beta * sigma(-inside.item())
        (grad,) = torch.autograd.grad(got.loss, theta)
        # float64; of a token in neither response the two gradients cancel.
        torch.testing.assert_close(grad, -weight * (grad_w - grad_l), rtol=1e-12, atol=1e-14)

    def test_common_slips_differ(self):
        """Negative controls: beta applied twice, and smoothing added instead of subtracted, are other numbers."""
        pairs, expected = example(), torch.tensor(by_hand("sigmoid", 0.3, 0.2), dtype=torch.float64)
        got = losses.sigmoid_loss(pairs, 0.3, 0.2)
        beta_twice = losses.sigmoid_loss(pairs, 0.3 * 0.3, 0.2)
        x = 0.3 * pairs.delta
        logsigmoid = torch.nn.functional.logsigmoid
        sign_flipped = -0.8 * logsigmoid(x) + 0.2 * logsigmoid(-x)
        torch.testing.assert_close(got, expected)
        for slip in (beta_twice, sign_flipped):
            assert (slip - expected).abs().min() > 1e-3


class TestDesensitizedWeights:
    def test_packed_order(self):
        expected = [1, 0.25, 0.25, 1, 1, 1, 0.25, 1, 1, 1, 1]
        for chosen, rejected in (([3, 1, 2], [1, 2, 2]), (torch.tensor([3, 1, 2]), torch.tensor([1, 2, 2]))):
            got = desensitized_weights(chosen, rejected, 0.25)
            assert got.dtype == torch.float32
            assert got.tolist() == expected

    def test_limits(self):
        assert desensitized_weights([5, 2], [3, 4], 1.0).tolist() == [1.0] * 14
        assert desensitized_weights([5, 2], [3, 4], 0.0).sum() == 3 + 3 + 2 + 2
        assert desensitized_weights([0], [2], 0.5).tolist() == [0.5, 0.5]
        assert desensitized_weights([], [], 0.5).shape == (0,)

    def test_errors(self):
        for alpha in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
                desensitized_weights([1], [1], alpha)
        with pytest.raises(ValueError, match=r"one length >= 0 per response, got \[1\] and \[1, 2\]"):
            desensitized_weights([1], [1, 2], 0.5)
        with pytest.raises(ValueError, match="one length >= 0"):
            desensitized_weights([-1], [1], 0.5)
        with pytest.raises(TypeError):
            desensitized_weights(torch.tensor([1.5]), [1], 0.5)
