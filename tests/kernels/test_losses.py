"""The losses against their papers' equations in plain `math`, and the properties a trainer relies on."""

import itertools
import math

import pytest
import torch

from fused_dpo import losses
from fused_dpo.dpo_loss import DPOLoss, LossOutput
from fused_dpo.losses import LOSS_TYPES, LOSSES, PairLogps, desensitized_weights, loss_spec

ACROSS_PAIRS = {"aot", "aot_unpaired"}
SMOOTHED = {name for name, spec in LOSSES.items() if "label_smoothing" in spec.options}

# Five pairs; log-probs are <= 0, lengths differ, the rewards of the last pair are in the wrong order.
CHOSEN = [-4.0, -10.0, -3.0, -7.5, -6.0]
REJECTED = [-5.0, -9.0, -8.0, -7.25, -2.0]
REF_CHOSEN = [-5.0, -8.0, -3.5, -7.0, -4.0]
REF_REJECTED = [-4.5, -9.5, -6.0, -9.0, -4.0]
CHOSEN_LENGTHS = [4, 10, 2, 5, 3]
REJECTED_LENGTHS = [2, 6, 8, 5, 4]
CHOSEN_LOGRATIOS = [1.0, -2.0, 0.5, -0.5, -2.0]
REJECTED_LOGRATIOS = [-0.5, 0.5, -2.0, 1.75, 2.0]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


def exo(x: float, eps: float) -> float:
    p = sigma(x)
    return p * math.log(p / (1 - eps)) + (1 - p) * math.log((1 - p) / eps)


def smoothed(x: float, eps: float) -> float:
    return -(1 - eps) * math.log(sigma(x)) - eps * math.log(1 - sigma(x))


def discopop(x: float) -> float:
    m = sigma(x / 0.05)
    return (1 - m) * -math.log(sigma(x)) + m * math.exp(-x)


# a, b: logratios of chosen and rejected; c, r: the policy's log-probs; n, m: lengths; e: label smoothing.
EQUATIONS = {
    "sigmoid": lambda a, b, c, r, n, m, beta, e: smoothed(beta * (a - b), e),
    "hinge": lambda a, b, c, r, n, m, beta, e: max(0.0, 1 - beta * (a - b)),
    "ipo": lambda a, b, c, r, n, m, beta, e: (a - b - 1 / (2 * beta)) ** 2,
    "ipo_norm": lambda a, b, c, r, n, m, beta, e: (a / n - b / m - 1 / (2 * beta)) ** 2,
    "robust": lambda a, b, c, r, n, m, beta, e: (
        ((1 - e) * -math.log(sigma(beta * (a - b))) + e * math.log(sigma(beta * (b - a)))) / (1 - 2 * e)
    ),
    "exo_pair": lambda a, b, c, r, n, m, beta, e: exo(beta * (a - b), e or 1e-3),
    "nca_pair": lambda a, b, c, r, n, m, beta, e: (
        -math.log(sigma(beta * a)) - 0.5 * math.log(sigma(-beta * a)) - 0.5 * math.log(sigma(-beta * b))
    ),
    "bco_pair": lambda a, b, c, r, n, m, beta, e: -math.log(sigma(beta * a)) - math.log(sigma(-beta * b)),
    "sppo_hard": lambda a, b, c, r, n, m, beta, e: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
    "apo_zero": lambda a, b, c, r, n, m, beta, e: (1 - sigma(beta * a)) + sigma(beta * b),
    "apo_down": lambda a, b, c, r, n, m, beta, e: sigma(beta * a) + (1 - sigma(beta * (a - b))),
    "discopop": lambda a, b, c, r, n, m, beta, e: discopop(beta * (a - b)),
    "sigmoid_norm": lambda a, b, c, r, n, m, beta, e: smoothed(beta * (a / n - b / m), e),
    "simpo": lambda a, b, c, r, n, m, beta, e: smoothed(beta * c / n - beta * r / m - 0.5, e),
    "orpo": lambda a, b, c, r, n, m, beta, e: -beta * math.log(sigma(log_odds(c / n) - log_odds(r / m))),
}


