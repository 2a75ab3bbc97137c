"""What a run says of memory: before it, and when an allocation fails in a step."""

from typing import Any

import pytest
import torch

from fused_dpo_engine.analysis.memory import GIB
from fused_dpo_engine.cli import parse
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.training import memory
from fused_dpo_engine.training.memory import explain_out_of_memory, memory_warning
from tests.engine.support.published import folder_of
from tests.engine.support.runs import training_forward
from tests.engine.support.toys import options

ON_A_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "999 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def config(tmp_path, toy_data) -> Any:
    folder = folder_of("Llama-3.2-1B", tmp_path)
    return parse("train", options(model=folder, data=toy_data, output=tmp_path / "run", dtype="bfloat16"))


class TestBefore:
    def test_a_line_where_it_does_not_fit(self, config):
        line = memory_warning(config, 24 * GIB)
        assert line is not None
        assert line.startswith("warning: by the estimate a step takes ")
        assert "and the device has 24.0" in line
        assert "--gradient-checkpointing" in line or "--offload" in line
        assert "\n" not in line

    def test_nothing_where_it_does(self, config):
        assert memory_warning(config, 200 * GIB) is None
        assert memory_warning(config, 16 * GIB, strategy="fsdp2", gpus=64) is not None, "activations are not shared"

    def test_a_model_that_cannot_be_rehearsed_is_named(self, config, monkeypatch):
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("looks at values.\nat length")

        monkeypatch.setattr(memory, "estimate_memory", fail)
        line = memory_warning(config, GIB)
        assert line is not None
        assert line.startswith("memory: no estimate for")
        assert line.endswith("looks at values.")


class TestFailedAllocation:
    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("no"), ON_A_CPU])
    def test_says_what_saves_most_first(self, config, error):
        with pytest.raises(UserError) as raised, explain_out_of_memory(config, 8000, cuda=True):
            raise error
        message = str(raised.value)
        assert message.startswith("out of memory in a forward pass of 8000 tokens (--tokens-per-batch 8192): ")
        named = [message.index(option) for option in ("--gradient-checkpointing (", "--optimizer adamw8bit (")]
        assert named == sorted(named), "activations of a 1B model outweigh its optimizer's means"
        assert "--offload (" in message
        assert "--tokens-per-batch 4096 (" in message

    def test_other_errors_pass(self, config):
        with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(config, 1, cuda=True):
            raise RuntimeError("another")

    def test_without_an_estimate_it_names_what_may_help(self, config, monkeypatch):
        monkeypatch.setattr(memory, "shape_of_run", lambda config: 1 / 0)
        expected = pytest.raises(UserError, match="What may help: --gradient-checkpointing")
        with expected, explain_out_of_memory(config, 1, cuda=True):
            raise MemoryError

    def test_in_a_run(self, train_tiny, tmp_path, monkeypatch):
        """In the second step: what the first has made of the weights is saved."""
        calls = []

        def fail(policy: Policy, batch: Any, logps: Any) -> Any:
            calls.append(batch)
            if len(calls) > 3:
                raise MemoryError("none left")
            return logps

        training_forward(monkeypatch, fail)
        with pytest.raises(UserError, match="out of memory in a forward pass of"):
            train_tiny()
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()

    def test_in_an_evaluation(self, train_tiny, monkeypatch):
        def fail(*_: Any) -> None:
            raise MemoryError("none left")

        monkeypatch.setattr("fused_dpo_engine.training.trainer.Trainer._loss_of", fail)
        with pytest.raises(UserError, match=r"out of memory in a forward pass of \d+ tokens"):
            train_tiny(eval_fraction=0.25)
