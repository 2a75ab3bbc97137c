"""torch.compile of the backbone: the same numbers, no new code for every batch, the reference the same function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fused_dpo_engine.attention.segments import segment_attention
from fused_dpo_engine.attention.varlen import torch_backend
from fused_dpo_engine.batching.packing import PackedBatch, pack
from fused_dpo_engine.model.policy import Policy
from tests.engine.support.kernels_in_torch import varlen_reference
from tests.engine.support.policies import policy_of
from tests.engine.support.toys import gradients, make_pairs, tiny_model, worst_gradient_error

pytestmark = pytest.mark.cpu_units

PAIRS = make_pairs(*[(5 + i % 7, 7 + i % 3, 3 + i % 4) for i in range(12)])
BATCHES = [pack(PAIRS, range(i, 2 * i + 1)) for i in range(1, 6)]
"""Of different lengths and numbers of segments."""
MANY = [pack(PAIRS, range(count)) for count in (4, *range(1, 13))]
"""More numbers of segments than torch compiles code for, before it gives up."""
SAME_OPS: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13}
"""In float64; aot_eager runs the model's ops, so results are equal unless a matmul finds its operands laid out anew."""
GRADIENTS_TOLERANCE = 1e-6
"""A gradient that comes from several uses may be added up in another order, and then goes through norms in fp32."""


@torch.library.custom_op("fused_dpo_tests::varlen", mutates_args=())
def opaque_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, left: int
) -> Tensor:
    """A kernel that the compiler cannot look into, as the real ones."""
    return varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, causal=True, left=left)


@opaque_varlen.register_fake
def _(q: Tensor, *_) -> Tensor:
    return torch.empty_like(q)


def _keep_shapes(ctx, inputs, output) -> None:
    ctx.shapes = [tensor.shape for tensor in inputs[1:3]]


def _wrong_gradient(ctx, gradient: Tensor):
    """Of the right shapes, for graphs of training that are counted."""
    return (gradient, *(gradient.new_zeros(shape) for shape in ctx.shapes), *[None] * 6)


opaque_varlen.register_autograd(_wrong_gradient, setup_context=_keep_shapes)


def traced_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size=(-1, -1), enable_gqa=False
) -> Tensor:
    """With the signature of torch's."""
    return opaque_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled() -> Callable[..., tuple[Policy, CompileCounterWithBackend]]:
    def make(model) -> tuple[Policy, CompileCounterWithBackend]:
        policy, counter = policy_of(model), CompileCounterWithBackend("aot_eager")
        policy.compile_backbone(backend=counter)  # pyright: ignore[reportArgumentType]
        return policy, counter

    return make


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_same_values_and_gradients(compiled, family):
    model = tiny_model(family)
    upstream = [torch.randn(2 * batch.num_pairs, dtype=torch.float64) for batch in BATCHES]

    def run(policy: Policy, batch: PackedBatch, direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logps = policy(batch).logps
        return logps.detach(), gradients(model, logps @ direction)

    expected = [run(policy_of(model), *case) for case in zip(BATCHES, upstream, strict=True)]
    policy, counter = compiled(model)
    frames = []
    for case, (logps, grads) in zip(zip(BATCHES, upstream, strict=True), expected, strict=True):
        got, got_grads = run(policy, *case)
        torch.testing.assert_close(got, logps, **SAME_OPS)
        assert worst_gradient_error(got_grads, grads) < GRADIENTS_TOLERANCE
        frames.append(counter.frame_count)
    assert frames[0] > 0  # it was compiled
    assert frames[1:] == [frames[1]] * 4  # lengths become dynamic with the second batch, then all fit


def test_variable_length_kernels_need_no_graph_break():
    model = tiny_model()
    with torch.no_grad():
        expected = [policy_of(model)(batch).logps for batch in BATCHES]
        counter = CompileCounterWithBackend("aot_eager")
        policy = policy_of(model)
        policy.attention = torch_backend(traced_varlen_attn)
        policy.causal_lm.base_model.compile(backend=counter, dynamic=True, fullgraph=True)
        frames = []
        for batch, logps in zip(BATCHES, expected, strict=True):
            torch.testing.assert_close(policy(batch).logps, logps, **SAME_OPS)
            frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4


@pytest.mark.parametrize("kernel", [torch_backend(traced_varlen_attn), segment_attention], ids=["varlen", "sdpa"])
def test_no_code_of_its_own_for_a_number_of_segments(compiled, kernel):
    assert len({len(batch.attention.segments) for batch in MANY}) > torch._dynamo.config.recompile_limit  # pyright: ignore
    policy, counter = compiled(tiny_model(num_hidden_layers=1))
    policy.attention = kernel
    frames = []
    for batch in MANY:
        policy(batch).logps.sum().backward()
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 12


def test_code_for_other_units_is_not_found(compiled):
    with torch.compiler.config.patch(cache_key_tag=""):  # pyright: ignore[reportAttributeAccessIssue]
        compiled(tiny_model(num_hidden_layers=1))
        assert torch.compiler.config.cache_key_tag == torch.backends.cpu.get_cpu_capability()


def test_the_reference_runs_the_code_of_training(compiled):
    """Compiled apart for inference it might round differently, and the first rewards would not be exactly 0."""
    policy, counter = compiled(tiny_model(dtype=torch.float32, num_hidden_layers=1))
    trained = policy(BATCHES[0]).logps
    frames = counter.frame_count
    with torch.no_grad():
        scored = policy(BATCHES[0]).logps
    assert torch.equal(scored, trained)
    assert trained.requires_grad
    assert not scored.requires_grad
    assert counter.frame_count == frames


def test_adapters_switched_off(compiled):
    base = policy_of(tiny_model(num_hidden_layers=1))(BATCHES[0]).logps
    model = get_peft_model(
        tiny_model(num_hidden_layers=1), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter)
    policy, _ = compiled(model)
    moved = policy(BATCHES[0]).logps
    with policy.as_reference():
        torch.testing.assert_close(policy(BATCHES[0]).logps, base, **SAME_OPS)
    assert (moved - base).abs().min() > 1e-3
    torch.testing.assert_close(policy(BATCHES[0]).logps, moved)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(compiled, use_reentrant):
    model = tiny_model()
    policy_of(model)(BATCHES[0]).logps.sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    policy, _ = compiled(model)
    policy(BATCHES[0]).logps.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert worst_gradient_error(grads, expected) < GRADIENTS_TOLERANCE  # pyright: ignore[reportArgumentType]
