"""Models split over two ranks by transformers' plan, against one process, and what is not split."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.tensor_parallel import check_plan, check_tensor_parallel
from tests.engine.support.tensor_parallel_ranks import CASES, EXPERTS_REFUSED
from tests.engine.support.toys import tiny_config, tiny_model
from tests.fresh_process import run_ranks

IN_FLOAT32 = ("deepseek_v3", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compare every case with one process on two ranks, and read the differences that each rank has found."""
    file = tmp_path_factory.mktemp("split") / "found"
    finished = run_ranks(2, "tests.engine.support.tensor_parallel_ranks", file)
    assert finished.returncode == 0, finished.stderr[-8000:]
    return [torch.load(f"{file}.{rank}") for rank in range(2)]


def found_of(ranks: list[dict[str, Any]], rank: int, name: str) -> dict[str, Any]:
    found = ranks[rank][name]
    if found["refused"]:
        known = "torch 2.13 can" if name in IN_FLOAT32 and EXPERTS_REFUSED else r"(263) must be divisible"
        assert known in found["refused"]
        pytest.skip(found["refused"])
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_one_process(ranks: list[dict[str, Any]], name: str, rank: int) -> None:
    """Sums over heads and columns are taken in another order; norms inside the models go through fp32."""
    found, rounding = found_of(ranks, rank, name), 2e-6 if name in IN_FLOAT32 else 1e-12
    for quantity in ("hidden", "gradients", "checkpointed", "logps", "scored", "norm", "stepped"):
        assert found[quantity] < rounding, quantity
    assert found["same_without_gradients"], "policy and reference are one function"
    assert found["ranks_equal"]


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_read_by_rows(ranks: list[dict[str, Any]], name: str) -> None:
    """As `torch.chunk` splits them, an odd vocabulary too."""
    found = found_of(ranks, 0, name)
    assert found["rows"] == ([132, 131] if "263" in name else [132, 132])
    assert found["head"]
    assert found["head_gradient"]


@pytest.mark.parametrize("name", CASES)
def test_it_is_saved_as_one_process_saves_it(ranks: list[dict[str, Any]], name: str) -> None:
    assert all(found_of(ranks, rank, name)["saved"] for rank in range(2))


def test_one_that_is_loaded(ranks: list[dict[str, Any]]) -> None:
    assert max(rank["loaded"] for rank in ranks) < 2e-6  # fp32


def test_control_the_norms_of_single_heads_as_transformers_sums_them(ranks: list[dict[str, Any]]) -> None:
    """What has been accumulated is summed again with each micro-batch, so that gradients and their norm are wrong."""
    found = ranks[0]["control"]
    assert found["gradients"] > 0.1
    assert found["norm"] > 1e-3
    assert found["stepped"] > 1e-4
    assert found["ranks_equal"], "comparing the ranks does not show it"


@pytest.mark.parametrize(
    ("family", "changes", "ranks", "reason"),
    [
        ("opt", {}, 2, "transformers has no plan for its layers"),
        ("llama", {}, 4, "its 2 key-value heads do not divide by them"),
        ("llama", {}, 8, "its 4 attention heads do not divide by them"),
        ("llama", {"intermediate_size": 50}, 4, "has 50 of what is split"),
        ("gpt_oss", {}, 2, "transformers has no plan for its layers"),
    ],
)
def test_what_cannot_be_split(family: str, changes: dict[str, Any], ranks: int, reason: str) -> None:
    if "intermediate_size" in changes:
        changes = {**changes, "num_key_value_heads": 4}
    model = tiny_model(family, dtype=torch.float32, **changes)
    name = type(model).__name__
    with pytest.raises(UserError, match=rf"{name} cannot be split over {ranks} ranks: .*{reason}.*FSDP2"):
        check_plan(model, ranks)


def test_a_step_that_nobody_has_compared() -> None:
    model = tiny_model("llama")
    model.tp_plan = {**model.tp_plan, "model.norm": "sequence_parallel"}
    with pytest.raises(UserError, match=r"steps that were not compared with one process \(sequence_parallel\)"):
        check_plan(model, 2)


def test_a_parameter_that_is_tied_outside_of_the_plan() -> None:
    model = tiny_model("llama")
    check_plan(model, 2)
    model.model.norm.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(UserError, match="is tied to one that it does not"):
        check_plan(model, 2)


@pytest.mark.parametrize(
    ("options", "lora", "changes", "reason"),
    [
        ({}, {"lora_rank": 4}, {}, "adapters are not split"),
        ({"load_in_4bit": True}, {}, {}, "quantised weights are not split"),
        ({}, {}, {"quantization_config": {"quant_method": "fp8"}}, "quantised weights are not split"),
        ({}, {}, {"auto_map": {"AutoModelForCausalLM": "modeling.Ours"}}, "it comes with code of its own"),
        ({}, {}, {"num_key_value_heads": 1}, "its 1 key-value heads do not divide"),
    ],
)
def test_what_the_configuration_tells(
    tmp_path: Path, options: dict[str, Any], lora: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    """Before any weights are there."""
    tiny_config("llama").save_pretrained(tmp_path)
    check_tensor_parallel(ModelOptions(model=str(tmp_path)), LoraOptions(), 2)
    tiny_config("llama", **changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        check_tensor_parallel(ModelOptions(model=str(tmp_path), **options), LoraOptions(**lora), 2)
