"""Every Triton kernel compiles ahead of time for the GPUs that are not there, and the judgement of it can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPILER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
"""Environment of a process without the interpreter."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Rows of the ahead-of-time compile table, made in a process without the interpreter."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_table", "--json"],
        capture_output=True, text=True, check=False, env=COMPILER,
    )  # fmt: skip
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_both_architectures(
    compiled: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("kernel", "architecture", "dtype", "options", "tile", "registers", "stack", "shared", "wgmma")
    with capsys.disabled():
        print("\n" + "  ".join(columns))
        for row in compiled:
            print("  ".join(str(row[column]) for column in columns))
    seen = {(row["kernel"], row["architecture"], row["dtype"]) for row in compiled}
    multiplying = ("_logps_forward_kernel", "_dlogits_kernel", "_kept_dlogits_kernel", "_gathered_product_kernel")
    for kernel in multiplying:
        assert {(kernel, arch, dtype) for arch in (80, 90) for dtype in ("bf16", "fp16", "fp32")} <= seen
    assert [row for row in compiled if row["problems"]] == []


def test_the_compile_table_can_fail() -> None:
    """The judgement itself: whatever is wrong with a kernel is called out."""
    code = """if True:
        from benchmarks.compile_table import Compiled, narrow_loads, waiting_loops

        def problems(*found):
            return Compiled('', 90, 'bf16', '', '', 255, *found).problems()

        assert len(problems(1000, 300_000, 0, True, 3, 1, True)) == 6
        assert problems(64, 1000, 4, True, 0, 0, False) == problems(0, 1000, 0, False, 0, 0, False) == []

        load, product = "ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", "wgmma.mma_async.sync.aligned.m64n64k16 x;"
        loop = ["$L__BB0_2:", product, load, load, "@%p1 bra \\t$L__BB0_2;"]
        assert narrow_loads("\\n".join([load, *loop, load])) == 2
        assert narrow_loads("\\n".join([load, *loop[:2], loop[-1]])) == 0
        assert narrow_loads("\\n".join(["$L__BB0_2:", load, "@%p1 bra $L__BB0_2;", product])) == 0

        waiting = [*loop[:2], "wgmma.wait_group.sync.aligned 0;", loop[-1]]
        assert waiting_loops("\\n".join(waiting)) == 1
        assert waiting_loops("\\n".join([*loop, waiting[2]])) == 0
    """
    subprocess.run([sys.executable, "-c", code], check=True, env=COMPILER)


def test_a_kernel_compiled_for_a_batch_is_called_out() -> None:
    """Without their exemptions the kernels are compiled anew for other numbers of rows."""
    code = """if True:
        from benchmarks.compile_table import compiled
        from fused_dpo.gpu.merge import _merge_splits_kernel

        def of_batch():
            return [row for row in compiled(set(), "plain", 80, "fp32", "triton", 0.0) if row.of_batch]

        assert of_batch() == []
        for parameter in _merge_splits_kernel.params:
            parameter.do_not_specialize = False
        _merge_splits_kernel.device_caches.clear()
        again = of_batch()
        assert {row.kernel for row in again} == {"_merge_splits_kernel"}
        assert all(row.problems() == ["compiled again for another batch"] for row in again)
    """
    subprocess.run([sys.executable, "-c", code], check=True, env=COMPILER)


def test_variants_of_a_kernel_have_names_of_their_own(tmp_path: Path) -> None:
    """Profilers tell the hidden states' product from the weight's, and the screening forward from the first split's."""
    code = """if True:
        import torch
        from benchmarks.compile_table import call, launches

        with launches(80) as collected:
            call(torch.float32, "triton", 2**-12)
        names = {binary.metadata.name for _, binary in collected.values()}
        assert {f"_kept_dlogits_kernel_{which}" for which in ("columns", "rows")} <= names, names
        assert {f"_gathered_product_kernel_{which}" for which in ("hidden", "weight")} <= names, names
        assert {"_logps_forward_kernel", "_logps_forward_kernel_screen"} <= names, names
    """
    # What is compiled is kept by the kernel's source, which the name is no part of.
    environment = COMPILER | {"TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
