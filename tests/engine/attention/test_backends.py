"""Attention backends: which one is chosen, the arguments each kernel gets, and the check on the user's device.

Kernels that need a GPU are replaced by `tests.engine.support.kernels_in_torch`, which compute the same from the same
arguments.
"""

import importlib.metadata
import importlib.util
import inspect
import shutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fused_dpo_engine.attention import choice as attention_choice
from fused_dpo_engine.attention import flex as attention_flex
from fused_dpo_engine.attention import models
from fused_dpo_engine.attention import segments as attention_segments
from fused_dpo_engine.attention.call import AttentionCall, Backend
from fused_dpo_engine.attention.choice import (
    ORDER,
    AttentionNeeds,
    available_backends,
    candidates,
    load_backend,
    why_not,
)
from fused_dpo_engine.attention.flex import flex_backend
from fused_dpo_engine.attention.gather import gather_rows
from fused_dpo_engine.attention.models import attention_for
from fused_dpo_engine.attention.plan import AttentionPlan, Segment, plan_attention
from fused_dpo_engine.attention.segments import attention, segment_attention, visible_keys
from fused_dpo_engine.attention.varlen import flash_backend, torch_backend
from fused_dpo_engine.attention.verify import verify_backend
from fused_dpo_engine.config.options import ModelOptions
from fused_dpo_engine.errors import UnsupportedModelError, UserError
from tests.engine.support import kernels_in_torch as kernels
from tests.engine.support.policies import BATCH, GRADIENT_TOLERANCE, ORDERED, VALUE_TOLERANCE, policy_of, relative
from tests.engine.support.toys import eager_twin, gradients, own_logps, tiny_model, unshared_plan, worst_gradient_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLANS = {
    "shared": plan_attention([Segment(0, 9, 0, 0), Segment(9, 12, 0, 7), Segment(12, 13, 0, 2), Segment(13, 20, 3, 0)]),
    "unshared": unshared_plan(0, 5, 6, 17, 20),
}
KERNELS: dict[str, Backend] = {
    "flash_attn_2": flash_backend(kernels.flash_attn_2),
    "flash_attn_3": flash_backend(kernels.flash_attn_3),
    "flash_attn_4": flash_backend(kernels.flash_attn_4),
    "varlen": torch_backend(kernels.varlen_attn),
    "varlen, no groups": torch_backend(kernels.varlen_attn_without_groups),
    "varlen of 2.10": torch_backend(kernels.varlen_attn_2_10),
}
WINDOWS, SOFTCAPS = (None, 1, 4, 100), (None, 1.5)
CASES = [
    (name, window, softcap)
    for name in KERNELS
    for window in (WINDOWS if name != "varlen of 2.10" else (None,))
    for softcap in (SOFTCAPS if not name.startswith("varlen") else (None,))  # which is never chosen for one
]


