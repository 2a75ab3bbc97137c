"""Arguments of the public functions, checked and brought to the one form the implementations take."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_dpo.hardware import HAS_TRITON
from fused_dpo.head import LMHead, LowRankAdapter, VocabShard
from fused_dpo.options import KernelOptions
from fused_dpo.transforms import is_transformed
from fused_dpo.vocab_parallel.shard import check_agreement, shard_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What can be computed in, on every device."""
NOT_SCORED = -1
"""Target of a row that is not scored."""


@dataclass(frozen=True)
class Scoring:
    """One call in canonical form: flat rows, aligned targets, sequence offsets."""

    hidden: Tensor
    """[T, D] in the compute dtype."""
    target: Tensor
    """int64 [T]: the token that row i predicts, NOT_SCORED where nothing is scored, V where the label was invalid (the
    implementations answer NaN there); V is that of all ranks."""
    cu_seqlens: Tensor
    """int64 [N+1]: row offsets of the sequences."""
    labels_shape: torch.Size
    """Shape of the caller's labels, for per-token results."""
    head: LMHead
    """The head, its adapter a LowRankAdapter."""
    shard: VocabShard | None
    """Which part of the vocabulary the head is; None for all of it."""


def check_scoring(
    hidden_states: Tensor,
    lm_head: Tensor | LMHead,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    row_index: Tensor | None,
) -> Scoring:
    """Validate a call of `fused_dpo_logps` or `fused_token_logps` and align its labels.

    Values on the device (labels, offsets) are checked where that costs no synchronisation, that is on the CPU, and
    everywhere with `FUSED_DPO_DEBUG=1`; elsewhere, and in function transforms, an invalid label makes its log-prob NaN.
    """
    head = lm_head if isinstance(lm_head, LMHead) else LMHead(lm_head)
    _check_tensors(hidden_states, head, labels)
    packed = _check_shapes(hidden_states, head, labels, cu_seqlens)
    tensors = (hidden_states, *head.differentiable, labels, cu_seqlens, row_index)
    look = _values_are_free([tensor for tensor in tensors if tensor is not None])
    hidden = _to_compute_dtype(hidden_states, head)
    shard = shard_of(head)
    T, V = labels.numel(), head.weight.shape[0] if shard is None else shard.size
    if packed:
        assert cu_seqlens is not None
        if look:
            _check_offsets(cu_seqlens, T)
        offsets = cu_seqlens.to(torch.int64)
    else:
        B, S = labels.shape
        offsets = torch.arange(B + 1, device=labels.device) * S
    aligned = labels.reshape(T).to(torch.int64)
    if shift:
        aligned = _shift(aligned, offsets, ignore_index)
    target = _check_targets(aligned, V, ignore_index, look)
    if row_index is not None:
        _check_row_index(row_index, target, look)
        chosen = target[row_index]
        target = torch.full_like(target, NOT_SCORED).index_copy(0, row_index, chosen)
    flat = hidden.reshape(T, hidden.shape[-1])
    if shard is not None and look:
        check_agreement(shard, flat, target)
    return Scoring(flat, target, offsets, labels.shape, _check_head(head, hidden.device), shard)


