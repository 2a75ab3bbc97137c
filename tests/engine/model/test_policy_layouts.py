"""The policy in every layout: shared = packed = padded = one-by-one forwards with full logits, values and gradients."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_dpo_engine.batching.packing import PackedBatch, pack
from fused_dpo_engine.batching.padding import pad
from tests.engine.support.policies import (
    BATCH,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    ORDER,
    ORDERED,
    PAIRS,
    UNSHARED,
    VALUE_TOLERANCE,
    another_prefix,
    policy_of,
    relative,
)
from tests.engine.support.toys import (
    FAMILIES,
    IN_FLOAT32,
    any_pairs,
    eager_twin,
    gradients,
    own_logps,
    tiny_model,
    unshared_plan,
    worst_gradient_error,
)

EXACT = {"gpt2": 1e-13}
"""Families that stay in float64 throughout are held to some of its units."""
FP32_VALUE_TOLERANCE, FP32_GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Where the whole model is in fp32: units of 1.2e-7 through two layers that enlarge them."""


def merged(batch: PackedBatch) -> PackedBatch:
    """Sequences see each other."""
    return replace(batch, attention=unshared_plan(0, batch.num_slots))


def rows_before(batch: PackedBatch) -> PackedBatch:
    """Every response token is predicted from one row too early, the first of a sequence from its neighbour."""
    return replace(batch, scored_rows=(batch.scored_rows - 1) % batch.num_slots)


def rows_after(batch: PackedBatch) -> PackedBatch:
    """Every token "predicts" itself: labels were not shifted."""
    return replace(batch, scored_rows=batch.scored_rows + 1)


def positions_running_on(batch: PackedBatch) -> PackedBatch:
    """Positions not reset. Rotary embeddings see distances only, so without shared prefixes only learned positions
    notice."""
    return replace(batch, position_ids=torch.arange(batch.num_slots)[None])


def no_prefix(batch: PackedBatch) -> PackedBatch:
    """Branches see themselves alone."""
    return replace(batch, attention=unshared_plan(*batch.attention.cu_q.tolist()))


def positions_stuck(batch: PackedBatch) -> PackedBatch:
    return replace(batch, position_ids=torch.zeros_like(batch.position_ids))


MISTAKES: list[Callable[[PackedBatch], PackedBatch]] = [merged, rows_before, rows_after, positions_stuck]
MISTAKES_OF_SHARING = [another_prefix, no_prefix, positions_running_on]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(family):
    """A model, and the truth about `BATCH`: log-probs, a direction, and all gradients along it."""
    model = tiny_model(family)
    twin = eager_twin(model)
    expected = own_logps(twin, ORDERED)
    upstream = torch.randn(len(expected), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = gradients(twin, expected @ upstream)
    return family, model, expected.detach(), upstream, grads


class TestEveryLayoutEqualsOneByOne:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_values_and_every_gradient(self, case, layout):
        family, model, expected, upstream, expected_grads = case
        logps = policy_of(model)(LAYOUTS[layout]).logps
        assert relative(logps, expected) < EXACT.get(family, VALUE_TOLERANCE)
        grads = gradients(model, logps @ upstream)
        assert worst_gradient_error(grads, expected_grads) < EXACT.get(family, GRADIENT_TOLERANCE)

    def test_padded_through_the_models_own_attention(self, family):
        # In float64 eager's bound of masked scores overflows its fp32 softmax: padding beyond a window becomes NaN.
        exact = family != "gemma2"
        settings: dict[str, Any] = {} if exact else {"dtype": torch.float32, "scale": 3.0}
        model = tiny_model(family, attention="sdpa" if exact else "eager", **settings)
        expected = own_logps(model, ORDERED)
        logps = policy_of(model)(pad(PAIRS, ORDER)).logps
        assert relative(logps, expected) < (VALUE_TOLERANCE if exact else FP32_VALUE_TOLERANCE)
        grads = gradients(model, logps.sum())
        tolerance = GRADIENT_TOLERANCE if exact else FP32_GRADIENT_TOLERANCE
        assert worst_gradient_error(grads, gradients(model, expected.sum())) < tolerance

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("family", IN_FLOAT32)
    def test_models_that_stay_in_float32(self, family, layout):
        model = tiny_model(family, dtype=torch.float32, scale=3.0)
        twin = eager_twin(model)
        logps, expected = policy_of(model)(LAYOUTS[layout]).logps, own_logps(twin, ORDERED)
        assert relative(logps, expected) < FP32_VALUE_TOLERANCE
        error = worst_gradient_error(gradients(model, logps.sum()), gradients(twin, expected.sum()))
        assert error < FP32_GRADIENT_TOLERANCE

    @pytest.mark.parametrize(
        ("layout", "mistake"),
        [(layout, mistake) for layout in LAYOUTS for mistake in MISTAKES]
        + [("shared", mistake) for mistake in MISTAKES_OF_SHARING],
        ids=lambda value: value if isinstance(value, str) else value.__name__,
    )
    def test_mistakes_show(self, case, layout, mistake):
        """Negative control: the comparison above would notice."""
        _, model, expected, upstream, expected_grads = case
        logps = policy_of(model)(mistake(LAYOUTS[layout])).logps
        assert relative(logps, expected) > 1000 * VALUE_TOLERANCE
        assert worst_gradient_error(gradients(model, logps @ upstream), expected_grads) > 1000 * GRADIENT_TOLERANCE

    def test_positions_that_run_on_show(self, case):
        family, model, expected, *_ = case
        few = pack(PAIRS, ORDER[:3], share=False)  # as many tokens as models have positions
        error = relative(policy_of(model)(positions_running_on(few)).logps, expected[:6])
        assert error > 0.01 if family in ("gpt2", "opt") else error < VALUE_TOLERANCE

    def test_the_company_does_not_matter(self, case):
        _, model, expected, *_ = case
        policy = policy_of(model)
        alone = torch.cat([policy(pack(PAIRS, [i])).logps for i in ORDER])
        assert relative(alone, expected) < VALUE_TOLERANCE

    def test_sharing_computes_less(self):
        assert BATCH.num_slots < 0.7 * UNSHARED.num_slots == 0.7 * BATCH.num_tokens


class TestAnyShapes:
    """Small alphabets make equal prompts, equal responses, responses that extend others, and rarely nothing shared."""

    @pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
    @settings(deadline=None, max_examples=30)
    @given(pairs=any_pairs(), order=st.randoms(use_true_random=False))
    def test_shared_equals_packed_equals_one_by_one(self, family, pairs, order):
        model = model_for_shapes(family)
        indices = order.sample(range(len(pairs)), len(pairs))
        expected = own_logps(model, [pairs[i] for i in indices])
        with torch.no_grad():
            for share in (True, False):
                logps = policy_of(model)(pack(pairs, indices, share=share)).logps
                # float64; norms in fp32 take the same numbers on both sides. The largest seen is 4e-16.
                torch.testing.assert_close(logps, expected, rtol=4e-15, atol=0)


@cache
def model_for_shapes(family: str) -> Any:
    """Attention of its own on one side and no other rounding: `own_logps` runs it without a plan."""
    return tiny_model(family, num_hidden_layers=2, sliding_window=3).requires_grad_(False)