def inputs(
    plan: AttentionPlan, kv_heads: int = 2, dtype: torch.dtype = torch.float64, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    length = plan.segments[-1].stop

    def tensor(heads: int) -> Tensor:
        return torch.randn(1, heads, length, width, dtype=dtype, requires_grad=True)

    return tensor(4), tensor(kv_heads), tensor(kv_heads)


class TestArguments:
    @pytest.mark.parametrize(("name", "window", "softcap"), CASES)
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    def test_values_and_gradients(self, name, plan, kv_heads, window, softcap):
        call = AttentionCall(0.7, window, softcap)
        q, k, v = tensors = inputs(PLANS[plan], kv_heads)
        got = KERNELS[name](q, k, v, PLANS[plan], call)
        expected = segment_attention(q, k, v, PLANS[plan], call)
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(got)
        for mine, true in zip(
            torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
        ):
            torch.testing.assert_close(mine, true)

    @pytest.mark.parametrize(
        ("name", "call", "what"),
        [
            ("flash_attn_2", AttentionCall(1.0, sinks=torch.zeros(4)), "sinks"),
            ("varlen", AttentionCall(1.0, softcap=2.0, sinks=torch.zeros(4)), "sinks and softcap"),
            ("varlen of 2.10", AttentionCall(1.0, window=4), "window"),
        ],
    )
    def test_what_a_kernel_lacks_is_not_left_out(self, name, call, what):
        with pytest.raises(UnsupportedModelError, match=f"a layer asks for {what}, .* give --attention flex"):
            KERNELS[name](*inputs(PLANS["shared"]), PLANS["shared"], call)

    def test_mixed_dtypes_go_by_the_values(self):
        """Rotary embeddings under autocast hand over fp32 queries and keys; kernels take one half dtype."""
        q, k, v = inputs(PLANS["shared"], dtype=torch.float32)
        out = KERNELS["flash_attn_2"](q, k, v.bfloat16(), PLANS["shared"], AttentionCall(1.0))
        assert out.dtype == torch.bfloat16

    def test_deterministic_where_torch_is(self):
        asked = []

        def recorded(*tensors, **settings):
            asked.append(settings.pop("deterministic", False))
            return kernels.flash_attn_2(*tensors, **settings)

        backend = flash_backend(recorded)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                backend(*inputs(PLANS["shared"]), PLANS["shared"], AttentionCall(1.0))
            finally:
                torch.use_deterministic_algorithms(False)
        assert asked == [False, True]

    def test_the_installed_varlen_attn_is_one_of_those_tested(self):
        """Its parameters that the backend knows, by the signature that torch has here."""
        module = pytest.importorskip("torch.nn.attention.varlen")
        known = {"scale", "window_size", "enable_gqa", "is_causal"}
        here = known & set(inspect.signature(module.varlen_attn).parameters)
        tested = (kernels.varlen_attn, kernels.varlen_attn_without_groups, kernels.varlen_attn_2_10)
        assert here in [known & set(inspect.signature(function).parameters) for function in tested]

    @pytest.mark.parametrize(
        ("name", "families"),
        [
            ("flash_attn_2", ["llama", "mistral", "gemma2", "gpt2"]),
            ("flash_attn_4", ["llama", "gpt2"]),
            ("varlen", ["llama", "mistral", "gpt2"]),
        ],
    )
    def test_through_models(self, name, families):
        for family in families:
            self.check_model(name, family)

    def check_model(self, name: str, family: str) -> None:
        model = tiny_model(family)
        twin = eager_twin(model)
        policy = policy_of(model)
        policy.attention = KERNELS[name]
        logps, expected = policy(BATCH).logps, own_logps(twin, ORDERED)
        assert relative(logps, expected) < VALUE_TOLERANCE
        error = worst_gradient_error(gradients(model, logps.sum()), gradients(twin, expected.sum()))
        assert error < GRADIENT_TOLERANCE


class TestFlex:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("softcap", SOFTCAPS)
    @pytest.mark.parametrize("with_sinks", [False, True])
    def test_values(self, plan, window, softcap, with_sinks):
        sinks = torch.randn(4) if with_sinks else None
        call = AttentionCall(0.7, window, softcap, sinks)
        q, k, v = (tensor.detach() for tensor in inputs(PLANS[plan], dtype=torch.float32))
        got = flex_backend(q, k, v, PLANS[plan], call)
        torch.testing.assert_close(got, segment_attention(q, k, v, PLANS[plan], call))

    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
    @pytest.mark.cpu_units
    def test_compiled(self, monkeypatch):
        """As on CUDA: a second softcap, such as that of a model after the comparison's, is no variable.

        With heads 32 wide. Of heads 8 or 16 wide, torch's code for AVX2 is wrong (`fused_dpo_engine.attention.flex`).
        """
        compiled = torch.compile(flex_attention)
        monkeypatch.setattr(attention_flex, "_flex", lambda _device: compiled)
        for softcap, length in ((2.0, 40), (50.0, 40), (50.0, 60)):
            plan = plan_attention([Segment(0, length - 9, 0, 0), Segment(length - 9, length, 0, 3)])
            q, k, v = (tensor.detach() for tensor in inputs(plan, dtype=torch.float32, width=32))
            with torch.no_grad():
                got = flex_backend(q, k, v, plan, AttentionCall(5.0, softcap=softcap))
            torch.testing.assert_close(got, segment_attention(q, k, v, plan, AttentionCall(5.0, softcap=softcap)))

    def test_another_plan_gives_another_mask(self):
        q, k, v = (tensor.detach() for tensor in inputs(PLANS["shared"], dtype=torch.float32))
        a, b = (flex_backend(q, k, v, plan, AttentionCall(1.0)) for plan in PLANS.values())
        assert (a - b).abs().max() > 0.01


class TestSegments:
    @pytest.mark.parametrize(("shared", "dtype"), [(0, torch.bfloat16), (3, torch.bfloat16), (0, torch.float32)])
    def test_groups_on_cuda(self, monkeypatch, shared, dtype):
        """Where SDPA has no fused kernel for groups, every head gets keys of its own."""
        seen = []

        def sdpa(q, k, v, **settings):
            seen.append((k.shape[1], settings["enable_gqa"]))
            return v

        monkeypatch.setattr(Tensor, "is_cuda", True)
        monkeypatch.setattr(attention_segments.F, "scaled_dot_product_attention", sdpa)
        queries, keys = torch.randn(1, 4, 5, 8, dtype=dtype), torch.randn(1, 2, 5 + shared, 8, dtype=dtype)
        attention(queries, keys, keys, visible_keys(queries, keys, window=None), AttentionCall(1.0))
        fused = dtype == torch.bfloat16 and not shared
        assert seen == [(2, True) if fused else (4, False)]


class TestGather:
    @pytest.mark.parametrize("index", [[0, 2, 2, 1, 0, 2], [1], []])
    def test_gradient_is_the_sum(self, index):
        rows = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
        where = torch.tensor(index, dtype=torch.int64)
        got = gather_rows(rows, where)
        assert torch.equal(got, rows[where])
        upstream = torch.randn_like(got)
        expected = torch.zeros_like(rows)
        for at, row in enumerate(index):
            expected[row] += upstream[at]
        torch.testing.assert_close(torch.autograd.grad(got, rows, upstream)[0], expected)


NEEDS = AttentionNeeds(num_heads=4, num_kv_heads=2, head_dim=64, value_dim=64)
ALL = set(ORDER)


def needs(**changes: Any) -> AttentionNeeds:
    return AttentionNeeds(**{**vars(NEEDS), **changes})


class TestChoice:
    @pytest.mark.parametrize(
        ("changes", "dtype", "capability", "available", "expected"),
        [
            ({}, torch.bfloat16, (9, 0), ALL, "flash_attn_3"),
            ({}, torch.bfloat16, (10, 0), ALL, "flash_attn_4"),
            ({}, torch.bfloat16, (8, 0), ALL, "flash_attn_2"),
            ({}, torch.bfloat16, (12, 0), ALL, "flash_attn_2"),
            ({}, torch.float16, (9, 0), {"flash_attn_2", "varlen", "flex", "sdpa"}, "flash_attn_2"),
            ({}, torch.bfloat16, (9, 0), {"varlen", "flex", "sdpa"}, "varlen"),
            ({}, torch.float32, (9, 0), ALL, "sdpa"),
            ({}, torch.bfloat16, (7, 5), ALL, "sdpa"),
            ({"softcap": 50.0}, torch.bfloat16, (9, 0), ALL, "flash_attn_3"),
            ({"softcap": 50.0}, torch.bfloat16, (10, 0), {"flash_attn_4", "varlen", "flex", "sdpa"}, "flex"),
            ({"softcap": 50.0}, torch.bfloat16, (8, 0), {"flash_attn_2", "varlen", "flex", "sdpa"}, "flash_attn_2"),
            ({"sinks": True}, torch.bfloat16, (9, 0), ALL, "flex"),
            ({"window": 4096}, torch.bfloat16, (10, 0), ALL, "flash_attn_2"),
            ({"window": 4096}, torch.bfloat16, (9, 0), {"varlen", "flex", "sdpa"}, "varlen"),
            ({"head_dim": 256, "value_dim": 256}, torch.bfloat16, (9, 0), ALL, "flash_attn_3"),
            ({"head_dim": 256, "value_dim": 256}, torch.bfloat16, (10, 0), ALL, "flash_attn_2"),
            ({"head_dim": 512, "value_dim": 512}, torch.bfloat16, (9, 0), ALL, "flex"),
            ({"head_dim": 192}, torch.bfloat16, (9, 0), ALL, "flex"),
            ({"head_dim": 100, "value_dim": 100}, torch.bfloat16, (9, 0), ALL, "flash_attn_2"),
            ({"head_dim": 100, "value_dim": 100}, torch.bfloat16, (9, 0), {"varlen", "flex", "sdpa"}, "flex"),
            ({}, torch.bfloat16, (9, 0), {"sdpa"}, "sdpa"),
        ],
    )
    def test_first_that_can(self, changes, dtype, capability, available, expected):
        names = candidates(needs(**changes), CUDA, dtype, capability, available)
        assert names[0] == expected
        assert names[-1] == "sdpa"

    def test_cpu(self):
        assert candidates(needs(sinks=True, softcap=1.0), CPU, torch.bfloat16, None, ALL) == ["sdpa"]

    def test_wanted(self):
        assert candidates(NEEDS, CUDA, torch.bfloat16, (9, 0), ALL, "flex") == ["flex"]
        with pytest.raises(UserError, match="--attention flash_attn_2: not installed here; installed are flex, sdpa"):
            candidates(NEEDS, CUDA, torch.bfloat16, (9, 0), {"sdpa", "flex"}, "flash_attn_2")
        with pytest.raises(UserError, match="--attention varlen cannot run this model: it has no softcap; --attention"):
            candidates(needs(softcap=1.0), CUDA, torch.bfloat16, (9, 0), ALL, "varlen")

    @pytest.mark.parametrize("name", [name for name in ORDER if name != "sdpa"])
    def test_nothing_but_sdpa_on_a_cpu(self, name):
        """FlexAttention least of all: torch's compiled code of it is wrong on some CPUs, without an error."""
        with pytest.raises(UserError, match=f"--attention {name} cannot run this model: it needs a CUDA device"):
            candidates(NEEDS, CPU, torch.float32, None, ALL, name)

    def test_every_name_can_be_asked_for(self):
        assert [ModelOptions("m", attention=name).attention for name in ORDER] == list(ORDER)  # pyright: ignore
        assert all(why_not(name, NEEDS, CPU, torch.float32, None) for name in ORDER if name != "sdpa")


class TestAvailable:
    def installed(self, monkeypatch: pytest.MonkeyPatch, modules: set[str], versions: dict[str, str]) -> set[str]:
        def of(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError
            return versions[name]

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else None)
        monkeypatch.setattr(importlib.metadata, "version", of)
        return available_backends()

    @pytest.mark.parametrize(
        ("modules", "versions", "expected"),
        [
            (set(), {}, {"flex", "sdpa"}),
            ({"torch.nn.attention.varlen"}, {}, {"varlen", "flex", "sdpa"}),
            # flash-attn 2.8 brings files of flash_attn.cute that do not work without flash-attn-4's requirements
            ({"flash_attn", "flash_attn.cute"}, {"flash-attn": "2.8.3.post2"}, {"flash_attn_2", "flex", "sdpa"}),
            ({"flash_attn"}, {"flash-attn": "2.5.9"}, {"flex", "sdpa"}),
            ({"flash_attn_interface"}, {}, {"flash_attn_3", "flex", "sdpa"}),
            ({"flash_attn.cute"}, {"flash-attn-4": "4.0.0b36"}, {"flash_attn_4", "flex", "sdpa"}),
            ({"flash_attn"}, {"flash-attn": "unknown"}, {"flex", "sdpa"}),
        ],
    )
    def test_what_is_found(self, monkeypatch, modules, versions, expected):
        assert self.installed(monkeypatch, modules, versions) == expected

    def test_here(self):
        """Nothing of flash-attn in the tests' environment unless it is really installed."""
        assert {"flex", "sdpa"} <= available_backends() <= set(ORDER)

    @pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
    def test_loading(self, monkeypatch, name):
        path = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
        module = ModuleType(path[name])
        vars(module)["flash_attn_varlen_func"] = getattr(kernels, name)
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, path[name], module)
        q, k, v = inputs(PLANS["shared"])
        got = load_backend(name)(q, k, v, PLANS["shared"], AttentionCall(1.0))
        torch.testing.assert_close(got, segment_attention(q, k, v, PLANS["shared"], AttentionCall(1.0)))

    def test_a_broken_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
        with pytest.raises(
            UserError, match=r"flash_attn_3 is installed but cannot be imported.*give another --attention"
        ):
            load_backend("flash_attn_3")

    @pytest.mark.parametrize("name", ["varlen", "flex", "sdpa"])
    def test_torchs_own_load_here(self, name):
        if name == "varlen" and not attention_choice._has_module("torch.nn.attention.varlen"):
            pytest.skip("this torch has no varlen_attn")
        assert callable(load_backend(name))


