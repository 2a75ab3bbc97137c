"""The mean of logits that were never made, against the mean of those that are."""

from typing import Any

import pytest
import torch

from fused_dpo.head import LMHead, LowRankAdapter
from fused_dpo.integrations import mean_logits

HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 3, 37)},
    "scale and temperature": {"logit_scale": 0.3, "temperature": 1.7},
    "everything": {"bias": torch.linspace(-1, 3, 37), "logit_scale": 2.0, "temperature": 0.7},
}

ROUNDED: dict[str, Any] = {"rtol": 2.0**-23, "atol": 1e-12}
"""Sums in float64, rounded once to fp32: 2^-24, and as much again for scales that Python multiplies."""


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_is_the_mean_of_all_logits(name: str, adapted: bool) -> None:
    hidden, weight = torch.randn(3, 5, 8) + 1, torch.randn(37, 8) + 0.5
    lora = LowRankAdapter(torch.randn(2, 8), torch.randn(37, 2) + 1, 0.5) if adapted else None
    head = LMHead(weight, lora=lora, **HEADS[name])
    whole = weight.double() if lora is None else weight.double() + lora.scale * lora.b.double() @ lora.a.double()
    logits = hidden.double() @ whole.mT + (0 if head.bias is None else head.bias.double())
    logits = logits * head.logit_scale / head.temperature
    torch.testing.assert_close(mean_logits(hidden, head).double(), logits.mean(), **ROUNDED)
    counts = torch.arange(15) % 4
    expected = logits.flatten(0, 1).repeat_interleave(counts, 0).mean()
    torch.testing.assert_close(mean_logits(hidden, head, counts).double(), expected, **ROUNDED)
    assert abs(expected - logits.mean()) > 1e-3, "control: the counts matter"


def test_what_is_not_a_number() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(37, 8)
    assert mean_logits(hidden, LMHead(weight, softcap=30.0)).isnan()
    assert mean_logits(hidden, LMHead(weight), torch.zeros(4, dtype=torch.int64)).isnan()


def test_a_head_that_is_split_over_ranks() -> None:
    """The mean over a rank's rows would be another number."""
    head = LMHead(torch.ones(2, 3), process_group=object())
    with pytest.raises(NotImplementedError, match="a head that is split over ranks"):
        mean_logits(torch.ones(1, 3), head)


def test_has_no_gradient_and_takes_half_precision() -> None:
    hidden = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.bfloat16)
    mean = mean_logits(hidden, LMHead(weight))
    assert (mean.dtype, mean.requires_grad) == (torch.float32, False)
    expected = (hidden.detach().double() @ weight.double().mT).mean()
    torch.testing.assert_close(mean.double(), expected, **ROUNDED)
