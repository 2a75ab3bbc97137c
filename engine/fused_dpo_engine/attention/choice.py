"""Which attention backends can do what a model needs here, in a stated order; it runs on the first that is right."""

import importlib.metadata
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass

import torch

from fused_dpo_engine.attention.call import Backend
from fused_dpo_engine.errors import UserError

ORDER = ("flash_attn_3", "flash_attn_4", "flash_attn_2", "varlen", "flex", "sdpa")
"""flash-attn where its packages can be imported, then torch's own variable-length kernel, FlexAttention, and SDPA a
segment, which does everything anywhere."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of its attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of queries and keys."""
    value_dim: int
    window: int | None = None
    """Tokens that a layer with a sliding window sees, itself included; None if no layer has one."""
    softcap: float | None = None
    sinks: bool = False


def why_not(
    name: str, needs: AttentionNeeds, device: torch.device, dtype: torch.dtype, capability: tuple[int, int] | None
) -> str | None:
    """Say why a backend, if it is installed, cannot serve these needs; None if it can.

    Args:
        name: one of `ORDER`.
        needs: of the model.
        device: that the model computes on.
        dtype: that it computes in.
        capability: compute capability of a CUDA device, such as (9, 0).
    """
    if name == "sdpa":
        return None
    if device.type != "cuda" or capability is None or capability < (8, 0):
        return "it needs a CUDA device of compute capability 8.0 or later"
    if dtype not in _HALF:
        return f"it computes in float16 or bfloat16, not in {dtype}"
    if name == "flex":
        return None
    if needs.sinks:
        return "it has no attention sinks"
    if needs.head_dim != needs.value_dim:
        return f"it needs values as wide as keys, not {needs.value_dim} and {needs.head_dim}"
    widest = 128 if name == "flash_attn_4" else 256
    if needs.head_dim > widest:
        return f"its heads are at most {widest} wide, not {needs.head_dim}"
    if needs.head_dim % 8 and name != "flash_attn_2":  # which pads them
        return f"its heads are multiples of 8 wide, not {needs.head_dim}"
    if needs.softcap is not None and name in ("varlen", "flash_attn_4"):
        return "it has no softcap"
    if needs.window is not None and name == "flash_attn_4":
        return "its backward has no sliding window"
    if name == "flash_attn_3" and capability[0] != 9:
        return "it is made for Hopper (compute capability 9)"
    if name == "flash_attn_4" and capability[0] not in (9, 10, 11):
        return "it is made for Hopper and Blackwell (compute capability 9 to 11)"
    return None


def candidates(
    needs: AttentionNeeds,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    available: Collection[str],
    wanted: str = "auto",
) -> list[str]:
    """List the backends that are available and can serve the needs, in the order of `ORDER`, or the one that is wanted.

    Raises:
        UserError: the one that is wanted is not there or cannot serve them.
    """
    if wanted == "auto":
        return [n for n in ORDER if n in available and why_not(n, needs, device, dtype, capability) is None]
    if wanted not in available:
        raise UserError(f"--attention {wanted}: not installed here; installed are {', '.join(sorted(available))}.")
    reason = why_not(wanted, needs, device, dtype, capability)
    if reason:
        raise UserError(f"--attention {wanted} cannot run this model: {reason}; --attention auto finds one that can.")
    return [wanted]


def available_backends() -> set[str]:
    """List the backends whose packages are installed here."""
    found = {"flex", "sdpa"}
    if _has_module("torch.nn.attention.varlen"):
        found.add("varlen")
    if _has_module("flash_attn_interface"):
        found.add("flash_attn_3")
    if _version("flash-attn-4"):  # flash-attn 2.8 has files of flash_attn.cute too, of an early state
        found.add("flash_attn_4")
    if _version("flash-attn") >= (2, 6):  # the first with softcap; bottom-right alignment since 2.1
        found.add("flash_attn_2")
    return found


def load_backend(name: str) -> Backend:
    """Import the package of a backend, and give its function.

    Raises:
        UserError: the package is there but cannot be imported.
    """
    if name == "sdpa":
        from fused_dpo_engine.attention.segments import segment_attention

        return segment_attention
    if name == "flex":
        from fused_dpo_engine.attention.flex import flex_backend

        return flex_backend
    from fused_dpo_engine.attention.varlen import load_varlen

    try:
        return load_varlen(name)
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(
            f"attention backend {name} is installed but cannot be imported: {error}; mend the package, or give another "
            f"--attention (varlen, flex, sdpa)."
        ) from error


def _version(distribution: str) -> tuple[int, ...]:
    """Read major and minor version of what is installed; empty if it is not, or has no such version."""
    try:
        return tuple(int(part) for part in importlib.metadata.version(distribution).split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent package that is missing or broken
        return False
