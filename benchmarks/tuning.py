"""Variants of the kernels on the main case of the head, each with the time predicted before any was measured.

    python -m benchmarks.tuning --out FILE [--minutes 8.5] [--hidden FILE] [--only TEXT]

The shipped kernels first, then the variants, the largest predicted gain first. A variant is a change of the reviewed
tables; it is checked against float64 like everything that is timed, and one that fails or does not fit says why, as
does one that changes tiles for compute capability 9.0 on an older device, which takes others. FILE is a results file
for `benchmarks.report` and `benchmarks.compare`, written as rows come.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.arguments import hidden_file, out_file, positive
from benchmarks.heads import run as head
from benchmarks.heads.cases import FORWARD, TRAIN, Case, head_cases
from benchmarks.measure import median_seconds, quantiles, seconds_of
from benchmarks.reporting import records
from fused_dpo.gpu import configs
from fused_dpo.gpu import forward as triton_forward
from fused_dpo.gpu.configs import PLAIN, RICH, ProductConfig, TileConfig

Change = tuple[Any, Any, Any]
"""A dict and key, or a module and name, and the value that it gets."""
SHIPPED = "as shipped"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURE = 90
"""Whose tiles the variants change; newer devices take them too."""


@dataclass(frozen=True)
class Variant:
    """A change, and the time it should take on an H200, for bf16, N = 8192, D = 4096, V = 151936."""

    implementation: str
    phase: str
    name: str
    predicted_ms: float
    why: str = ""
    changes: tuple[Change, ...] = ()

    @property
    def id(self) -> str:
        """The id of its row."""
        return f"tuning/{self.phase}/{self.implementation}/{self.name}"


def tile(*shape: int, warps: int = 8, stages: int = 3, epilogue: int = PLAIN, **flags: bool) -> Change:
    """Change the tile of the kernels that multiply."""
    return (
        configs.TILE_CONFIGS,
        (ARCHITECTURE, 2, epilogue),
        TileConfig(*shape, num_warps=warps, num_stages=stages, **flags),
    )


def gathered(*shape: int, warps: int = 8, stages: int = 3) -> Change:
    """Change the tile of the products with gathered rows."""
    return configs.PRODUCT_CONFIGS, (ARCHITECTURE, 2), ProductConfig(*shape, num_warps=warps, num_stages=stages)


def library(**changes: Any) -> Change:
    """Change the shape of the library's products."""
    return configs.LIBRARY_CONFIGS, 2, replace(configs.LIBRARY_CONFIGS[2], **changes)


def group_mib(size: int) -> Change:
    """Change how much of the hidden states is at work at a time."""
    return configs, "GROUP_MIB", size


def variants(implementation: str, phase: str, *of_it: tuple[Any, ...]) -> tuple[Variant, ...]:
    """List variants of one computation: name, predicted milliseconds, why, and changes."""
    return tuple(Variant(implementation, phase, *known, changes=tuple(changes)) for *known, changes in of_it)


