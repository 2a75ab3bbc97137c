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
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import console
from fused_dpo.triton_backward import _dlogits_kernel
from fused_dpo.triton_configs import (
    LIBRARY_CONFIGS,
    NARROW_COLUMNS,
    PLAIN,
    PRODUCT_CONFIGS,
    RICH,
    RICHEST,
    SPLIT_COLUMNS,
    TILE_CONFIGS,
    TileConfig,
)
from fused_dpo.triton_filtered import COMPACT_BLOCK
from fused_dpo.triton_forward import MERGE_ROWS, MERGE_SPLITS, _logps_forward_kernel, _merge_splits_kernel
from fused_dpo.triton_kept import _compact_kernel, _gathered_product_kernel, _kept_dlogits_kernel

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
        multiplies = self.kernel not in ("_merge_splits_kernel", "_compact_kernel") and "given" not in self.options
        if self.architecture == 90 and self.dtype in HALF and multiplies and not self.wgmma:
            found.append("multiplies without wgmma")
        return found


# Options of the kernels, by the epilogue they make (see `epilogue_of`).
ALL = {"HAS_SCALE": True, "HAS_BIAS": True, "HAS_SOFTCAP": True, "RANK": 16}
OPTIONS: dict[int, dict[str, dict[str, Any]]] = {
    PLAIN: {"plain": {}, "bias": {"HAS_BIAS": True}},
    RICH: {"stats": {"WANT_STATS": True}, "softcap": {"HAS_SOFTCAP": True}, "all": {"WANT_STATS": True, **ALL}},
}
SCREENED: dict[int, dict[str, dict[str, Any]]] = {
    PLAIN: {"screen": {}, "screen, bias": {"HAS_BIAS": True}},
    RICH: {"screen, softcap": {"HAS_SOFTCAP": True}, "screen, lora": ALL},
    RICHEST: {"screen, stats": {"WANT_STATS": True}, "screen, all": {"WANT_STATS": True, **ALL}},
}
KEPT: dict[int, dict[str, dict[str, Any]]] = {RICH: {"plain": {}}, RICHEST: {"all": ALL}}


