"""Tile shapes: the reviewed table, and the timing that takes its place where it is asked for."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from fused_dpo import LMHead
from fused_dpo.gpu import autotune as triton_autotune
from fused_dpo.gpu.configs import (
    INTERPRETER_CONFIG,
    PLAIN,
    RICH,
    RICHEST,
    TILE_CONFIGS,
    TileConfig,
    library_config,
    product_config,
    tile_config,
)
from tests.kernels.support.gpu import DEVICE


def test_configurations_never_depend_on_the_batch() -> None:
    """Architecture, dtype and epilogue alone; every architecture from Ampere on has one, with one block of rows."""
    assert tile_config(86, torch.bfloat16, PLAIN) == tile_config(80, torch.bfloat16, PLAIN)
    assert tile_config(100, torch.float32, RICH) == tile_config(90, torch.float32, RICH)
    for architecture in (0, 80, 90):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tiles = [tile_config(architecture, dtype, epilogue) for epilogue in (PLAIN, RICH, RICHEST)]
            assert len({tile.block_t for tile in tiles}) == 1, "the backward reads the screen of any forward"
            step = product_config(architecture, dtype).block_k
            assert all(tile.block_v % step == 0 for tile in tiles), "products step through whole tiles of dz"
            library = library_config(architecture, dtype)
            assert library.tile.block_t == tiles[0].block_t
            assert library.slice_columns % library.split_columns == library.split_columns % library.tile.block_v == 0
            assert library.chunk_rows % library.tile.block_t == library.chunk_rows % library.dz_tile.block_t == 0


class TestAutotune:
    """Off by default; where it is on, the fastest candidate that runs wins, once per head shape."""

    @pytest.fixture
    def times(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
        """Milliseconds that each call of the timer answers, by its number; a missing one does not fit the device."""
        answers: dict[int, float] = {}
        calls = itertools.count()

        def do_bench(function: Any, **_: Any) -> float:
            function()  # every candidate really runs
            call = next(calls)
            if call not in answers:
                raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
            return answers[call]

        monkeypatch.setattr(triton.testing, "do_bench", do_bench)
        monkeypatch.setattr(triton_autotune, "TUNING_ROWS", 8)
        monkeypatch.setattr(triton_autotune, "_tuned", {})
        return answers

    def choose(self, architecture: int = 90) -> TileConfig:
        head = LMHead(torch.randn(40, 9, device=DEVICE))
        with mock.patch.object(triton_autotune, "architecture", return_value=architecture):
            return triton_autotune.choose_config(torch.randn(3, 9, device=DEVICE), head, want_stats=False)

    def test_off(self, times: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FUSED_DPO_AUTOTUNE", raising=False)
        assert self.choose() == TILE_CONFIGS[90, 4, PLAIN]
        monkeypatch.setenv("FUSED_DPO_AUTOTUNE", "1")
        assert self.choose(architecture=0) == INTERPRETER_CONFIG

    def test_on(self, times: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FUSED_DPO_AUTOTUNE", "1")
        times.update({0: 3.0, 2: 2.0})  # the second does not fit
        fastest = triton_autotune.CANDIDATES[4][2]
        assert self.choose() == fastest
        times.clear()
        assert self.choose() == fastest, "it is timed once"

    @pytest.mark.parametrize(
        "error", [triton.runtime.errors.PTXASError("too many registers"), RuntimeError("PassManager::run failed")]
    )
    def test_a_shape_that_the_compiler_fails_on(
        self, times: dict[int, float], monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        monkeypatch.setenv("FUSED_DPO_AUTOTUNE", "1")
        times.update({1: 3.0, 2: 2.0})
        bench: Any = triton.testing.do_bench

        def do_bench(function: Any, **named: Any) -> float:
            try:
                return bench(function, **named)
            except triton.runtime.errors.OutOfResources:
                raise error from None

        monkeypatch.setattr(triton.testing, "do_bench", do_bench)
        assert self.choose() == triton_autotune.CANDIDATES[4][2]

    def test_other_errors_are_raised(self, times: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FUSED_DPO_AUTOTUNE", "1")

        def do_bench(*_: Any, **__: Any) -> float:
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(triton.testing, "do_bench", do_bench)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            self.choose()

    def test_random_numbers_of_the_caller_stay(self, times: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FUSED_DPO_AUTOTUNE", "1")
        times.update({0: 1.0})
        hidden, head = torch.randn(3, 9, device=DEVICE), LMHead(torch.randn(40, 9, device=DEVICE))
        generator = torch.cuda.default_generators[hidden.get_device()] if hidden.is_cuda else torch.default_generator
        before = generator.get_state()
        with mock.patch.object(triton_autotune, "architecture", return_value=90):
            triton_autotune.choose_config(hidden, head, want_stats=False)
        assert torch.equal(generator.get_state(), before)

    def test_nothing_fits(self, times: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FUSED_DPO_AUTOTUNE", "1")
        with pytest.raises(RuntimeError, match="unset FUSED_DPO_AUTOTUNE"):
            self.choose()
