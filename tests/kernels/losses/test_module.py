"""`DPOLoss`, what a trainer relies on: accumulation, metrics, state, and errors that say what to do."""

import itertools
import math

import pytest
import torch

from fused_dpo import losses
from fused_dpo.losses import LOSS_TYPES, LOSSES, PairLogps
from fused_dpo.losses.module import DPOLoss
from tests.kernels.support.losses import ACROSS_PAIRS, SMOOTHED, by_hand, example, random_pairs, run


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
            # The same terms in float64, added up in another order.
            torch.testing.assert_close(loss, whole.loss, rtol=2e-15, atol=0)
            torch.testing.assert_close(torch.autograd.grad(loss, inputs), grads, rtol=2e-15, atol=0)
            # Alone a pair may go through another vector loop: the last bit of a logarithm, and of what is made of it.
            eps = torch.finfo(torch.float64).eps
            torch.testing.assert_close(torch.cat([part.losses for part in parts]), whole.losses, rtol=4 * eps, atol=0)
            nll = torch.stack([part.metrics["nll_loss"] for part in parts]).sum()
            torch.testing.assert_close(nll, whole.metrics["nll_loss"])

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_the_table_says_which_losses_compare_pairs(self, loss_type):
        """Those, and no others, answer for a pair by what else is in the batch."""
        pairs = random_pairs(4)
        whole = run(DPOLoss(0.2, loss_type=loss_type), pairs).losses
        halves = DPOLoss(0.2, loss_type=loss_type)
        apart = torch.cat([run(halves, pairs, part).losses for part in (slice(0, 2), slice(2, 4))])
        assert torch.allclose(apart, whole, rtol=1e-12, atol=0) != LOSSES[loss_type].across_pairs

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
        assert {name: value.item() for name, value in got.metrics.items()} == pytest.approx(expected, rel=1e-6)  # fp32
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
