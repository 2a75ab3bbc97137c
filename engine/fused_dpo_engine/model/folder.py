"""The files of a model, looked at before anything reads them as a model.

A model may come from anybody. Its weights must be safetensors, which hold numbers alone (what is pickled may run any
code when it is read), and lie in its own folder; its configuration must be an object whose sizes a machine can build.
"""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from fused_dpo_engine.errors import UserError, first_line, short

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MOST_LAYERS = 10_000
"""What a configuration may count as layers. No model has a tenth of it, and each is built before weights are read."""

Find = Callable[[str], Path | None]
"""Finds a file of a model by its name there."""


def check_weights(name: str, find: Find) -> None:
    """Refuse pickled weights, and an index of weights that are elsewhere.

    Raises:
        UserError: saying how to write the weights as safetensors, or which entry of the index is wrong.
    """
    if find(WHOLE) is not None:
        return
    if (path := find(INDEX)) is not None:
        files = read_object(path).get("weight_map")
        if not isinstance(files, dict) or not all(map(_is_beside, files.values())):
            raise UserError(
                f"{path} must map the names of weights to .safetensors files in its own folder, got {short(files)}."
            )
    elif any(find(file) is not None for file in PICKLED):
        raise UserError(
            f"{name} has pickled weights alone ({PICKLED[0]}), which may run any code when they are read; if you trust "
            f"them, load them with transformers, and save them with save_pretrained, which writes {WHOLE}."
        )


def check_config(find: Find) -> None:
    """Refuse a configuration that is no object, or has more layers than can be.

    Raises:
        UserError: saying so.
    """
    if (path := find("config.json")) is None:
        return
    for key, value in read_object(path).items():
        if "layers" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"{path} says {key} = {short(value)}; at most {MOST_LAYERS} layers are built.")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {short(content)}.")
    return content


def _is_beside(file: Any) -> bool:
    """Tell whether an entry names a file of safetensors in the folder of the index, or below it."""
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        return False
    path = PurePosixPath(file.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]