def choose_implementation(impl: str | None, hidden: Tensor) -> str:
    """Choose the implementation to run, by name; see `KernelOptions.impl`.

    Raises:
        ValueError: triton asked for on a device it does not run on.
        TypeError: triton asked for in a dtype it does not compute in.
        ImportError: triton asked for where it is not installed.
    """
    if impl is None:
        return "triton" if HAS_TRITON and hidden.is_cuda and hidden.dtype != torch.float64 else "streaming"
    if impl not in ("triton", "library"):
        return impl
    if not HAS_TRITON:
        raise ImportError(f"impl={impl!r} needs the package triton, which is not installed; use None or 'streaming'.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not hidden.is_cuda and not interpreted:
        raise ValueError(
            f"impl={impl!r} needs CUDA tensors, got hidden_states on {hidden.device}; use impl=None or 'streaming' "
            f"(or set TRITON_INTERPRET=1 before triton is imported, to run the kernels in Python)."
        )
    if hidden.dtype == torch.float64:
        raise TypeError(f"impl={impl!r} computes in float32, got float64 hidden_states; use impl='streaming'.")
    if hidden.dtype == torch.bfloat16 and not hidden.is_cuda:
        raise TypeError("Triton's interpreter cannot multiply bfloat16; use float32 or float16 with it.")
    return impl


def choose_filter_eps(grad_mode: str | None, impl: str, dtype: torch.dtype, options: KernelOptions) -> float:
    """Choose the threshold of the filtered gradients, 0 for exact ones: as asked for, else by the compute dtype.

    Raises:
        ValueError: an unknown mode, or the oracle asked to filter.
    """
    if grad_mode not in (None, "exact", "filtered"):
        raise ValueError(f"grad_mode must be None, 'exact' or 'filtered', got {grad_mode!r}.")
    if grad_mode == "filtered" and impl == "reference":
        raise ValueError("grad_mode='filtered' needs another impl: 'reference' is the exact oracle.")
    filtered = grad_mode == "filtered" or (grad_mode is None and impl != "reference" and dtype.itemsize == 2)
    return float(options.filter_eps) if filtered else 0.0


def _check_dtype(name: str, tensor: Tensor, advice: str = "") -> None:
    if tensor.dtype not in DTYPES:
        choices = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be one of {choices}, got {tensor.dtype}{advice}.")


def _check_tensors(hidden: Tensor, head: LMHead, labels: Tensor) -> None:
    """Check that the tensors are such, that their numbers are here, and their dtypes."""
    weight: object = head.weight
    if isinstance(weight, nn.Module):
        advice = "head_of(model)" if hasattr(weight, "get_output_embeddings") else "head_of(model), or its .weight"
        raise TypeError(
            f"lm_head weight must be a torch.Tensor, got the module {type(weight).__name__}; pass {advice}."
        )
    a, b, _ = head.lora or (None, None, 0.0)
    required = {"hidden_states": hidden, "lm_head weight": weight, "labels": labels}
    for name, tensor in {**required, "bias": head.bias, "lora a": a, "lora b": b}.items():
        if tensor is None and name not in required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if type(tensor).__name__ == "DTensor":
            raise NotImplementedError(_DTENSOR.format(name=name))
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name} is on meta, which holds no numbers: accelerate's offloading leaves weights there outside of "
                f"their module's call, and init_empty_weights until they are loaded; move it to {_elsewhere(hidden)}."
            )
    _check_dtype("hidden_states", hidden)
    _check_dtype("lm_head weight", head.weight, "; dequantise it with its scales first, which a cast leaves out")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}.")


_DTENSOR = (
    "{name} is a DTensor, split over ranks; what for, it does not say. FSDP2's shards are gathered within the call of "
    "the head's own layer: FusedHead(model)(hidden_states, labels) makes that call. (full_tensor() would leave out "
    "what the other ranks add to its gradient.) For tensor parallelism, where all ranks have the same hidden states, "
    "pass LMHead(weight, process_group=...), which head_of(model) does for transformers' own plan."
)


def _elsewhere(hidden: Tensor) -> str:
    return "a device" if hidden.device.type == "meta" else str(hidden.device)


def _check_weight_shape(weight: Tensor) -> None:
    if weight.ndim == 2 and weight.numel():
        return
    hint = ""
    if hasattr(weight, "ds_id"):
        hint = " The weight is partitioned by DeepSpeed ZeRO-3; gather it with deepspeed.zero.GatheredParameters."
    elif weight.ndim == 1 and isinstance(weight, nn.Parameter):
        hint = (
            " A parameter of one dimension is one rank's flat part of it, as FSDP1 leaves it outside of its forward; "
            "compute within the forward of the wrapped model, or under FullyShardedDataParallel.summon_full_params to "
            "evaluate."
        )
    raise ValueError(f"lm_head weight must have shape [V, D] with V, D >= 1, got {list(weight.shape)}.{hint}")


def _check_shapes(hidden: Tensor, head: LMHead, labels: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Check shapes and devices; returns whether the call is packed."""
    weight = head.weight
    _check_weight_shape(weight)
    if hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden_states {list(hidden.shape)} and lm_head weight {list(weight.shape)} must agree in their last "
            f"dimension D; a weight stored as [D, V] must be passed transposed (weight.T)."
        )
    # A packed row may keep its batch dimension of 1, as DataCollatorWithFlattening makes it.
    packed = hidden.ndim == 2 or (hidden.ndim == 3 and len(hidden) == 1 and cu_seqlens is not None)
    if not packed and hidden.ndim != 3:
        raise ValueError(
            f"hidden_states must have shape [B, S, D] (padded) or [T, D] (packed), got {list(hidden.shape)}."
        )
    if labels.shape != hidden.shape[:-1]:
        form = "[B, S]" if hidden.ndim == 3 else "[T]"
        raise ValueError(
            f"labels must have shape {form} = {list(hidden.shape[:-1])} to match hidden_states {list(hidden.shape)}, "
            f"got {list(labels.shape)}; pass unshifted labels, or shift=False with rows and labels already aligned."
        )
    if packed and cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens is required with packed hidden_states {list(hidden.shape)}; "
            f"for one sequence pass torch.tensor([0, {hidden.shape[0]}], dtype=torch.int32)."
        )
    if not packed and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens goes with packed hidden_states [T, D] or [1, T, D], got {list(hidden.shape)}.")
    for name, tensor in (("lm_head weight", weight), ("labels", labels), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_states on {hidden.device}; move one of them.")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1):
        raise ValueError(f"cu_seqlens must have shape [N + 1], got {list(cu_seqlens.shape)}.")
    if cu_seqlens is not None and cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 (or int64), got {cu_seqlens.dtype}.")
    return packed


def _to_compute_dtype(hidden: Tensor, head: LMHead) -> Tensor:
    """Bring the hidden states into the dtype to compute in: autocast's where it is on, else their own.

    The weight stays as it is: it is converted slice by slice, so that its gradient can be accumulated in fp32 and
    returned in its own dtype.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(device_type))
    if hidden.dtype != head.weight.dtype:
        raise TypeError(
            f"hidden_states are {hidden.dtype} and lm_head weight {head.weight.dtype}; cast one of them, "
            f"or run under torch.autocast to train a float32 weight in half precision."
        )
    return hidden


