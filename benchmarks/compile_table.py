"""Every Triton kernel as the package launches it, compiled ahead of time for sm_80 and sm_90: no GPU needed.

    python -m benchmarks.compile_table [--json]      the table needs the package rich, --json does not

The package's own code runs, forward and backward, on tensors in main memory, up to each launch; Triton compiles what
would be launched there for a GPU that is not there. Prints registers, spilled bytes and shared memory of each kernel,
and exits with 1 if one spills more than its allowance, takes more shared memory than the architecture has, multiplies
half-precision tiles on sm_90 without wgmma, loads single numbers or waits for the matrix units in a loop that
multiplies, or is compiled again for a batch of another size: what Triton knows of a size decides about the order of
sums, so a sequence's log-prob would depend on its batch. Needs the compiler, so TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.measure import console
from fused_dpo.filtering import Filtering
from fused_dpo.gpu.configs import PLAIN, TILE_CONFIGS
from fused_dpo.head import LMHead, VocabShard
from fused_dpo.ops.token_logps import token_logps
from fused_dpo.vocab_parallel import collectives

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Dynamic shared memory a block may have, in bytes (CUDA programming guide, table of compute capabilities)."""
SPILL_ALLOWANCE = 64
"""Bytes of stack a thread: a few registers saved outside the inner loop cost nothing that can be measured."""
HALF = {"bf16", "fp16"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MULTIPLY = (
    *("_logps_forward_kernel", "_dlogits_kernel", "_kept_dlogits_kernel", "_gathered_product_kernel"),
    "_through_adapter_kernel",
)
OF_LOGITS = ("_logps_forward_kernel", "_dlogits_kernel")
TILE = ("BLOCK_T", "BLOCK_M", "BLOCK_V", "BLOCK_N", "BLOCK_D", "BLOCK_K", "SIDE")
ROWS, V, D = 304, 4640, 256
"""Sizes of the calls: multiples of 16, as those of real heads are, beyond a split, a workspace of 1 MiB and a block."""
OTHER_ROWS = (1, 56, 112)
"""Sizes of other batches. Triton compiles apart for 1 and for multiples of 16: here are both, and others, in all rows
and in those that are scored."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

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
    multiplies: bool
    narrow_loads: int
    """Loads of one half-precision number at a time in loops that multiply."""
    waits: int
    """Loops that multiply and wait for the product in every step, of kernels that compute whole tiles of logits; where
    operands are gathered and converted on the way, it cannot be helped."""
    of_batch: bool
    """Whether it was compiled for a batch of another size, where the first had had a kernel of its own."""

    def problems(self) -> list[str]:
        """List what is wrong with it."""
        found = []
        if self.stack > SPILL_ALLOWANCE:
            found.append(f"spills {self.stack} bytes")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"takes {self.shared} bytes of shared memory")
        if self.architecture == 90 and self.dtype in HALF and self.multiplies and not self.wgmma:
            found.append("multiplies without wgmma")
        if self.narrow_loads:
            found.append(f"{self.narrow_loads} loads of 2 bytes in its loop")
        if self.waits:
            found.append("waits for the matrix units in every step")
        if self.of_batch:
            found.append("compiled again for another batch")
        return found


class Target:
    """Stands in for Triton's driver: names a GPU to compile for, and has none."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        """Name the GPU to compile for."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        """Give another number for each architecture: Triton keeps what it has compiled by device."""
        return self.architecture

    def get_current_stream(self, _device: int = 0) -> int:
        """Give a stream, as Triton asks for one; nothing is launched there."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Tell where the tensors are."""
        return torch.device("cpu")


@contextmanager
def launches(architecture: int) -> Iterator[dict[str, tuple[JITFunction[Any], Any]]]:
    """Compile and collect kernels, by hash, instead of launching them, within the block."""
    collected: dict[str, tuple[JITFunction[Any], Any]] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        del warmup
        compiled: Any = run(self, *arguments, grid=grid, warmup=True, **named)
        collected.setdefault(compiled.hash, (self, compiled))
        return compiled

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Target(architecture)))
        capability = lambda _device=None: divmod(architecture, 10)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", capability))
        yield collected


