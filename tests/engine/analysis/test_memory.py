"""The estimate against measured peaks of real steps, published counts and formulas, and what it says of strategies."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from fused_dpo.hardware import has_bf16_units
from fused_dpo_engine.analysis.memory import (
    EIGHT_BITS,
    GIB,
    MemoryEstimate,
    ModelShape,
    estimate_memory,
    held_in_step,
    shape_of,
)
from fused_dpo_engine.analysis.rehearsal import SEGMENT, SHARED, Precision, Scene, rehearse
from fused_dpo_engine.config.options import LoraOptions
from fused_dpo_engine.errors import UserError
from tests.engine.support.published import WEIGHTS, config_of
from tests.engine.support.sharded_memory import LARGE, SIZE
from tests.engine.support.step_memory import measure
from tests.engine.support.toys import save_folder, tiny_config
from tests.fresh_process import ROOT

pytestmark = pytest.mark.cpu_units
MEASURED: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "vocab_size": 4000},
}
FULL = Scene(Precision(), LoraOptions(), False, False, 128, cuda=True, accumulates=True)
BF16_UNITS = has_bf16_units(torch.device("cpu"))


@cache
def shape(name: str, rank: int = 0) -> ModelShape:
    return shape_of(name, config_of(name), LoraOptions(lora_rank=rank))


class TestMeasured:
    """Within 10 % of what torch's allocator hands out in a step of the trainer on this CPU."""

    @pytest.mark.parametrize(
        ("dtype", "family", "settings"),
        [
            ("float32", "llama", {}),
            ("float32", "llama", {"gradient_checkpointing": True}),
            ("float32", "llama", {"lora_rank": 8}),
            ("float32", "llama", {"tokens_per_batch": 1400, "pairs_per_step": 4}),
            ("float32", "llama", {"optimizer": "adamw8bit", "gradient_checkpointing": True}),
            ("float32", "qwen3", {"tied": True}),
            ("bfloat16", "llama", {"tied": True, "gradient_checkpointing": True}),
            ("bfloat16", "llama", {"lora_rank": 8, "gradient_checkpointing": True}),
            ("bfloat16", "qwen3", {}),
        ],
        ids=str,
    )
    def test_step(self, monkeypatch, tmp_path, dtype, family, settings):
        if dtype == "bfloat16" and not BF16_UNITS:
            pytest.skip("this CPU has no bf16 units: products of bf16 matrices would take minutes")
        settings = dict(settings)
        folder = save_folder(tmp_path / "model", family, tie_word_embeddings=settings.pop("tied", False), **MEASURED)
        common = {"pairs_per_step": 2, "tokens_per_batch": 1500}
        peak, estimate = measure(monkeypatch, folder, tmp_path, dtype=dtype, **{**common, **settings})
        assert estimate.peak_bytes == pytest.approx(peak, rel=0.1)

    def test_control_another_step_is_further_off(self, monkeypatch, tmp_path):
        """Neither activations nor Adam's means are within what 10 % forgive."""
        folder = save_folder(tmp_path / "model", "llama", **MEASURED)
        peak, estimate = measure(
            monkeypatch, folder, tmp_path, dtype="float32", pairs_per_step=2, tokens_per_batch=1500
        )
        for part in ("activations", "optimizer"):
            assert estimate.peak_bytes - estimate.parts[part] < 0.9 * peak


@pytest.fixture(scope="module")
def sharded_peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of steps under FSDP2 on two ranks, with checkpoints, by case of `tests.engine.support.sharded_memory`."""
    file = tmp_path_factory.mktemp("sharded") / "found.json"
    command = [sys.executable, "-m", "tests.engine.support.sharded_memory", str(file)]
    roots = os.pathsep.join(str(ROOT / part) for part in ("kernels", "engine", ""))
    environment = {**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8"))


class TestShares:
    def test_measured(self, sharded_peaks):
        """Gathered layers and ends, reduced gradients, and gradients that add up whole.

        The estimate counts as many layers' buffers as there may be at once, and gloo's copy of what it reduces, which
        is not there.
        """
        assert {"reduced", "whole", "tied", "large head"} <= sharded_peaks.keys()
        for name, peak in sharded_peaks.items():
            if name != "large head, in the root":
                assert 0.95 < peak["estimated"] / peak["measured"] < 1.2, name

    def test_ends_are_shares_while_layers_compute(self, sharded_peaks):
        """In the forward pass and in the backward pass; control: in the root unit, tied ones too, they are whole."""
        of_root = ("tied", "large head, in the root")
        for name, peak in sharded_peaks.items():
            assert peak["gathered"] == [["embeddings", "head"] if name in of_root else []] * 2, name

    def test_a_large_head_takes_less_than_in_the_root(self, sharded_peaks):
        """By the weights of the embeddings, while the head's gradient is reduced; and the estimate knows the unit."""
        alone, in_root = (sharded_peaks[name] for name in ("large head", "large head, in the root"))
        assert alone["measured"] < in_root["measured"] - 4 * LARGE * SIZE["hidden_size"]
        assert in_root["measured"] > alone["estimated"] / 0.95


