"""Real preference data, and a real model where this machine has one."""

import math
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from examples.smollm2 import cache_folder
from tests.engine.support.runs import FIRST_LOSS
from tests.engine.support.toys import PREFERENCES, TOKENIZERS, largest_difference, read_weights, save_folder

SMOLLM2 = cache_folder() / "SmolLM2-135M-Instruct"
FILES = {
    "hh_helpful.conversational.jsonl": "qwen2.5",
    "dpo_en.conversational.jsonl": "qwen2.5",
    "dpo_zh.conversational.jsonl": "qwen2.5",
    "hh_helpful.strings.jsonl": "gpt2",
    "qa_long_prompts.strings.jsonl": "gpt2",
}
"""Preference files, and a tokenizer that suits each."""

needs_preferences = pytest.mark.skipif(not PREFERENCES.is_dir(), reason=f"no preference data in {PREFERENCES}")


def first_rows(name: str, count: int, target: Any) -> Any:
    """A file with the first rows of a preference file."""
    with (PREFERENCES / name).open(encoding="utf-8") as file:
        target.write_text("".join(line for _, line in zip(range(count), file, strict=False)), encoding="utf-8")
    return target


@needs_preferences
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"no {SMOLLM2}: python -m examples.smollm2 makes it")
def test_smollm2_on_real_pairs(train_tiny):
    run = train_tiny(
        model=SMOLLM2,
        data=PREFERENCES / "hh_helpful.conversational.jsonl",
        max_steps=2,
        pairs_per_step=2,
        tokens_per_batch=128,
        max_length=64,  # most pairs do not fit: their prompts lose their beginning, their responses their end
        truncate_prompts=True,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        warmup_ratio=0,
    )
    moved = largest_difference(run.weights(), {n: t.float() for n, t in read_weights(SMOLLM2).items()})
    shutil.rmtree(run.output / "model")  # half a gigabyte
    first, second = run.metrics
    assert first["loss"] == FIRST_LOSS
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == 0
        assert math.isfinite(second[name])
    # A trained model: 1 to 5 nats a token, where chance has log(49152) = 10.8.
    tokens = first["tokens"] / 4
    assert -5 * tokens < first["logps/chosen"] < -0.2
    assert 0.5e-5 < moved < 5e-5


@pytest.fixture(scope="module")
def folder_with(tmp_path_factory):
    """Tiny models for real tokenizers, whose vocabularies are large: one each."""
    made = {}

    def make(name: str):
        if name not in made:
            tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
            made[name] = save_folder(
                tmp_path_factory.mktemp("models") / name,
                tokenizer=tokenizer,
                vocab_size=len(tokenizer),
                max_position_embeddings=512,
                hidden_size=16,
                head_dim=4,
                tie_word_embeddings=True,
            )
        return made[name]

    return make


@needs_preferences
@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason=f"no tokenizers in {TOKENIZERS}")
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_real_data(train_tiny, folder_with, tmp_path, name):
    folder = folder_with(FILES[name])
    run = train_tiny(
        model=folder,
        data=first_rows(name, 12, tmp_path / name),
        pairs_per_step=4,
        tokens_per_batch=1024,
        max_length=256,
        truncate_prompts=True,
    )
    assert run.column("pairs") == [4, 4, 4]
    assert run.metrics[0]["loss"] == FIRST_LOSS
    assert run.metrics[0]["rewards/chosen"] == run.metrics[0]["rewards/rejected"] == 0
    assert all(math.isfinite(value) for line in run.metrics for value in line.values())
    assert max(run.column("tokens")) <= 4 * 2 * 256
    weights = run.weights()
    assert 1e-4 < largest_difference(weights, read_weights(folder)) < 1e-2
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