EXACT, FILTERED = "fused exact", "fused filtered"
ASYNC = {"described": True, "flattened": True}
# One pass is 10.2 TFLOP: 12.9 ms at the 790 TFLOP/s of a large product of the library. A 128x256 tile is 65,500 cycles
# of the matrix units; instructions of the epilogue are counted in the compiler's output.
VARIANTS = (
    *variants(
        EXACT, FORWARD,
        (SHIPPED, 15.5, "660 TFLOP/s; the epilogue takes 2,400 cycles a tile, filling the pipeline 1,500", []),
        ("descriptors, flattened", 14.2, "no barrier of memory a step, loads go on during the epilogue",
         [tile(128, 256, 64, **ASYNC)]),
        ("descriptors", 14.6, "half as many instructions a step, none of them a barrier of memory",
         [tile(128, 256, 64, described=True)]),
        ("flattened", 15.2, "loads go on during the epilogue", [tile(128, 256, 64, flattened=True)]),
        ("descriptors, flattened, 4 stages", 14.1, "192 KiB of shared memory, one more load in flight",
         [tile(128, 256, 64, stages=4, **ASYNC)]),
        ("4 stages", 15.3, "192 KiB of shared memory, one more load in flight", [tile(128, 256, 64, stages=4)]),
        ("128x256x32, 4 stages", 16.5, "two barriers where one would do", [tile(128, 256, 32, stages=4)]),
        ("256x128x64", 15.7, "the same traffic, twice the statistics of rows", [tile(256, 128, 64)]),
        ("128x128x64, 4 warps", 20.0, "two programs overlap, but a third more from L2: 154 GB at 7 TB/s",
         [tile(128, 128, 64, warps=4)]),
        ("no groups of row blocks", 16.0, "hidden states stream from memory: 19 GB instead of 5", [group_mib(10**6)]),
        ("groups of 32 MiB", 15.5, "3.8 GB from memory, if half of the L2 cache holds them", [group_mib(32)]),
        ("splits of 8192", 15.5, "half the partial results", [(triton_forward, "SPLIT_COLUMNS", 8192)]),
    ),
    *variants(
        f"{EXACT}, library", FORWARD,
        (SHIPPED, 15.0, "13.3 ms of products, 1.2 ms to read 5 GB, 0.5 ms of gaps", []),
        ("2048 x 8192", 14.8, "half the gaps; 64 MiB do not stay in the L2 cache", [library(chunk_rows=2048)]),
        ("1024 x 4096", 15.5, "one wave of tiles a product, twice the gaps", [library(slice_columns=4096)]),
        ("512 x 16384", 15.2, "the weight streams from memory sixteen times: 20 GB",
         [library(chunk_rows=512, slice_columns=16384)]),
    ),
    *variants(
        FILTERED, FORWARD,
        (SHIPPED, 16.9, "7,000 cycles of epilogue a tile, the first split twice", []),
        ("descriptors, flattened", 15.5, "as for the exact forward", [tile(128, 256, 64, **ASYNC)]),
        ("2 hot splits", 17.3, "a closer bound keeps 1 % fewer columns; another split twice",
         [(triton_forward, "HOT_SPLITS", 2)]),
    ),
    *variants(
        f"{FILTERED}, library", FORWARD,
        (SHIPPED, 15.9, "the same products, 2.1 ms of reading and judging", []),
        ("splits of 256", 16.1, "fewer programs, fewer partial results", [library(split_columns=256)]),
    ),
    *variants(
        EXACT, TRAIN,
        (SHIPPED, 57.5, "forward 15.5, dz 16, dH 13.2, dW 12.9", []),
        ("descriptors, flattened", 55.0, "forward 14.2, dz 14.8", [tile(128, 256, 64, **ASYNC)]),
        ("no groups of row blocks", 58.5, "as in the forward, twice", [group_mib(10**6)]),
    ),
    *variants(
        f"{EXACT}, kept", TRAIN,
        (SHIPPED, 50.9, "forward 16.1, as 4,000 cycles of epilogue; dz 8.7, half of it a read; dH 13.2, dW 12.9", []),
        ("descriptors, flattened", 49.0, "forward 14.8, dz 8.1", [tile(128, 256, 64, **ASYNC)]),
    ),
    *variants(f"{EXACT}, library", TRAIN, (SHIPPED, 56.0, "forward 15.0, dz 15, dH 13.2, dW 12.9", [])),
    *variants(
        FILTERED, TRAIN,
        (SHIPPED, 22.5, "forward 16.9, backward 5.6", []),
        ("descriptors, flattened", 21.1, "forward 15.5", [tile(128, 256, 64, **ASYNC)]),
        ("products 128x64, 4 stages", 22.4, "one more load in flight", [gathered(128, 64, stages=4)]),
        ("products 128x128", 22.5, "half as many steps, more of them half empty", [gathered(128, 128, stages=2)]),
        ("lists of 128 columns", 22.8, "half as many lists, of half as many rows more",
         [(configs, "NARROW_COLUMNS", 128)]),
        ("dz of 128x64", 22.8, "two programs for one, in smaller products", [tile(128, 64, 64, epilogue=RICH)]),
    ),
    *variants(f"{FILTERED}, library", TRAIN, (SHIPPED, 21.5, "forward 15.9, backward 5.6", [])),
)  # fmt: skip


