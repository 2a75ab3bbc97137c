"""AdamW and its schedule: the learning rate of every step by hand, weight decay on matrices alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fused_dpo_engine.config.options import OptimizerOptions
from fused_dpo_engine.training.optimizer import build_optimizer, learning_rate_factor

SCHEDULES = ("linear", "cosine", "constant")


class TestFactor:
    @pytest.mark.parametrize(
        ("scheduler_type", "warmup", "expected"),
        [
            ("constant", 0, [1, 1, 1, 1]),
            ("constant", 2, [1 / 2, 1, 1, 1]),
            ("constant", 4, [1 / 4, 1 / 2, 3 / 4, 1]),
            ("linear", 0, [1, 3 / 4, 1 / 2, 1 / 4]),
            ("linear", 1, [1, 1, 2 / 3, 1 / 3]),
            ("linear", 2, [1 / 2, 1, 1, 1 / 2]),
            ("linear", 4, [1 / 4, 1 / 2, 3 / 4, 1]),
            ("cosine", 0, [1, (1 + 2**-0.5) / 2, 1 / 2, (1 - 2**-0.5) / 2]),
            ("cosine", 1, [1, 1, 3 / 4, 1 / 4]),
            ("cosine", 4, [1 / 4, 1 / 2, 3 / 4, 1]),
        ],
    )
    def test_by_hand(self, scheduler_type, warmup, expected):
        assert [learning_rate_factor(step, 4, warmup, scheduler_type) for step in range(4)] == pytest.approx(expected)

    @settings(deadline=None)
    @given(
        total=st.integers(1, 200),
        warmup_share=st.floats(0, 1, allow_nan=False),
        scheduler_type=st.sampled_from(SCHEDULES),
    )
    def test_no_step_is_wasted(self, total, warmup_share, scheduler_type):
        warmup = round(warmup_share * total)
        factors = [learning_rate_factor(step, total, warmup, scheduler_type) for step in range(total)]
        assert all(0 < factor <= 1 for factor in factors)
        assert max(factors) == 1
        peak = factors.index(1)
        assert factors[: peak + 1] == sorted(factors[: peak + 1])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)


def module() -> nn.Module:
    """A matrix and a vector that train, a frozen matrix."""
    layers = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    layers[1].requires_grad_(False)
    return layers


def build(model: nn.Module, total_steps: int = 10, **settings: Any):
    return build_optimizer(model.parameters(), OptimizerOptions(**settings), total_steps)


class TestBuild:
    @pytest.mark.parametrize("scheduler_type", SCHEDULES)
    @pytest.mark.parametrize(("warmup_ratio", "warmup"), [(0.0, 0), (0.1, 1), (0.26, 3), (1.0, 10)])
    def test_learning_rates_of_a_run(self, scheduler_type, warmup_ratio, warmup):
        optimizer, course = build(
            module(), learning_rate=3e-4, lr_scheduler_type=scheduler_type, warmup_ratio=warmup_ratio
        )
        used = []
        for _ in range(10):
            used.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            course.step()
        expected = [3e-4 * learning_rate_factor(step, 10, warmup, scheduler_type) for step in range(10)]
        for group in zip(*used, strict=True):
            assert list(group) == pytest.approx(expected)

    def test_weight_decay_on_matrices_alone(self):
        model = module()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer, _ = build(model, learning_rate=0.1, weight_decay=0.5, warmup_ratio=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        after = dict(model.named_parameters())
        torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
        assert torch.equal(after["0.bias"], before["0.bias"])
        assert torch.equal(after["1.weight"], before["1.weight"])

    def test_frozen_parameters_are_left_out(self):
        model = module()
        optimizer, _ = build(model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(model[0].weight), id(model[0].bias)}  # pyright: ignore[reportIndexIssue]

    def test_matrices_alone_make_one_group(self):
        optimizer, _ = build(nn.Linear(2, 2, bias=False))
        assert [len(group["params"]) for group in optimizer.param_groups] == [1]

    def test_settings_arrive(self):
        optimizer, _ = build(module(), adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
        assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.8, 0.95, 1e-6)}
