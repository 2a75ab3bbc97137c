"""Every error of the arguments: its type, and a message that names the argument, the rule and the way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dpo import KernelOptions, LMHead, fused_dpo_logps, fused_token_logps
from tests.kernels.support.problems import IGNORE, cu_seqlens

B, S, T, D, V = 2, 3, 6, 4, 7


def padded(**changes: Any) -> dict[str, Any]:
    call = {"hidden_states": torch.randn(B, S, D), "lm_head": torch.randn(V, D), "labels": torch.ones(B, S).long()}
    return {**call, **changes}


def packed(**changes: Any) -> dict[str, Any]:
    call = {"hidden_states": torch.randn(T, D), "lm_head": torch.randn(V, D), "labels": torch.ones(T).long()}
    return {**call, "cu_seqlens": cu_seqlens([2, 4]), **changes}


def headed(**parts: Any) -> dict[str, Any]:
    return packed(lm_head=LMHead(torch.randn(V, D), **parts))


def rows(*index: int, dtype: torch.dtype = torch.int64, **changes: Any) -> dict[str, Any]:
    return packed(shift=False, row_index=torch.tensor(index, dtype=dtype), **changes)


def ds_partitioned() -> Tensor:
    weight = torch.empty(0)
    weight.ds_id = 3  # pyright: ignore[reportAttributeAccessIssue]
    return weight


class WithHead(nn.Module):
    def get_output_embeddings(self) -> None: ...


META = torch.device("meta")

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # Types and dtypes.
    "hidden not a tensor": (
        padded(hidden_states=[[0.0]]),
        TypeError,
        r"hidden_states must be a torch.Tensor, got list",
    ),
    "weight not a tensor": (padded(lm_head="head"), TypeError, r"lm_head weight must be a torch.Tensor, got str"),
    "a layer": (
        padded(lm_head=nn.Linear(D, V)),
        TypeError,
        r"got the module Linear; pass head_of\(model\), or its .weight",
    ),
    "a model": (padded(lm_head=WithHead()), TypeError, r"got the module WithHead; pass head_of\(model\)\.$"),
    "a layer in a head": (
        padded(lm_head=LMHead(nn.Linear(D, V))),  # pyright: ignore[reportArgumentType]
        TypeError,
        r"got the module Linear",
    ),
    "labels not a tensor": (padded(labels=[1]), TypeError, r"labels must be a torch.Tensor, got list"),
    "integer hidden": (
        padded(hidden_states=torch.ones(B, S, D).int()),
        TypeError,
        r"hidden_states must be one of float64, float32, bfloat16, float16, got torch.int32",
    ),
    "quantised weight": (
        padded(lm_head=torch.ones(V, D).to(torch.int8)),
        TypeError,
        r"lm_head weight must be one of .*, got torch.int8; dequantise it with its scales",
    ),
    "8-bit hidden": (
        padded(hidden_states=torch.ones(B, S, D).to(torch.float8_e4m3fn)),
        TypeError,
        r"hidden_states must be one of float64, .*, got torch.float8_e4m3fn",
    ),
    "8-bit weight": (
        padded(lm_head=torch.ones(V, D).to(torch.float8_e5m2)),
        TypeError,
        r"lm_head weight must be one of float64, .*, got torch.float8_e5m2; dequantise",
    ),
    "float labels": (padded(labels=torch.ones(B, S)), TypeError, r"labels must be integers, got torch.float32"),
    "bool labels": (padded(labels=torch.ones(B, S).bool()), TypeError, r"labels must be integers, got torch.bool"),
    "complex labels": (
        padded(labels=torch.ones(B, S, dtype=torch.complex64)),
        TypeError,
        r"labels must be integers, got torch.complex64",
    ),
    "dtypes differ": (
        padded(hidden_states=torch.randn(B, S, D).bfloat16()),
        TypeError,
        r"hidden_states are torch.bfloat16 and lm_head weight torch.float32; cast one of them.*autocast",
    ),
    "integer bias": (headed(bias=torch.ones(V).int()), TypeError, r"bias must be one of .*, got torch.int32"),
    "integer lora": (
        headed(lora=(torch.ones(2, D).int(), torch.ones(V, 2), 1.0)),
        TypeError,
        r"lora a must be one of .*, got torch.int32",
    ),
    "short offsets": (
        packed(cu_seqlens=torch.tensor([0, T], dtype=torch.int16)),
        TypeError,
        r"cu_seqlens must be int32 \(or int64\), got torch.int16",
    ),
    "float offsets": (packed(cu_seqlens=torch.tensor([0.0, 6.0])), TypeError, r"cu_seqlens must be int32"),
    # Shapes.
    "weight of one dimension": (
        padded(lm_head=torch.randn(D)),
        ValueError,
        r"lm_head weight must have shape \[V, D\] with V, D >= 1, got \[4\]\.$",
    ),
    "empty vocabulary": (padded(lm_head=torch.randn(0, D)), ValueError, r"V, D >= 1, got \[0, 4\]"),
    "no hidden width": (padded(lm_head=torch.randn(V, 0)), ValueError, r"V, D >= 1, got \[7, 0\]"),
    "FSDP1, no part of it": (
        padded(lm_head=nn.Parameter(torch.empty(0))),
        ValueError,
        r"got \[0\]\. A parameter of one dimension is one rank's flat part.*FSDP1.*within the forward",
    ),
    "FSDP1, a part": (padded(lm_head=nn.Parameter(torch.randn(9))), ValueError, r"got \[9\]\. .*FSDP1"),
    "ZeRO-3": (padded(lm_head=ds_partitioned()), ValueError, r"partitioned by DeepSpeed ZeRO-3.*GatheredParameters"),
    "transposed weight": (
        padded(lm_head=torch.randn(D, V)),
        ValueError,
        r"hidden_states \[2, 3, 4\] and lm_head weight \[4, 7\] must agree.*weight\.T",
    ),
    "hidden of one dimension": (
        padded(hidden_states=torch.randn(D), labels=torch.ones(1).long()),
        ValueError,
        r"hidden_states must have shape \[B, S, D\] \(padded\) or \[T, D\] \(packed\), got \[4\]",
    ),
    "hidden of four dimensions": (padded(hidden_states=torch.randn(1, B, S, D)), ValueError, r"got \[1, 2, 3, 4\]"),
    "scalar hidden": (padded(hidden_states=torch.tensor(1.0)), ValueError, r"hidden_states \[\] and lm_head weight"),
    "shifted labels, padded": (
        padded(labels=torch.ones(B, S - 1).long()),
        ValueError,
        r"labels must have shape \[B, S\] = \[2, 3\] to match hidden_states \[2, 3, 4\], got \[2, 2\].*shift=False",
    ),
    "shifted labels, packed": (
        packed(labels=torch.ones(T - 1).long()),
        ValueError,
        r"labels must have shape \[T\] = \[6\] to match hidden_states \[6, 4\], got \[5\].*shift=False",
    ),
    "packed without offsets": (
        packed(cu_seqlens=None),
        ValueError,
        r"cu_seqlens is required with packed hidden_states \[6, 4\]; for one sequence pass torch.tensor\(\[0, 6\]",
    ),
    "padded with offsets": (
        padded(cu_seqlens=cu_seqlens([6])),
        ValueError,
        r"cu_seqlens goes with packed hidden_states \[T, D\] or \[1, T, D\], got \[2, 3, 4\]",
    ),
    "offsets of two dimensions": (
        packed(cu_seqlens=cu_seqlens([6])[None]),
        ValueError,
        r"cu_seqlens must have shape \[N \+ 1\], got \[1, 2\]",
    ),
    "no offsets": (
        packed(cu_seqlens=cu_seqlens([])[:0]),
        ValueError,
        r"cu_seqlens must have shape \[N \+ 1\], got \[0\]",
    ),
    "bias shape": (
        headed(bias=torch.ones(V + 1)),
        ValueError,
        r"bias must have shape \[7\] for a weight \[7, 4\], got \[8\]",
    ),
    "lora without rank": (
        headed(lora=(torch.ones(0, D), torch.ones(V, 0), 1.0)),
        ValueError,
        r"lora has rank 0; use lora=None",
    ),
    "lora a transposed": (
        headed(lora=(torch.ones(D, 2), torch.ones(V, 2), 1.0)),
        ValueError,
        r"lora a must have shape \[4, 4\] for a weight \[7, 4\], got \[4, 2\]",
    ),
    "lora b transposed": (
        headed(lora=(torch.ones(2, D), torch.ones(2, V), 1.0)),
        ValueError,
        r"lora b must have shape \[7, 2\] for a weight \[7, 4\], got \[2, 7\]",
    ),
    # Devices.
    "weight elsewhere": (
        padded(lm_head=torch.randn(V, D, device=META)),
        ValueError,
        r"lm_head weight is on meta, which holds no numbers: accelerate's offloading.*move it to cpu",
    ),
    "hidden elsewhere": (
        padded(hidden_states=torch.randn(B, S, D, device=META)),
        ValueError,
        r"hidden_states is on meta, which holds no numbers.*move it to a device",
    ),
    "labels elsewhere": (padded(labels=torch.ones(B, S, device=META).long()), ValueError, r"labels is on meta"),
    "offsets elsewhere": (packed(cu_seqlens=cu_seqlens([6]).to(META)), ValueError, r"cu_seqlens is on meta"),
    "bias elsewhere": (headed(bias=torch.ones(V, device=META)), ValueError, r"bias is on meta, which holds no numbers"),
    "lora elsewhere": (
        headed(lora=(torch.ones(2, D), torch.ones(V, 2, device=META), 1.0)),
        ValueError,
        r"lora b is on meta, which holds no numbers",
    ),
    # Values.
    "offsets start late": (
        packed(cu_seqlens=torch.tensor([1, 6])),
        ValueError,
        r"cu_seqlens must start at 0, never decrease and end at T = 6, got \[1, 6\]",
    ),
    "offsets end early": (
        packed(cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        r"end at T = 6.*a sequence of their own",
    ),
    "offsets end late": (packed(cu_seqlens=torch.tensor([0, 7])), ValueError, r"end at T = 6, got \[0, 7\]"),
    "offsets decrease": (packed(cu_seqlens=torch.tensor([0, 4, 2, 6])), ValueError, r"never decrease"),
    "label at V": (
        packed(labels=torch.full((T,), V)),
        ValueError,
        r"\[0, V\) = \[0, 7\) or be ignore_index = -100, got 7",
    ),
    "negative label": (
        packed(labels=torch.full((T,), IGNORE), ignore_index=-1),
        ValueError,
        r"ignore_index = -1, got -100 for row 0; .*another padding label",
    ),
    # The head.
    "softcap zero": (headed(softcap=0.0), ValueError, r"softcap must be positive, got 0.0; use None"),
    "softcap negative": (headed(softcap=-30.0), ValueError, r"softcap must be positive, got -30.0"),
    "softcap NaN": (headed(softcap=float("nan")), ValueError, r"softcap must be positive, got nan"),
    "temperature zero": (headed(temperature=0.0), ValueError, r"temperature must be positive, got 0.0"),
    "temperature NaN": (headed(temperature=float("nan")), ValueError, r"temperature must be positive, got nan"),
    "process group": (
        headed(process_group=object()),
        ValueError,
        r"process_group must be a torch.distributed.ProcessGroup, got object; of a DeviceMesh it is mesh.get_group",
    ),
    "vocab_size without process group": (
        headed(vocab_size=50),
        ValueError,
        r"vocab_size is that of a head split over ranks; give its process_group too",
    ),
    # Options.
    "row_index dtype": (
        rows(0, 1, dtype=torch.int32),
        ValueError,
        r"row_index must be int64 \[R\] on cpu, got",
    ),
    "row_index shape": (
        packed(row_index=torch.zeros(1, 1).long()),
        ValueError,
        r"row_index must be int64 \[R\] on cpu, got torch.int64 \[1, 1\]",
    ),
    "row_index elsewhere": (
        packed(row_index=torch.zeros(1, device=META).long()),
        ValueError,
        r"row_index must be int64 \[R\] on cpu, got torch.int64 \[1\] on meta",
    ),
    "row_index descends": (
        rows(1, 0),
        ValueError,
        r"row_index must ascend within \[0, T\) = \[0, 6\), got 0..1",
    ),
    "row_index repeats": (rows(1, 1), ValueError, r"row_index must ascend"),
    "row_index negative": (rows(-1, 0), ValueError, r"row_index must ascend.* got -1..0"),
    "row_index beyond T": (rows(0, 6), ValueError, r"row_index must ascend.* got 0..6"),
    "row_index ignored": (
        rows(0, 1, labels=torch.tensor([1, IGNORE, 1, 1, 1, 1])),
        ValueError,
        r"row_index names rows whose label is ignored; rebuild it",
    ),
    "grad_mode": (packed(grad_mode="fast"), ValueError, r"grad_mode must be None, 'exact' or 'filtered', got 'fast'"),
    "filtering oracle": (
        packed(grad_mode="filtered", options=KernelOptions(impl="reference")),
        ValueError,
        r"grad_mode='filtered' needs another impl: 'reference' is the exact oracle",
    ),
}


@pytest.mark.parametrize("function", [fused_dpo_logps, fused_token_logps])
@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(function: Callable, call: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(**call)


@pytest.mark.parametrize("call", [padded(), packed(), packed(grad_mode="exact"), rows(0, 1, 5), headed(softcap=1.0)])
def test_control_the_unchanged_calls_pass(call: dict) -> None:
    """Without it a typo in the base call could raise every error above by accident."""
    assert fused_dpo_logps(**call).isfinite().all()
    assert fused_token_logps(**call).logps.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "triton2"}, r"impl must be None or one of \('reference', 'streaming'.*, got 'triton2'"),
        ({"impl": ""}, r"impl must be None or one of"),
        ({"workspace_mib": 0}, r"workspace_mib must be at least 1 \(MiB\), got 0"),
        ({"workspace_mib": -4}, r"workspace_mib must be at least 1 \(MiB\), got -4"),
    ],
)
def test_option_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelOptions(**options)


@pytest.mark.parametrize(
    ("dtype", "interpreted", "error", "message"),
    [
        (
            torch.float32,
            False,
            ValueError,
            r"impl='{impl}' needs CUDA tensors, got hidden_states on cpu; use impl=None",
        ),
        (torch.float64, True, TypeError, r"impl='{impl}' computes in float32, got float64 .* use impl='streaming'"),
        (torch.bfloat16, True, TypeError, r"interpreter cannot multiply bfloat16; use float32 or float16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["triton", "library"])
def test_triton_is_never_replaced_silently(
    impl: str,
    dtype: torch.dtype,
    interpreted: bool,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    call = packed(options=KernelOptions(impl=impl))
    call |= {"hidden_states": call["hidden_states"].to(dtype), "lm_head": call["lm_head"].to(dtype)}
    with pytest.raises(error, match=message.format(impl=impl)):
        fused_dpo_logps(**call)


def test_options_and_heads_are_frozen() -> None:
    with pytest.raises(AttributeError):
        KernelOptions().impl = "reference"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        LMHead(torch.randn(V, D)).softcap = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["max", "logps", "", "Entropy"])
def test_unknown_statistics(name: str) -> None:
    with pytest.raises(ValueError, match=rf"with_stats takes names out of .*'is_top1'.*, got '{name}'"):
        fused_token_logps(**packed(), with_stats=("entropy", name))


def test_what_is_split_over_ranks_is_refused() -> None:
    """A DTensor as FSDP2 leaves it: refused by name, before anything multiplies one rank's part of the vocabulary."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def split(*shape: int) -> Tensor:
            return distribute_tensor(torch.randn(shape), mesh, [Shard(0)])

        calls = {
            "lm_head weight": padded(lm_head=split(V, D)),
            "hidden_states": padded(hidden_states=split(B, S, D)),
            "bias": headed(bias=split(V)),
            "lora a": headed(lora=(split(2, D), torch.randn(V, 2), 1.0)),
            "lora b": headed(lora=(torch.randn(2, D), split(V, 2), 1.0)),
        }
        for name, call in calls.items():
            message = rf"^{name} is a DTensor.*FusedHead\(model\).*full_tensor\(\) would leave out.*process_group"
            with pytest.raises(NotImplementedError, match=message):
                fused_dpo_logps(**call)
    finally:
        dist.destroy_process_group()


