"""Dropout is off while training, and what is saved says what the model's own configuration does."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config, LlamaConfig

from fused_dpo_engine.model.dropout import as_stated, stated_rates, switch_dropout_off
from tests.engine.support.toys import save_folder

RATES = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.1, "attention_dropout": 0.2, "layerdrop": 0.3},
}
OF_SAVING = ("dtype", "transformers_version")
"""What may differ: the weights are saved in float32, by the release at hand."""


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", RATES)
@pytest.mark.parametrize("packing", [True, False])
def test_saved_models_state_their_own_rates(tmp_path, train_tiny, toy_data, family, packing):
    folder = save_folder(tmp_path / family, family, **RATES[family])
    run = train_tiny(model=folder, packing=packing, eval_data=toy_data, eval_steps=1, save_steps=1)
    before = read_config(folder)
    assert {name: before[name] for name in RATES[family]} == RATES[family]
    for name in ("model", "best"):
        after = read_config(run.output / name)
        changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        assert changed <= {*OF_SAVING}


def test_off_and_stated_in_all_parts() -> None:
    """Models of several parts have a configuration for each."""
    own: Any = Gemma3Config(text_config={"attention_dropout": 0.25}, vision_config={"attention_dropout": 0.5})
    live: Any = Gemma3Config(**own.to_dict())
    switch_dropout_off(live)
    assert (live.text_config.attention_dropout, live.vision_config.attention_dropout) == (0.0, 0.0)
    with as_stated(stated_rates(live, own)):
        assert (live.text_config.attention_dropout, live.vision_config.attention_dropout) == (0.25, 0.5)
    assert (live.text_config.attention_dropout, live.vision_config.attention_dropout) == (0.0, 0.0)


def test_off_again_after_a_failure() -> None:
    """A model that could not be saved is trained on without dropout."""
    own, live = LlamaConfig(attention_dropout=0.25), LlamaConfig(attention_dropout=0.0)
    with pytest.raises(OSError, match="full"), as_stated(stated_rates(live, own)):
        raise OSError("full")
    assert live.attention_dropout == 0.0