def in_order(some: Sequence[Variant]) -> list[Variant]:
    """Sort variants: what is shipped, then the rest by what it should gain over it."""
    shipped = {(v.implementation, v.phase): v.predicted_ms for v in some if v.name == SHIPPED}

    def gain(variant: Variant) -> float:
        return variant.predicted_ms / shipped.get((variant.implementation, variant.phase), variant.predicted_ms)

    return sorted(some, key=lambda v: (v.name != SHIPPED, gain(v)))


def applied(changes: Sequence[Change]) -> ExitStack:
    """Make the changes within the block."""
    stack = ExitStack()
    for where, key, value in changes:
        change = (
            mock.patch.dict(where, {key: value}) if isinstance(where, dict) else mock.patch.object(where, key, value)
        )
        stack.enter_context(change)
    return stack


def without_effect(changes: Sequence[Change]) -> str | None:
    """Say why the changes would measure on this device what is shipped, if so."""
    if not torch.cuda.is_available() or not any(isinstance(key, tuple) for _, key, _ in changes):
        return None
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor >= ARCHITECTURE:
        return None
    return f"changes tiles for compute capability 9.0, and this device, of {major}.{minor}, takes others"


def tuned(some: Sequence[Variant], case: Case, hidden_file: Path | None) -> Iterator[dict[str, Any]]:
    """Make a row a variant: checked, measured, timed; one that fails says why."""
    loaded = head.load(case, hidden_file, DEVICE)
    for variant in in_order(some):
        name, phase = variant.implementation, variant.phase
        row: dict[str, Any] = {"id": variant.id, "suite": "tuning", "variant": variant.name, "why": variant.why}
        row |= head.describe_row(name, case, phase, loaded) | {"predicted_s": variant.predicted_ms / 1e3}
        if reason := without_effect(variant.changes):
            yield row | {"failed": reason}
            continue
        try:
            with applied(variant.changes):
                run = head.checked(row, name, case, phase, hidden_file, DEVICE)
                row |= quantiles(seconds_of(run))
            bare = median_seconds(head.bare_matmuls(case, phase, loaded.problem))
            row |= head.rates(case, phase, row["median_s"], bare)
        except head.NoTimeError as reason:
            row["failed"] = str(reason)
        yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="results file to write")
    parser.add_argument(
        "--minutes", type=positive, default=8.5, help="begin nothing after so many minutes (default: 8.5)"
    )
    hidden_help = "file of real hidden states; needs safetensors (default: the shared one, else synthetic)"
    parser.add_argument("--hidden", type=hidden_file, help=hidden_help)
    parser.add_argument("--only", default="", help="variants whose id contains this text (default: all)")
    options = parser.parse_args(arguments)
    wanted = [variant for variant in VARIANTS if options.only in variant.id]
    if not wanted:
        parser.error(f"no variant contains {options.only!r}; there are\n" + "\n".join(v.id for v in VARIANTS))
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    deadline = time.perf_counter() + 60 * options.minutes
    rows = []
    for row in tuned(wanted, head_cases(gpu=True)[0][0], options.hidden):
        rows.append(row)
        print(f"{records.summary(row)} (predicted {1e3 * row['predicted_s']:.1f} ms)", flush=True)
        records.write(options.out, rows)
        if time.perf_counter() > deadline:
            print(f"{len(wanted) - len(rows)} of {len(wanted)} variants left: no time", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
