"""`get_batch_logps` against full logits in float64, and what it must not do: NaN from masked rows, a second copy."""

import math

import pytest
import torch

from fused_dpo.full_logits import get_batch_logps

FLOAT64, FLOAT32 = 1e-12, 1e-6
"""Some units of the dtype (2e-16, 1.2e-7): log-softmax of logits below 16, sums of six log-probs."""


class TestGetBatchLogps:
    B, S, V = 3, 7, 11

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(self.B, self.S, self.V, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, self.V, (self.B, self.S), generator=generator)
        labels[0, :3] = -100
        labels[1, 5:] = -100
        return logits.to(dtype).requires_grad_(), labels

    def naive(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Token by token from the definition of softmax, float64."""
        p = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
        sums = []
        for b in range(self.B):
            tokens = [(t, int(labels[b, t + 1])) for t in range(self.S - 1) if labels[b, t + 1] != -100]
            sums.append(sum((p[b, t, token].log() for t, token in tokens), torch.zeros((), dtype=torch.float64)))
        return torch.stack(sums)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_against_naive(self, dtype):
        logits, labels = self.inputs(dtype)
        got = get_batch_logps(logits, labels)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = self.naive(logits, labels)
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        (grad,) = torch.autograd.grad(got @ weights.to(got.dtype), logits)
        (expected_grad,) = torch.autograd.grad(expected @ weights, logits)
        # The gradient is rounded once, to the logits' dtype.
        tolerance = max(tolerance, torch.finfo(dtype).eps)
        torch.testing.assert_close(grad.double(), expected_grad.double(), rtol=tolerance, atol=tolerance)

    def test_gradcheck(self):
        logits, labels = self.inputs()
        assert torch.autograd.gradcheck(lambda x: get_batch_logps(x, labels, average_log_prob=True), logits)

    def test_average(self):
        logits, labels = self.inputs()
        counts = torch.tensor([4, 4, 6])
        expected = get_batch_logps(logits, labels) / counts
        torch.testing.assert_close(get_batch_logps(logits, labels, average_log_prob=True), expected)

    @pytest.mark.parametrize("average", [False, True])
    def test_nothing_scored(self, average):
        """Also when only the first label is set: no position predicts it."""
        logits, labels = self.inputs()
        labels[1] = -100
        labels[2, 1:] = -100
        got = get_batch_logps(logits, labels, average_log_prob=average)
        assert got[1:].tolist() == [0.0, 0.0]
        got.sum().backward()
        assert logits.grad is not None
        assert not logits.grad[1:].any()
        assert logits.grad[0].any()

    @pytest.mark.parametrize("poison", [-math.inf, math.inf, math.nan])
    def test_unscored_rows_may_hold_anything(self, poison):
        logits, labels = self.inputs()
        expected = get_batch_logps(logits, labels)
        (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
        unscored = torch.cat((labels[:, 1:] == -100, torch.ones(self.B, 1, dtype=torch.bool)), 1)
        poisoned = logits.detach().masked_fill(unscored[..., None], poison).requires_grad_()
        got = get_batch_logps(poisoned, labels)
        (grad,) = torch.autograd.grad(got.sum(), poisoned)
        assert torch.equal(got, expected)
        assert torch.equal(grad, expected_grad)
        assert not grad[unscored].any()

    def test_large_common_offset(self):
        logits, labels = self.inputs(torch.float32)
        shifted = get_batch_logps((logits.detach() + 1024).float(), labels)
        rounded = (logits.detach() + 1024).double() - 1024
        torch.testing.assert_close(shifted.double(), self.naive(rounded, labels), rtol=FLOAT32, atol=FLOAT32)

    def test_other_labels(self):
        logits, labels = self.inputs()
        expected = get_batch_logps(logits, labels)
        assert torch.equal(get_batch_logps(logits, labels.int()), expected)
        assert torch.equal(get_batch_logps(logits, labels.masked_fill(labels == -100, -1), ignore_index=-1), expected)
        inside = labels.clone()
        inside[inside == 4] = -100
        assert torch.equal(
            get_batch_logps(logits, labels.masked_fill(labels == -100, 4), ignore_index=4),
            get_batch_logps(logits, inside),
        )

    def test_small_shapes(self):
        logits = torch.zeros(0, 5, 3, requires_grad=True)
        got = get_batch_logps(logits, torch.zeros(0, 5, dtype=torch.int64))
        assert got.shape == (0,)
        assert got.requires_grad
        assert get_batch_logps(torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.int64)).tolist() == [0.0, 0.0]
        assert get_batch_logps(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.int64)).tolist() == [0.0, 0.0]

    def test_saves_no_second_copy_of_the_logits(self):
        logits, labels = self.inputs(torch.bfloat16)
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            get_batch_logps(logits, labels)
        kept = {tensor.untyped_storage() for tensor in saved if tensor.is_floating_point() and tensor.numel()}
        assert {storage.data_ptr() for storage in kept} <= {logits.untyped_storage().data_ptr()}

    def test_errors(self):
        logits, labels = self.inputs()
        for bad in (self.V, -1, -101):
            wrong = labels.clone()
            wrong[2, 4] = bad
            with pytest.raises(ValueError, match=rf"labels must be in \[0, V\) = \[0, 11\) .*got {bad};"):
                get_batch_logps(logits, wrong)
        with pytest.raises(ValueError, match=r"got \[3, 7, 11\] and \[3, 6\]; pass one unshifted label"):
            get_batch_logps(logits, labels[:, 1:])
        with pytest.raises(ValueError, match=r"must have shapes"):
            get_batch_logps(logits[0], labels[0])
        with pytest.raises(TypeError, match="labels integers"):
            get_batch_logps(logits, labels.float())
        with pytest.raises(TypeError, match="logits must be floating point"):
            get_batch_logps(labels[..., None], labels)
