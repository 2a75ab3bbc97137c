"""Configurations of released models, and the weights that their authors count."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"head_dim": 64, "tie_word_embeddings": True},
    },
    "Llama-3.1-8B": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        "tie_word_embeddings": False,
    },
    "Llama-3.1-70B": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        "tie_word_embeddings": False,
    },
}
WEIGHTS = {"Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496}


def config_of(name: str) -> Any:
    return AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **_LLAMA_3, **CONFIGS[name])


def folder_of(name: str, folder: Path) -> Path:
    """A folder with the configuration alone."""
    config_of(name).save_pretrained(folder / name)
    return folder / name