def by_hand(loss_type: str, beta: float, eps: float = 0.0) -> list[float]:
    """Per-pair losses of the five pairs, in Python floats."""
    if loss_type in ACROSS_PAIRS:
        upper, lower = sorted(CHOSEN_LOGRATIOS), sorted(REJECTED_LOGRATIOS)
        if loss_type == "aot":
            upper = sorted(c - r for c, r in zip(CHOSEN, REJECTED, strict=True))
            lower = sorted(c - r for c, r in zip(REF_CHOSEN, REF_REJECTED, strict=True))
        return [smoothed(beta * (u - v), eps) for u, v in zip(upper, lower, strict=True)]
    columns = (CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS)
    return [EQUATIONS[loss_type](*row, beta, eps) for row in zip(*columns, strict=True)]


def example(dtype: torch.dtype = torch.float64) -> PairLogps:
    logps = [torch.tensor(values, dtype=dtype) for values in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    lengths = [torch.tensor(values) for values in (CHOSEN_LENGTHS, REJECTED_LENGTHS)]
    return PairLogps(*logps, *lengths)


def run(module: DPOLoss, pairs: PairLogps, rows: slice = slice(None), **counts: float | torch.Tensor) -> LossOutput:
    values = [None if value is None else value[rows] for value in vars(pairs).values()]
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths = values
    assert chosen is not None
    assert rejected is not None
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    return module(chosen, rejected, ref_chosen, ref_rejected, **lengths, **counts)


def random_pairs(B: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    logps = [-0.1 - 8 * torch.rand(B, generator=generator, dtype=dtype) for _ in range(4)]
    lengths = [torch.randint(1, 9, (B,), generator=generator) for _ in range(2)]
    return PairLogps(logps[0].requires_grad_(), logps[1].requires_grad_(), logps[2], logps[3], *lengths)


class TestEquations:
    def test_every_loss_has_an_equation(self):
        assert set(EQUATIONS) | ACROSS_PAIRS == set(LOSS_TYPES) == set(LOSSES)

    @pytest.mark.parametrize("beta", [0.1, 0.7])
    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_value(self, loss_type, beta):
        got = run(DPOLoss(beta, loss_type=loss_type).eval(), example())
        expected = by_hand(loss_type, beta)
        assert got.losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert got.loss.item() == pytest.approx(sum(expected) / 5, rel=1e-12)

    @pytest.mark.parametrize("loss_type", sorted(SMOOTHED))
    def test_value_with_label_smoothing(self, loss_type):
        got = run(DPOLoss(0.3, 0.2, loss_type), example()).losses
        assert got.tolist() == pytest.approx(by_hand(loss_type, 0.3, 0.2), rel=1e-12)

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_fp32_stays_fp32_and_close(self, loss_type):
        got = run(DPOLoss(0.3, loss_type=loss_type).eval(), example(torch.float32))
        assert got.loss.dtype == got.losses.dtype == got.chosen_rewards.dtype == torch.float32
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
        assert got.losses.tolist() == pytest.approx([expected, expected], rel=1e-6)
        assert got.chosen_rewards.tolist() == got.rejected_rewards.tolist() == [0.0, 0.0]
        assert got.metrics["rewards/accuracies"].item() == 0.0

    def test_bco_shift(self):
        got = losses.bco_pair_loss(example(), 0.5, reward_shift=0.25)
        expected = [
            -math.log(sigma(0.5 * a - 0.25)) - math.log(sigma(-(0.5 * b - 0.25)))
            for a, b in zip(CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, strict=True)
        ]
        assert got.tolist() == pytest.approx(expected, rel=1e-12)

    def test_discopop_tau(self):
        """Far below any margin, tau turns the blend into a switch at 0."""
        margins = [0.4 * (a - b) for a, b in zip(CHOSEN_LOGRATIOS, REJECTED_LOGRATIOS, strict=True)]
        expected = [math.exp(-x) if x > 0 else -math.log(sigma(x)) for x in margins]
        assert losses.discopop_loss(example(), 0.4, tau=1e-4).tolist() == pytest.approx(expected, rel=1e-12)


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
        torch.testing.assert_close(got.loss, equation_7, rtol=1e-13, atol=0)

        # grad L = -beta * sigmoid(r_l - r_w) * (grad log pi(y_w) - grad log pi(y_l))
        (grad_w,) = torch.autograd.grad(pi_w.log(), theta, retain_graph=True)
        (grad_l,) = torch.autograd.grad(pi_l.log(), theta, retain_graph=True)
        weight = self.beta * sigma(-inside.item())
        (grad,) = torch.autograd.grad(got.loss, theta)
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


class TestDPOLoss:
    @pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - ACROSS_PAIRS))
    def test_accumulation(self, loss_type):
        """(4 x 1) = (1 x 4) = (1 + 3), the SFT term by tokens. BCO with its shift held still."""
        module, pairs = DPOLoss(0.2, loss_type=loss_type, sft_weight=0.5).eval(), random_pairs(4)
        assert pairs.chosen_lengths is not None
        counts = {"num_pairs": 4, "num_chosen_tokens": int(pairs.chosen_lengths.sum())}
        whole = run(module, pairs)
        inputs = (pairs.chosen, pairs.rejected)
        grads = torch.autograd.grad(whole.loss, inputs)
        for splits in ([0, 1, 2, 3, 4], [0, 1, 4], [0, 3, 3, 4]):
            parts = [run(module, pairs, slice(i, j), **counts) for i, j in itertools.pairwise(splits)]
            loss = torch.stack([part.loss for part in parts]).sum()
            torch.testing.assert_close(loss, whole.loss, rtol=1e-13, atol=0)
            torch.testing.assert_close(torch.autograd.grad(loss, inputs), grads, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(torch.cat([part.losses for part in parts]), whole.losses)
            nll = torch.stack([part.metrics["nll_loss"] for part in parts]).sum()
            torch.testing.assert_close(nll, whole.metrics["nll_loss"])

    def test_mean_of_means_is_not_accumulation(self):
        """Negative control: without the step's counts, unequal micro-batches do not add up."""
        module, pairs = DPOLoss(0.2, sft_weight=0.5), random_pairs(4)
        parts = [run(module, pairs, rows).loss for rows in (slice(0, 1), slice(1, 4))]
        assert abs((sum(parts) / 2 - run(module, pairs).loss).item()) > 1e-3

    def test_counts_may_be_tensors(self):
        module, pairs = DPOLoss(sft_weight=1.0), random_pairs(3)
        got = run(module, pairs, num_pairs=torch.tensor(7), num_chosen_tokens=torch.tensor(50.0))
        torch.testing.assert_close(got.loss, run(module, pairs, num_pairs=7, num_chosen_tokens=50).loss)

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_empty_batch(self, loss_type):
        module, pairs = DPOLoss(loss_type=loss_type, sft_weight=1.0), random_pairs(0)
        got = run(module, pairs)
        assert got.loss.item() == 0.0
        assert got.losses.shape == got.chosen_rewards.shape == (0,)
        assert all(value.item() == 0.0 for value in got.metrics.values())
        grads = torch.autograd.grad(got.loss, (pairs.chosen, pairs.rejected), allow_unused=True)
        assert grads[0] is not None
        assert grads[0].shape == (0,)

    def test_metrics(self):
        got = run(DPOLoss(0.5, sft_weight=2.0), example())
        expected = {
            "rewards/chosen": 0.5 * (1 - 2 + 0.5 - 0.5 - 2) / 5,
            "rewards/rejected": 0.5 * (-0.5 + 0.5 - 2 + 1.75 + 2) / 5,
            "rewards/accuracies": 2 / 5,
            "rewards/margins": 0.5 * (1.5 - 2.5 + 2.5 - 2.25 - 4) / 5,
            "logps/chosen": -30.5 / 5,
            "logps/rejected": -31.25 / 5,
            "nll_loss": 30.5 / 24,
        }
        assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(expected, rel=1e-6)
        assert got.chosen_rewards.tolist() == pytest.approx([0.5, -1.0, 0.25, -0.25, -1.0])
        assert got.rejected_rewards.tolist() == pytest.approx([-0.25, 0.25, -1.0, 0.875, 1.0])
        assert got.loss.item() == pytest.approx(sum(by_hand("sigmoid", 0.5)) / 5 + 2 * 30.5 / 24)
        for value in got.metrics.values():
            assert value.dtype == torch.float32
            assert value.shape == ()

    def test_only_the_loss_is_attached(self):
        got = run(DPOLoss(sft_weight=1.0), random_pairs(3))
        assert got.loss.requires_grad
        detached = (got.losses, got.chosen_rewards, got.rejected_rewards, *got.metrics.values())
        assert not any(value.requires_grad for value in detached)

    @pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
    def test_reference_free(self, loss_type):
        """Rewards are what the loss compares; a reference, if given, changes nothing."""
        pairs = example()
        bare = PairLogps(
            pairs.chosen, pairs.rejected, chosen_lengths=pairs.chosen_lengths, rejected_lengths=pairs.rejected_lengths
        )
        module = DPOLoss(2.0, loss_type=loss_type)
        got = run(module, bare)
        assert got.chosen_rewards.tolist() == pytest.approx([-2.0, -2.0, -3.0, -3.0, -4.0])
        assert got.rejected_rewards.tolist() == pytest.approx([-5.0, -3.0, -2.0, -2.9, -1.0])
        assert torch.equal(got.losses, run(module, pairs).losses)
        assert got.metrics["rewards/accuracies"].item() == pytest.approx(2 / 5)
        assert not losses.needs_reference(loss_type)
        assert sum(losses.needs_reference(name) for name in LOSS_TYPES) == len(LOSS_TYPES) - 2

    def test_bco_running_mean(self):
        module, pairs = DPOLoss(0.5, loss_type="bco_pair"), example()
        rewards = [[0.5, -1.0, 0.25, -0.25, -1.0], [-0.25, 0.25, -1.0, 0.875, 1.0]]
        first = run(module, pairs, slice(0, 2))
        shift = sum(side[0] + side[1] for side in rewards) / 4
        assert module.reward_shift.item() == pytest.approx(shift)
        assert first.losses.tolist() == losses.bco_pair_loss(example(), 0.5, module.reward_shift)[:2].tolist()
        run(module, pairs, slice(2, 5))
        everything = sum(map(sum, rewards)) / 10
        assert module.reward_shift.item() == pytest.approx(everything)

        state = {name: value.clone() for name, value in module.state_dict().items()}
        with torch.no_grad():
            run(module, pairs)
        run(module.eval(), pairs)
        assert module.state_dict() == state
        restored = DPOLoss(0.5, loss_type="bco_pair").eval()
        restored.load_state_dict(state)
        assert torch.equal(run(restored, pairs).losses, run(module, pairs).losses)
        assert DPOLoss().state_dict() == {}

    def test_bco_shift_survives_a_later_update(self):
        """Two forwards, then one backward: the second forward's update must not touch the first one's graph."""
        module, pairs = DPOLoss(loss_type="bco_pair"), random_pairs(4)
        total = run(module, pairs, slice(0, 2)).loss + run(module, pairs, slice(2, 4)).loss
        total.backward()
        assert pairs.chosen.grad is not None
        assert pairs.chosen.grad.isfinite().all()

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_never_reads_a_value(self, loss_type):
        """Tensors without storage cannot be read back: the call would raise where it synchronised with a device."""
        logps = [torch.zeros(3, device="meta", requires_grad=True) for _ in range(4)]
        lengths = {name: torch.ones(3, device="meta") for name in ("chosen_lengths", "rejected_lengths")}
        module = DPOLoss(loss_type=loss_type, sft_weight=1.0).to("meta")
        module(*logps, **lengths, num_pairs=torch.ones((), device="meta")).loss.backward()

    def test_repr(self):
        assert repr(DPOLoss(0.2)) == "DPOLoss(loss_type='sigmoid', beta=0.2, label_smoothing=0.0, sft_weight=0.0)"


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"loss_type": "sigmod"}, r"must be one of sigmoid, hinge.*got 'sigmod'; did you mean 'sigmoid'\?"),
            ({"loss_type": "zzz"}, r"got 'zzz'$"),
            ({"beta": 0.0}, r"beta must be > 0 and finite, got 0.0"),
            ({"beta": math.inf}, r"beta must be > 0"),
            ({"beta": math.nan}, r"beta must be > 0"),
            ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
            ({"label_smoothing": -0.1}, r"label_smoothing must be in"),
            (
                {"label_smoothing": 0.1, "loss_type": "hinge"},
                r"label_smoothing .* 'hinge', which does not .*sigmoid, rob",
            ),
            ({"simpo_gamma": 1.0}, r"simpo_gamma must be left at 0.5 .* used by simpo"),
            ({"simpo_gamma": -1.0, "loss_type": "simpo"}, r"simpo_gamma must be >= 0"),
            ({"sft_weight": -1.0}, r"sft_weight must be >= 0"),
        ],
    )
    def test_hyper_parameters(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DPOLoss(**arguments)

    @pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - SMOOTHED))
    def test_label_smoothing_is_never_ignored(self, loss_type):
        with pytest.raises(ValueError, match="does not use it"):
            DPOLoss(label_smoothing=0.1, loss_type=loss_type)

    def test_exo_needs_smoothing(self):
        assert DPOLoss(loss_type="exo_pair").label_smoothing == 1e-3
        with pytest.raises(ValueError, match="must be > 0 for exo_pair"):
            losses.exo_pair_loss(example(), 0.1, 0.0)
        with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
            losses.robust_loss(example(), 0.1, 0.5)

    def test_pairs(self):
        two, three = torch.zeros(2), torch.zeros(3)
        with pytest.raises(ValueError, match=r"chosen must have shape \[B\], got \[2, 1\]"):
            PairLogps(two[:, None], two)
        with pytest.raises(ValueError, match=r"ref_rejected must have shape \[B\] = \[2\] to match chosen, got \[3\]"):
            PairLogps(two, two, two, three)
        with pytest.raises(ValueError, match=r"rejected_lengths must have shape"):
            PairLogps(two, two, chosen_lengths=two, rejected_lengths=three)
        for dtype in (torch.bfloat16, torch.int64):
            with pytest.raises(TypeError, match="rejected must be float32 or float64"):
                PairLogps(two, two.to(dtype))

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_missing_inputs(self, loss_type):
        logps = torch.zeros(2)
        missing = "chosen_lengths" if loss_type in ("simpo", "orpo") else "ref_chosen"
        with pytest.raises(ValueError, match=f"{missing} is None, but this loss needs it; pass the"):
            DPOLoss(loss_type=loss_type)(logps, logps)

    def test_missing_half(self):
        logps = torch.zeros(2)
        with pytest.raises(ValueError, match="ref_rejected is None"):
            DPOLoss()(logps, logps, logps)
        with pytest.raises(ValueError, match="chosen_lengths is None"):
            DPOLoss(sft_weight=1.0)(logps, logps, logps, logps)
        with pytest.raises(ValueError, match="rejected_lengths is None"):
            DPOLoss(loss_type="ipo_norm")(logps, logps, logps, logps, chosen_lengths=logps)

    def test_counts(self):
        logps = [torch.zeros(2)] * 4
        with pytest.raises(ValueError, match="num_pairs must be > 0, got 0"):
            DPOLoss()(*logps, num_pairs=0)
        with pytest.raises(ValueError, match="num_chosen_tokens must be > 0, got -1"):
            DPOLoss(sft_weight=1.0)(*logps, num_chosen_tokens=-1)


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
