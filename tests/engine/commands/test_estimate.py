"""`fused-dpo estimate`: its table, its JSON, what it advises, and inputs that cannot be."""

import json
import re
from pathlib import Path

import pytest

from tests.engine.support.published import WEIGHTS, folder_of


@pytest.fixture(scope="module")
def one_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights or tokenizer."""
    return folder_of("Llama-3.2-1B", tmp_path_factory.mktemp("published"))


def test_table(command, one_b):
    outcome = command("estimate", "--model", str(one_b), "--gpu-memory", "24")
    assert outcome.status == 0
    assert f"{WEIGHTS['Llama-3.2-1B']:,} weights; 1 GPU of 24 GiB" in outcome.out
    assert "these settings" in outcome.out
    assert "--gradient-checkpointing --offload" in outcome.out
    assert re.search(r"It does not fit\. Change, in this order: --", outcome.out)


def test_json_agrees_with_itself(command, one_b):
    outcome = command(
        "estimate", "--model", str(one_b), "--gpus", "2", "--strategy", "fsdp2", "--json", "--pairs", "10"
    )
    report = json.loads(outcome.out)
    assert outcome.status == 0
    assert report["parameters"] == report["trained"] == WEIGHTS["Llama-3.2-1B"]
    assert report["ways"][0]["parts"]["weights"] == 4 * WEIGHTS["Llama-3.2-1B"] // 2
    assert report["ways"][0]["host"]["reference"] == 80
    for way in report["ways"]:
        assert way["peak_bytes"] == sum(way["parts"].values())
    assert report["ways"][0]["fits"] is report["advice"].startswith("It fits")


def test_adapters(command, one_b):
    outcome = command("estimate", "--model", str(one_b), "--lora-rank", "8", "--json", "--gradient-checkpointing")
    report = json.loads(outcome.out)
    assert report["trained"] == report["parameters"] - WEIGHTS["Llama-3.2-1B"]
    assert report["advice"].startswith("It fits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "0"), "gpus must be at least 1, got 0"),
        (("--gpu-memory", "0"), "gpu-memory must be positive and finite"),
        (("--gpus", "3", "--tensor-parallel", "2"), "tensor-parallel 2 does not divide gpus 3"),
        (("--gpus", "3", "--tensor-parallel", "3"), "does not split into --tensor-parallel 3"),
        (("--offload", "--strategy", "ddp"), "offload is FSDP2's"),
        (("--tokens-per-batch", "1"), "tokens-per-batch must be at least 4"),
        (("--lora-rank", "4", "--lora-target-modules", "nowhere"), "--lora-target-modules nowhere"),
    ],
)
def test_wrong_input(command, one_b, options, message):
    outcome = command("estimate", "--model", str(one_b), *options)
    assert outcome.status == 2
    assert message in outcome.err


def test_no_such_model(command, tmp_path):
    outcome = command("estimate", "--model", str(tmp_path / "nothing"))
    assert outcome.status == 2
    assert "does not exist" in outcome.err