def _check_head(head: LMHead, device: torch.device) -> LMHead:
    """Check the optional parts of the head against its weight; returns it with the adapter as a LowRankAdapter."""
    V, D = head.weight.shape
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap must be positive, got {head.softcap}; use None for no softcap.")
    if not head.temperature > 0:
        raise ValueError(f"temperature must be positive, got {head.temperature}.")
    lora = None if head.lora is None else LowRankAdapter(*head.lora)
    parts: list[tuple[str, Tensor, list[int]]] = []
    if head.bias is not None:
        parts.append(("bias", head.bias, [V]))
    if lora is not None:
        r = lora.a.shape[0]
        if not r:
            raise ValueError("lora has rank 0; use lora=None for a head without an adapter.")
        parts += [("lora a", lora.a, [r, D]), ("lora b", lora.b, [V, r])]
    for name, tensor, shape in parts:
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for a weight [{V}, {D}], got {list(tensor.shape)}.")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_states on {device}; move one of them.")
        _check_dtype(name, tensor)
    return LMHead(
        head.weight, head.bias, float(head.logit_scale), head.softcap, float(head.temperature), lora, head.process_group
    )


def _values_are_free(tensors: list[Tensor]) -> bool:
    """Tell whether looking at values costs nothing worth mentioning: no synchronisation, no graph break.

    In `vmap` and `torch.func.linearize` nobody can look.
    """
    if torch.compiler.is_compiling() or any(is_transformed(tensor) for tensor in tensors):
        return False
    return tensors[0].device.type == "cpu" or os.environ.get("FUSED_DPO_DEBUG") == "1"


def _check_offsets(cu_seqlens: Tensor, T: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must start at 0, never decrease and end at T = {T}, got {cu_seqlens.tolist()[:8]} ... "
            f"{int(cu_seqlens[-1])}; give padding rows at the end a sequence of their own."
        )


def _shift(labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
    """Align unshifted labels with the rows that predict them; the last row of a sequence predicts nothing."""
    T = labels.numel()
    starts_sequence = torch.zeros(T + 1, dtype=torch.bool, device=labels.device)
    starts_sequence.index_fill_(0, offsets, True)  # an assignment would copy its value from the host, and wait for it
    following = torch.cat((labels[1:], labels.new_full((min(T, 1),), ignore_index)))
    return following.masked_fill(starts_sequence[1:], ignore_index)


def _check_targets(aligned: Tensor, V: int, ignore_index: int, look: bool) -> Tensor:
    ignored = aligned == ignore_index
    invalid = ~ignored & ((aligned < 0) | (aligned >= V))
    if look and bool(invalid.any()):
        row = int(invalid.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, V) = [0, {V}) or be ignore_index = {ignore_index}, got {int(aligned[row])} for "
            f"row {row}; a tokenizer larger than the head, or another padding label, is the usual cause."
        )
    return aligned.masked_fill(invalid, V).masked_fill(ignored, NOT_SCORED)


def _check_row_index(row_index: Tensor, target: Tensor, look: bool) -> None:
    if row_index.ndim != 1 or row_index.dtype != torch.int64 or row_index.device != target.device:
        raise ValueError(
            f"row_index must be int64 [R] on {target.device}, got {row_index.dtype} {list(row_index.shape)} on "
            f"{row_index.device}."
        )
    if look and row_index.numel():
        low, high = int(row_index.min()), int(row_index.max())
        if low < 0 or high >= target.numel() or bool((row_index.diff() <= 0).any()):
            raise ValueError(f"row_index must ascend within [0, T) = [0, {target.numel()}), got {low}..{high}.")
        if bool((target[row_index] == NOT_SCORED).any()):
            raise ValueError("row_index names rows whose label is ignored; rebuild it from these labels.")
