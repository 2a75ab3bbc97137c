"""What this machine has that matters to the kernels, for bug reports and for choosing options."""

import importlib.metadata
import os
import platform

import torch

from fused_dpo.hardware import has_bf16_units, masked_isa
from fused_dpo_engine.attention.choice import ORDER, available_backends

PACKAGES = (
    "fused-dpo",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "datasets",
    "peft",
    "accelerate",
    "bitsandbytes",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
)


def env() -> None:
    """Print what `describe` says."""
    print(describe())


def describe() -> str:
    """List versions, devices and the paths they lead to, as lines of `name: value`."""
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    for package in PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    lines.append(("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()}"))
    lines.append(("cpu capability", torch.backends.cpu.get_cpu_capability()))
    lines.append(("cpu bf16 units", _bf16_units()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(
                (
                    f"cuda:{index}",
                    f"{properties.name}, sm_{properties.major}{properties.minor}, "
                    f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
                )
            )
    else:
        lines.append(("cuda", "no device"))
    lines.append(("head implementation", "triton" if torch.cuda.is_available() else "streaming"))
    there = available_backends()
    lines.append(("attention kernels", ", ".join(name for name in ORDER if name in there)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _bf16_units() -> str:
    """Say whether the CPU has units for bf16, and what in the environment hides them."""
    try:
        answer = "yes" if has_bf16_units(torch.device("cpu")) else "no"
    except ValueError as error:
        return str(error)
    variable, isa = masked_isa()
    return answer if isa == "DEFAULT" else f"{answer} ({variable}={isa})"