def changed(**settings: Any) -> Callable[..., Tensor]:
    """flash-attn 2 with something wrong in it."""

    def kernel(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, **options):
        left, softcap = options.get("window_size", (-1, -1))[0], options.get("softcap", 0.0)
        if left >= 0:
            left += settings.get("wider", 0)
        return varlen(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            scale=softmax_scale * settings.get("scale", 1.0),
            causal=causal,
            left=left,
            softcap=0.0 if settings.get("uncapped") else softcap,
            top_left=settings.get("top_left", False),
        )

    varlen = kernels.varlen_reference
    return kernel


def rounded(backend: Backend, dtype: torch.dtype) -> Backend:
    """Half precision in and out, fp32 between, as kernels compute."""
    return lambda q, k, v, plan, call: backend(q.float(), k.float(), v.float(), plan, call).to(dtype)


class TestVerification:
    ALL_OF_IT = needs(window=4096, softcap=50.0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
    def test_a_right_kernel_passes(self, name, dtype):
        verify_backend(name, rounded(KERNELS[name], dtype), self.ALL_OF_IT, CPU, dtype)

    @pytest.mark.parametrize(
        "mistake", [{"top_left": True}, {"wider": 1}, {"wider": -1}, {"uncapped": True}, {"scale": 1.1}], ids=str
    )
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_wrong_kernel_is_named(self, mistake, dtype):
        wrong = rounded(flash_backend(changed(**mistake)), dtype)
        with pytest.raises(UserError, match=r"backend flash_attn_2 does not compute what it should.*--attention"):
            verify_backend("flash_attn_2", wrong, self.ALL_OF_IT, CPU, dtype)

    def test_a_wrong_gradient_is_named(self):
        def forgetful(q, k, v, plan, call):
            """A value that is right, and a gradient that got lost."""
            return KERNELS["flash_attn_2"](q, k.detach() + 0 * k, v, plan, call)

        with pytest.raises(UserError, match="gradient of the key"):
            verify_backend("flash_attn_2", forgetful, NEEDS, CPU, torch.float32)

    def test_a_kernel_that_fails_is_named(self):
        def failing(*_):
            raise RuntimeError("no kernel image is available\nfor execution on the device")

        with pytest.raises(
            UserError, match=r"varlen fails on this device: RuntimeError: no kernel image is available\."
        ):
            verify_backend("varlen", failing, NEEDS, CPU, torch.float32)


class TestAttentionFor:
    """The first that proves right is taken."""

    @pytest.fixture(autouse=True)
    def _here(self, monkeypatch):
        functions = {
            "flash_attn_2": rounded(flash_backend(changed(top_left=True)), torch.bfloat16),
            "varlen": rounded(KERNELS["varlen"], torch.bfloat16),
            "sdpa": segment_attention,
        }
        monkeypatch.setattr(models, "candidates", lambda *_: self.names)
        monkeypatch.setattr(models, "load_backend", functions.__getitem__)

    def test_what_is_wrong_is_passed_over(self):
        self.names = ["flash_attn_2", "varlen", "sdpa"]
        with pytest.warns(UserWarning, match="passed over: attention backend flash_attn_2 does not compute what it sh"):
            assert attention_for(tiny_model(), CPU, torch.bfloat16, "auto") == "varlen"

    def test_what_is_wanted_is_not(self):
        self.names = ["flash_attn_2"]
        with pytest.raises(UserError, match=r"flash_attn_2 does not compute .* Others are --attention varlen"):
            attention_for(tiny_model(), CPU, torch.bfloat16, "flash_attn_2")

    def test_sdpa_needs_no_comparison(self):
        self.names = ["sdpa"]
        assert attention_for(tiny_model(), CPU, torch.bfloat16, "auto") == "sdpa"