def compile_kernel(kernel: Any, architecture: int, dtype: str, options: str, tile: str, constants: dict[str, Any],
                   warps: int, stages: int) -> Compiled:  # fmt: skip
    """Compile one kernel for contiguous inputs whose sizes are multiples of 16, as real heads have them."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    in_dtype = {
        "hidden_ptr",
        "weight_ptr",
        "lora_h_ptr",
        "lora_b_ptr",
        "bias_ptr",
        "dz_ptr",
        "a_ptr",
        "b_ptr",
        "tail_ptr",
        "sums_ptr",
    }
    integers = {"row_index_ptr": "*i64", "target_ptr": "*i64", "index_ptr": "*i64"}
    integers |= {
        "list_ptr": "*i32",
        "counts_ptr": "*i32",
        "kept_ptr": "*i32",
        "screen_ptr": "*u8",
        "flags_ptr": "*u8",
        "marks_ptr": "*u8",
        "keep_ptr": "*u8",
    }

    described = ()
    if constants.get("DESCRIBED"):
        described, inner = ("hidden_ptr", "weight_ptr"), constants["BLOCK_D"]

    def type_of(name: str) -> str:
        if name in described:
            rows = constants["BLOCK_T" if name == "hidden_ptr" else "BLOCK_V"]
            return f"tensordesc<{dtype}[{rows}, {inner}]>"
        if name in constants:
            return "constexpr"
        if name in integers:
            return integers[name]
        if name.endswith("_ptr"):
            return f"*{dtype}" if name in in_dtype else "*fp32"
        return "fp32" if name in ("logit_scale", "softcap", "inverse_temperature", "filter_eps") else "i32"

    aligned = {"D", "stride_ht", "stride_wv", "stride_z", "stride_bk", "capacity", "stride_om", "stride_tb", "N"}
    aligned |= {"stride_pv", "stride_pt", "product_first", "first_v"}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if name not in (*constants, *described) and (name.endswith("_ptr") or name in aligned)
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
    base = {"stride_hd": 1, "stride_wd": 1, "stride_br": 1, "SPLIT_COLUMNS": SPLIT_COLUMNS, "SCREEN": False}
    base |= {"RANK": 0, "BLOCK_R": 16, "HAS_SCALE": False, "HAS_BIAS": False}
    base |= {"HAS_SOFTCAP": False, "WANT_STATS": False, "GIVEN": False, "DESCRIBED": False, "FLATTENED": False}

    def of_tile(kernel: Any, architecture: int, dtype: str, tile: TileConfig, options: str, constants: dict[str, Any]):
        label = f"{tile.block_t}x{tile.block_v}x{tile.block_d} w{tile.num_warps} s{tile.num_stages}"
        sizes = {"BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "NARROW": tile.narrow}
        constants = base | sizes | constants
        return compile_kernel(kernel, architecture, dtype, options, label, constants, tile.num_warps, tile.num_stages)

    for (architecture, itemsize, epilogue), config in TILE_CONFIGS.items():
        for dtype in ("bf16", "fp16") if itemsize == 2 else ("fp32",):
            for label, chosen in OPTIONS.get(epilogue, {}).items():
                for kernel in (_logps_forward_kernel, _dlogits_kernel):
                    yield of_tile(kernel, architecture, dtype, config, label, chosen)
            for label, chosen in SCREENED[epilogue].items():
                yield of_tile(_logps_forward_kernel, architecture, dtype, config, label, chosen | {"SCREEN": True})
            for label, chosen in KEPT.get(epilogue, {}).items():
                for way, tile in (("by columns", config), ("by rows", config.of_rows)):
                    constants = {**chosen, "BY_COLUMNS": way == "by columns"}
                    yield of_tile(_kept_dlogits_kernel, architecture, dtype, tile, f"{way}, {label}", constants)
    tile = replace(TILE_CONFIGS[90, 2, PLAIN], described=True, flattened=True)
    constants = {"DESCRIBED": True, "FLATTENED": True}
    for dtype in ("bf16", "fp16"):
        yield of_tile(_logps_forward_kernel, 90, dtype, tile, "described, flattened", constants)
        yield of_tile(
            _logps_forward_kernel, 90, dtype, tile, "described, flattened, screen", constants | {"SCREEN": True}
        )
        yield of_tile(_dlogits_kernel, 90, dtype, tile, "described", constants)
    for architecture, (itemsize, library) in product((80, 90), LIBRARY_CONFIGS.items()):
        for dtype in ("bf16", "fp16") if itemsize == 2 else ("fp32",):
            for label, chosen in (("given", {}), ("given, all", {"WANT_STATS": True, **ALL})):
                constants = {**chosen, "GIVEN": True, "SPLIT_COLUMNS": library.split_columns}
                for screen in (False, True):
                    which, screened = label + ", screen" * screen, constants | {"SCREEN": screen, "stride_pt": 1}
                    yield of_tile(_logps_forward_kernel, architecture, dtype, library.tile, which, screened)
                of_rows = constants | {"stride_pv": 1}
                yield of_tile(_dlogits_kernel, architecture, dtype, library.dz_tile, label, of_rows)
    for (architecture, itemsize), shape in PRODUCT_CONFIGS.items():
        block_t = TILE_CONFIGS[architecture, itemsize, RICH].block_t
        for dtype in ("bf16", "fp16") if itemsize == 2 else ("fp32",):
            for way, block_m, contiguous in (
                ("by columns", block_t, "stride_ak"),
                ("by rows", NARROW_COLUMNS, "stride_am"),
            ):
                constants = {"BLOCK_M": block_m, "ACCUMULATE": way == "by columns", "INDIRECT": way == "by rows"}
                constants |= {
                    "CORRECT": way == "by rows",
                    contiguous: 1,
                    "stride_bn": 1,
                    "BLOCK_N": shape.block_n,
                    "BLOCK_K": shape.block_k,
                }
                label = f"{block_m}x{shape.block_n}x{shape.block_k} w{shape.num_warps} s{shape.num_stages}"
                yield compile_kernel(
                    _gathered_product_kernel, architecture, dtype, way, label, constants, shape.num_warps,
                    shape.num_stages,
                )  # fmt: skip
    for architecture in (80, 90):
        for stats in (False, True):
            constants = {"WANT_STATS": stats, "SCREEN": stats, "BLOCK_T": MERGE_ROWS, "BLOCK_S": MERGE_SPLITS}
            label, tile = "stats, screen" if stats else "plain", f"{MERGE_ROWS} rows"
            yield compile_kernel(_merge_splits_kernel, architecture, "fp32", label, tile, constants, 4, 3)
        constants = {"BLOCK_N": COMPACT_BLOCK}
        yield compile_kernel(_compact_kernel, architecture, "fp32", "", f"{COMPACT_BLOCK} flags", constants, 4, 3)


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
