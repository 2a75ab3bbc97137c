"""Every Triton kernel and shipped configuration, compiled ahead of time for sm_80 and sm_90: no GPU needed.

    python -m benchmarks.compile_table [--json]

Prints registers, spilled bytes and shared memory of each, and exits with 1 if one spills more than its allowance, takes
more shared memory than the architecture has, or multiplies half-precision tiles on sm_90 without wgmma. Needs the
compiler, so TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import console
from fused_dpo.triton_backward import _dlogits_kernel
from fused_dpo.triton_configs import SPLIT_COLUMNS, TILE_CONFIGS
from fused_dpo.triton_forward import MERGE_ROWS, _logps_forward_kernel, _merge_splits_kernel

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Dynamic shared memory a block may have, in bytes (CUDA programming guide, table of compute capabilities)."""
SPILL_ALLOWANCE = 64
"""Bytes of stack a thread: a few registers saved outside the inner loop cost nothing that can be measured."""
HALF = {"bf16", "fp16"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel and configuration."""

    kernel: str
    architecture: int
    dtype: str
    options: str
    tile: str
    registers: int
    stack: int
    shared: int
    wgmma: int
    """wgmma instructions in the PTX."""

    def problems(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.stack > SPILL_ALLOWANCE:
            found.append(f"spills {self.stack} bytes")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"takes {self.shared} bytes of shared memory")
        if self.architecture == 90 and self.dtype in HALF and self.kernel != "_merge_splits_kernel" and not self.wgmma:
            found.append("multiplies without wgmma")
        return found


# Options of the kernels, by whether they make the epilogue a rich one (see `tile_config`).
OPTIONS: dict[bool, dict[str, dict[str, Any]]] = {
    False: {"plain": {}, "bias": {"HAS_BIAS": True}},
    True: {
        "stats": {"WANT_STATS": True},
        "softcap": {"HAS_SOFTCAP": True},
        "all": {"WANT_STATS": True, "HAS_BIAS": True, "HAS_SOFTCAP": True, "RANK": 16},
    },
}


def compile_kernel(kernel: Any, architecture: int, dtype: str, options: str, tile: str, constants: dict[str, Any],
                   warps: int, stages: int) -> Compiled:  # fmt: skip
    """Compile one kernel for contiguous inputs whose sizes are multiples of 16, as real heads have them."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    in_dtype = {"hidden_ptr", "weight_ptr", "lora_h_ptr", "lora_b_ptr", "bias_ptr", "dz_ptr"}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("row_index_ptr", "target_ptr"):
            return "*i64"
        if name.endswith("_ptr"):
            return f"*{dtype}" if name in in_dtype else "*fp32"
        return "fp32" if name in ("logit_scale", "softcap", "inverse_temperature") else "i32"

    aligned = {"D", "stride_ht", "stride_wv", "stride_z"}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name in aligned)
    }
    source = ASTSource(kernel, {name: type_of(name) for name in names}, constants, attributes)
    binary: Any = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "num_stages": stages}
    )
    registers, stack = resource_usage(binary.asm["cubin"])
    wgmma = binary.asm["ptx"].count("wgmma.mma_async")
    return Compiled(
        kernel.__name__, architecture, dtype, options, tile, registers, stack, binary.metadata.shared, wgmma
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, by the cuobjdump inside the triton package."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", output)
    if usage is None:
        raise RuntimeError(f"no resource usage in the output of cuobjdump: {output!r}")
    return int(usage[1]), int(usage[2])


def compile_all() -> Iterator[Compiled]:
    """Every kernel, shipped configuration and set of options."""
    unit_strides = {"stride_hd": 1, "stride_wd": 1, "stride_br": 1}
    base = {"RANK": 0, "BLOCK_R": 16, "HAS_BIAS": False, "HAS_SOFTCAP": False, "WANT_STATS": False}
    for (architecture, itemsize, rich), config in TILE_CONFIGS.items():
        tile = f"{config.block_t}x{config.block_v}x{config.block_d} w{config.num_warps} s{config.num_stages}"
        sizes = {"BLOCK_T": config.block_t, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
        for dtype in ("bf16", "fp16") if itemsize == 2 else ("fp32",):
            for label, chosen in OPTIONS[rich].items():
                constants = unit_strides | sizes | base | chosen | {"SPLIT_COLUMNS": SPLIT_COLUMNS}
                for kernel in (_logps_forward_kernel, _dlogits_kernel):
                    yield compile_kernel(
                        kernel, architecture, dtype, label, tile, constants, config.num_warps, config.num_stages
                    )
    for architecture in (80, 90):
        for stats in (False, True):
            constants = {"SPLITS": 32, "WANT_STATS": stats, "BLOCK_T": MERGE_ROWS}
            label, tile = "stats" if stats else "plain", f"{MERGE_ROWS} rows"
            yield compile_kernel(
                _merge_splits_kernel, architecture, "fp32", label, f"{MERGE_ROWS} rows", constants, 4, 3
            )


def main() -> int:
    """Compile, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    as_json = parser.parse_args().json
    rows = list(compile_all())
    if as_json:
        print(json.dumps([asdict(row) | {"problems": row.problems()} for row in rows]))
    else:
        table = Table(title=f"triton {triton.__version__}, ahead of time, spill allowance {SPILL_ALLOWANCE} bytes")
        for column in ("kernel", "sm", "dtype", "options", "tile", "registers", "spilled", "shared KiB", "wgmma", ""):
            table.add_column(column)
        for row in rows:
            numbers = (row.registers, row.stack, f"{row.shared / 1024:.0f}", row.wgmma)
            labels = (
                row.kernel.strip("_").removesuffix("_kernel"),
                str(row.architecture),
                row.dtype,
                row.options,
                row.tile,
            )
            table.add_row(*labels, *map(str, numbers), "; ".join(row.problems()) or "ok")
        console().print(table)
    return 1 if any(row.problems() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