class TestRehearsal:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "qwen3_moe"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_layers_and_tokens_follow_from_two_rehearsals(self, family, checkpointing):
        config = tiny_config(family, num_hidden_layers=7, max_position_embeddings=8192)
        scene = FULL._replace(checkpointing=checkpointing, workspace_mib=1)
        whole = rehearse(config, scene, 4096)
        assert held_in_step(shape_of(family, config), scene, 4096).peak == pytest.approx(whole.peak, rel=0.01)

    def test_one_layer(self):
        config = tiny_config("llama", num_hidden_layers=1)
        assert held_in_step(shape_of("one", config), FULL, 2048).peak > 0

    def test_layers_that_differ_are_all_rehearsed(self):
        config = tiny_config("deepseek_v3", num_hidden_layers=5, first_k_dense_replace=3)
        assert not shape_of("deepseek", config).uniform

    def test_gpt_layer_of_korthikanti(self):
        """Their equation 2, `s b h (34 + 5 a s / h)`: of its 34 bytes two are masks of dropout, which is off here; the
        second term is what attention does not save since FlashAttention. Instead it has the keys and values that it
        gathers for shared prefixes, beside the fused projection that they come from: 2 bytes each, an eighth twice.
        """
        hidden, tokens = 1024, 4096
        config = AutoConfig.for_model(
            "gpt2", n_embd=hidden, n_head=16, n_layer=3, n_positions=tokens, vocab_size=64, activation_function="gelu"
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        scene = FULL._replace(precision=Precision(half=False, half_layers=True, half_rest=True))
        two, three = (rehearse(config, scene, tokens, layers).saved for layers in (2, 3))
        gathered = 2 * 2 * (1 + SHARED / SEGMENT / 2)
        assert three - two == pytest.approx((32 + gathered) * tokens * hidden, rel=0.01)


class TestPublished:
    @pytest.mark.parametrize("name", WEIGHTS)
    def test_weights(self, name):
        assert shape(name).parameters == shape(name).trained == WEIGHTS[name]

    def test_sixteen_bytes_a_weight(self):
        """Rajbhandari et al., 2020, ZeRO, arXiv 1910.02054: 2 + 2 + 12 bytes with Adam, here 4 + 4 + 8."""
        parts = estimate_memory(shape("Llama-3.1-8B")).parts
        resident = parts["weights"] + parts["gradients"] + parts["optimizer"]
        assert resident == 16 * WEIGHTS["Llama-3.1-8B"]

    def test_adapters(self):
        """Rank 16 on all linear layers of 8B: 41,943,040 weights, by (4096 + out) * 16 and so on a layer."""
        of_layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
        adapted = shape("Llama-3.1-8B", rank=16)
        assert adapted.trained == 32 * of_layer == 41_943_040
        assert adapted.frozen == WEIGHTS["Llama-3.1-8B"]

    @pytest.mark.parametrize(
        ("settings", "fits"),
        [
            ({}, False),
            ({"gradient_checkpointing": True}, False),
            ({"gradient_checkpointing": True, "optimizer": "adamw8bit", "offload_activations": True}, False),
            ({"gradient_checkpointing": True, "strategy": "fsdp2", "offload": True}, True),
            ({"gradient_checkpointing": True, "strategy": "fsdp2", "gpus": 8}, True),
        ],
        ids=str,
    )
    def test_full_training_of_8b_on_80_gib(self, settings, fits):
        assert estimate_memory(shape("Llama-3.1-8B"), **settings).fits(80 * GIB) == fits


def parts_of(**settings: Any) -> MemoryEstimate:
    return estimate_memory(shape("Llama-3.2-1B"), gradient_checkpointing=True, **settings)


class TestStrategies:
    def test_shares(self):
        whole, shared = parts_of(), parts_of(strategy="fsdp2", gpus=8)
        for part in ("weights", "gradients", "optimizer"):
            assert shared.parts[part] == whole.parts[part] // 8
        assert "gathered weights" in shared.parts
        assert "gathered weights" not in whole.parts

    def test_gradients_that_add_up_whole(self):
        """4 bytes a weight on every rank, however many share it; in one pass nothing adds up."""
        each = parts_of(strategy="fsdp2", gpus=8)
        last = parts_of(strategy="fsdp2", gpus=8, reduces_every_pass=False)
        assert last.parts["gradients"] == 4 * WEIGHTS["Llama-3.2-1B"] == 8 * each.parts["gradients"]
        assert parts_of(strategy="fsdp2", gpus=8, reduces_every_pass=False, accumulates=False) == each

    def test_offload_moves_to_the_host(self):
        shared, away = parts_of(strategy="fsdp2", gpus=2), parts_of(strategy="fsdp2", gpus=2, offload=True)
        for part in ("weights", "gradients", "optimizer"):
            assert part not in away.parts
            assert away.host[part] == shared.parts[part]

    def test_8_bits(self):
        whole, coarse = parts_of(), parts_of(optimizer="adamw8bit")
        small = shape("Llama-3.2-1B").small
        assert coarse.parts["optimizer"] == EIGHT_BITS * (WEIGHTS["Llama-3.2-1B"] - small) + 8 * small
        assert whole.peak_bytes - coarse.peak_bytes == whole.parts["optimizer"] - coarse.parts["optimizer"]

    def test_offloaded_activations_are_a_row_a_layer(self):
        """In fp32: a layer's input. Beyond the layers what the last norm saves."""
        row = 4 * 8192 * 2048
        host = parts_of(offload_activations=True).host["activations"]
        assert 16 * row <= host <= 19 * row
        assert parts_of().parts["activations"] - parts_of(offload_activations=True).parts["activations"] >= 16 * row

    def test_reference(self):
        assert parts_of(pairs=1000).host == {"reference": 8000}

    def test_tensor_parallel_splits_heads_width_and_vocabulary(self):
        config = config_of("Llama-3.2-1B")
        whole, half = shape("Llama-3.2-1B"), shape_of("1B", config, tensor_parallel=2)
        norms = (2 * 16 + 1) * 2048
        assert 2 * (half.parameters - norms) == whole.parameters - norms
        with pytest.raises(UserError, match="num_attention_heads 32 does not split into --tensor-parallel 3"):
            shape_of("1B", config, tensor_parallel=3)