def call(
    dtype: torch.dtype, impl: str, eps: float, *, rows: int = ROWS, all_rows: bool = False, **options: Any
) -> None:
    """Run forward and backward of a small problem; the results are of no kernel, and not looked at."""

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_()

    rank = options.get("rank", 0)
    head = LMHead(
        torch.zeros(V, D).requires_grad_() if options.get("autocast") else leaf(V, D),
        bias=leaf(V) if options.get("bias") else None,
        logit_scale=options.get("logit_scale", 1.0),
        softcap=options.get("softcap"),
        lora=(leaf(rank, D), leaf(V, rank), 2.0) if rank else None,
    )
    target = torch.arange(rows)
    target[3::7] = target[3::7] if all_rows else -1
    offsets = torch.tensor([0, rows // 3, rows])
    filtering = Filtering(eps, 1 / 16)
    asked: dict[str, Any] = {"want_stats": bool(options.get("stats"))}
    asked |= {"reuse_exponentials": bool(options.get("reuse_exponentials"))}
    if options.get("ranks"):  # the first of two, and nobody answers
        asked["shard"] = VocabShard(0, 2 * V, V, "ranks")
    with mock.patch.object(collectives, "dist"), mock.patch.object(collectives, "group_of"):
        logps, *_ = token_logps(leaf(rows, D), target, offsets, None, head, impl, 1, filtering, **asked)
        logps.sum().backward()


EVERYTHING = {"bias": True, "logit_scale": 0.5, "softcap": 30.0, "rank": 16, "stats": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all rows": {"all_rows": True},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 30.0},
    "lora": {"rank": 16},
    "large lora": {"rank": 512},
    "stats": {"stats": True},
    "autocast": {"autocast": True},
    "kept": {"reuse_exponentials": True},
    "kept, bias": {"reuse_exponentials": True, "bias": True},
    "kept, lora": {"reuse_exponentials": True, "rank": 16},
    "kept, autocast": {"reuse_exponentials": True, "autocast": True},
    "ranks": {"ranks": True},
    "ranks, all": {"ranks": True, **EVERYTHING},
    "all": EVERYTHING,
}


def compile_all() -> Iterator[Compiled]:
    """Compile for every architecture, dtype and implementation; a kernel goes under the first options that launch it.

    All options in bf16, those that differ most in the others.
    """
    described = replace(TILE_CONFIGS[90, 2, PLAIN], described=True)
    forms = {"descriptors": described}
    if TRITON < (3, 9):  # which spills 120 to 144 bytes there
        forms["flattened"] = replace(described, flattened=True)
    for architecture, dtype in product((80, 90), DTYPES):
        seen: set[str] = set()
        labels = OPTIONS if dtype == "bf16" else ("plain", "stats", "large lora", "kept", "ranks", "all")
        for impl, eps, label in product(("triton", "library"), (0.0, 2**-12), labels):
            name = (
                ", ".join((impl * (impl != "triton"), "filtered" * bool(eps), label)).strip(", ").replace(", , ", ", ")
            )
            yield from compiled(seen, name, architecture, dtype, impl, eps, **OPTIONS[label])
        if architecture == 90 and dtype in HALF:
            for form, (eps, keep) in product(forms, ((0.0, False), (0.0, True), (2**-12, False))):
                with mock.patch.dict(TILE_CONFIGS, {(90, 2, PLAIN): forms[form]}):
                    name = form + ", filtered" * bool(eps) + ", kept" * keep
                    yield from compiled(seen, name, architecture, dtype, "triton", eps, reuse_exponentials=keep)


def compiled(
    seen: set[str], name: str, architecture: int, dtype: str, impl: str, eps: float, **options: Any
) -> Iterator[Compiled]:
    """Compile what is launched for batches of several sizes, and has not been seen before."""
    with launches(architecture) as collected:
        call(DTYPES[dtype], impl, eps, **options)
        of_first = set(collected)
        for rows in OTHER_ROWS:
            call(DTYPES[dtype], impl, eps, rows=rows, **options)
    for key, (kernel, binary) in collected.items():
        if key in seen:
            continue
        seen.add(key)
        constants = {kernel.arg_names[i]: value for (i, *_), value in binary.src.constants.items()}
        tile = "x".join(str(constants[side]) for side in TILE if side in constants)
        registers, stack = resource_usage(binary.asm["cubin"])
        wgmma = binary.asm["ptx"].count("wgmma.mma_async")
        of_tile = constants.get("OPTIONS")
        multiplies = kernel.__name__ in MULTIPLY and not (of_tile and of_tile.GIVEN)
        label = f"{tile} w{binary.metadata.num_warps} s{binary.metadata.num_stages}"
        measured = registers, stack, binary.metadata.shared, wgmma, multiplies
        # A product with a single column, for the gradient of a bias, has nothing wider to load.
        narrow = 0 if constants.get("N") == 1 else narrow_loads(binary.asm["ptx"])
        waits = waiting_loops(binary.asm["ptx"]) if kernel.__name__ in OF_LOGITS and multiplies else 0
        found = *measured, narrow, waits, key not in of_first
        yield Compiled(kernel.__name__, architecture, dtype, name, label, *found)


def narrow_loads(ptx: str) -> int:
    """Count loads of two bytes in the loops of a kernel that multiply tiles."""
    pattern = r"\bld\.global\S*\.b16\b|\bcp\.async\.c\w\.\S+ .*, 0x2,"
    return sum(len(re.findall(pattern, body)) for body in multiplying_loops(ptx))


def waiting_loops(ptx: str) -> int:
    """Count loops of a kernel that multiply tiles by wgmma and let no product run into the next step."""
    return sum("wgmma.wait_group.sync.aligned 0" in body for body in multiplying_loops(ptx))


def multiplying_loops(ptx: str) -> Iterator[str]:
    """Find the innermost loops that multiply tiles."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\$\w+):", line.strip()))}
    for number, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        body = lines[labels.get(branch[1], number) : number] if branch else []  # empty where it leads ahead
        inner = not any(re.search(r"\bbra\b", one) for one in body)
        if inner and any(re.search(r"\bw?g?mma\.", one) for one in body):
            yield "\n".join(body)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Read registers a thread and bytes of stack, by the cuobjdump inside the triton package."""
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


def main() -> int:
    """Compile, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    as_json = parser.parse_args().json
    rows = list(compile_all())
    if as_json:
        print(json.dumps([asdict(row) | {"problems": row.problems()} for row in rows]))
    else:
        from rich.table import Table  # where rich is absent there is --json

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
