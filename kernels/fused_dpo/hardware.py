"""What a device can do: whether it has units that multiply bf16 matrices, and which of a CPU's units may be used.

Also whether triton is there to reach a GPU's: it has no wheels for macOS and Windows.
"""

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables by which oneDNN, which multiplies for torch on CPUs, is told what to do without; the first one
that is set counts."""
ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
ISAS_WITH_BF16 = (
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
    "AVX10_1_512",
    "AVX10_1_512_AMX",
    "AVX10_1_512_AMX_FP16",
    "AVX10_2_512",
    "AVX10_2_512_AMX_2",
    "AVX10_2",
    "AVX10_2_AMX_2",
    "ALL",
    "DEFAULT",
)
"""Values of those variables, by whether products of bf16 numbers have instructions of their own within them (oneDNN's
documentation, "CPU Dispatcher Control"). AVX2_VNNI_2 converts bf16 and multiplies it as fp32."""

HAS_TRITON = find_spec("triton") is not None
"""Whether triton can be imported. Not asked in every call: compiled code would have to look for files."""


@lru_cache(maxsize=8)
def has_bf16_units(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 matrices faster than fp32 ones.

    A CPU does with AVX512-BF16 or AMX, unless `ONEDNN_MAX_CPU_ISA` keeps oneDNN from using them. Without them torch
    multiplies bf16 matrices in a plain loop on one thread, up to a hundred times slower than fp32 ones.

    The answer is kept for the process, as oneDNN reads its variable once.

    Raises:
        ValueError: `ONEDNN_MAX_CPU_ISA` names no instruction set that oneDNN knows; it would ignore the variable.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    allowed = bf16_allowed()
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return allowed and units and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # not every build has the operator


def bf16_allowed() -> bool:
    """Tell whether the environment lets oneDNN use a CPU's bf16 units, if there are any.

    Raises:
        ValueError: as in `has_bf16_units`.
    """
    variable, isa = masked_isa()
    if isa not in (*ISAS_WITHOUT_BF16, *ISAS_WITH_BF16):
        choices = ", ".join((*ISAS_WITHOUT_BF16, *ISAS_WITH_BF16))
        raise ValueError(f"{variable}={isa} names no instruction set; unset it or choose one of {choices}.")
    return isa in ISAS_WITH_BF16


def tag_compiled_code() -> None:
    """Make `torch.compile` look for code that it kept only among code for the vector units that torch uses here.

    Torch finds it by the graph alone (seen in 2.13). In a cache that was filled under AVX2 it finds loops that step by
    8 numbers, builds them for AVX512's vectors of 16, and the results are wrong without an error.
    """
    units = torch.backends.cpu.get_cpu_capability()
    tag = torch.compiler.config.cache_key_tag
    if units not in tag.split():
        torch.compiler.config.cache_key_tag = f"{tag} {units}".strip()


def masked_isa() -> tuple[str, str]:
    """Find the variable that limits oneDNN's instruction sets, and its value in capitals; `DEFAULT` if none is set."""
    for variable in ISA_VARIABLES:
        if value := os.environ.get(variable):
            return variable, value.upper()
    return ISA_VARIABLES[0], "DEFAULT"