def test_a_packed_row_may_keep_its_batch_dimension() -> None:
    """[1, T, D] with labels [1, T], as DataCollatorWithFlattening makes them: the bits of [T, D], in their shape."""
    call = packed(labels=torch.tensor([IGNORE, 3, IGNORE, 5, 6, 2]), row_index=torch.tensor([0, 2, 3, 4]))
    kept = {**call, "hidden_states": call["hidden_states"][None], "labels": call["labels"][None]}
    assert torch.equal(fused_dpo_logps(**kept), fused_dpo_logps(**call))
    flat, row = fused_token_logps(**call).logps, fused_token_logps(**kept).logps
    assert row.shape == (1, T)
    assert torch.equal(row[0], flat)
    gradients = []
    for each in (call, kept):
        hidden = each["hidden_states"].clone().requires_grad_()
        fused_dpo_logps(**{**each, "hidden_states": hidden}).sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(gradients[1][0], gradients[0])
    with pytest.raises(ValueError, match=r"labels must have shape \[B, S\] = \[1, 6\]"):
        fused_dpo_logps(**{**kept, "labels": call["labels"]})


def test_first_bad_row_is_named() -> None:
    """Under shift=True the row is the one that predicts the label, which is what `hidden_states` is indexed by."""
    labels = torch.ones(T).long()
    labels[[3, 5]] = torch.tensor([99, 98])
    with pytest.raises(ValueError, match=r"got 99 for row 2;"):
        fused_dpo_logps(**packed(labels=labels))
    with pytest.raises(ValueError, match=r"got 99 for row 3;"):
        fused_dpo_logps(**packed(labels=labels, shift=False))
