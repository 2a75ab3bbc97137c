"""What a model's name stands for, in one short text: weights, configuration and adapters, wherever they lie."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.model.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS, find_file, find_source

CHUNK = 2**24
"""Bytes read at a time."""
OF_CONFIG = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""What saving a model again changes in its configuration, and no log-prob with it: weights are cast to what a run
computes in."""
OF_ADAPTERS = frozenset(
    {"base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version", "lora_dropout"}
)
"""The same of the configuration of adapters, whose dropout is off."""


def fingerprint(name: str, *, trust_remote_code: bool = False) -> str:
    """Digest what a model's name stands for, into 32 hexadecimal digits.

    Covers every byte of its safetensors weights, its configuration, the weights and the configuration of its adapters,
    and the code that comes with it where that is run. A model that was moved, copied or saved again by another release
    has the same fingerprint; one changed bit of a weight gives another one. So does another split of the same weights
    into files, as it is files that are read.

    Args:
        name: folder or Hugging Face name of a model, or of adapters that name their base.
        trust_remote_code: code that comes with the model is run, so that it counts.

    Raises:
        UserError: there is no such model, it has no safetensors weights, or a file cannot be read.

    Numerics: xxHash's 128 bits tell models apart that nobody has forged; it is no signature.
    """
    source = find_source(name)
    config = _config_of(source.base, "config.json", OF_CONFIG)
    parts = {"config": config, "weights": _digests(weight_files(source.base))}
    if source.adapters is not None:
        parts["adapters"] = [
            _config_of(source.adapters, ADAPTER_CONFIG, OF_ADAPTERS),
            _digests({ADAPTER_WEIGHTS: _found(source.adapters, ADAPTER_WEIGHTS)}),
        ]
    if trust_remote_code and config.get("auto_map"):
        parts["code"] = _code_of(source.base, config["auto_map"])
    return xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weight_files(name: str) -> dict[str, Path]:
    """Find the files of a model's weights, by their names in its folder.

    Raises:
        UserError: it has none in safetensors format, or lacks one that its index names.
    """
    named = _json_of(_found(name, "config.json")).get("transformers_weights")  # in the place of the usual names
    file = named if isinstance(named, str) else next((file for file in WEIGHTS if find_file(name, file)), None)
    if file is None:
        raise UserError(
            f"{name} has neither {' nor '.join(WEIGHTS)}; save its weights in safetensors format (save_pretrained "
            f"does)."
        )
    path = _found(name, file)
    if not file.endswith(".index.json"):
        return {file: path}
    shards = _json_of(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path} names no files of weights (weight_map); fetch or save the model again.")
    return {shard: _found(name, shard) for shard in sorted({str(shard) for shard in shards.values()})}


def _found(name: str, file: str) -> Path:
    path = find_file(name, file)
    if path is None:
        raise UserError(f"{name} lacks {file}; fetch or save the model again.")
    return path


def _config_of(name: str, file: str, left_out: frozenset[str]) -> dict[str, Any]:
    return _normalised(_json_of(_found(name, file)), left_out)


def _normalised(value: Any, left_out: frozenset[str]) -> Any:
    """Leave keys out, at every depth, and sort lists of texts that are sets (adapters' modules)."""
    if isinstance(value, dict):
        return {key: _normalised(item, left_out) for key, item in value.items() if key not in left_out}
    if isinstance(value, list):
        items = [_normalised(item, left_out) for item in value]
        return sorted(items) if left_out is OF_ADAPTERS and all(isinstance(item, str) for item in items) else items
    return value


def _code_of(name: str, auto_map: Any) -> list[Any]:
    """Digest the Python files of a folder; a name on the Hub is pinned by its commit, as is code of other names."""
    others = {item.partition("--")[0] for item in _texts(auto_map) if "--" in item}
    commits = [[other, _found(other, "config.json").parent.name] for other in sorted(others)]
    if not Path(name).is_dir():
        return [*commits, _found(name, "config.json").parent.name]
    return [*commits, _digests({path.name: path for path in Path(name).glob("*.py")})]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


def _digests(files: dict[str, Path]) -> dict[str, str]:
    """Digest files side by side: reading and hashing let other threads run."""
    with ThreadPoolExecutor(max_workers=min(8, len(files) or 1)) as pool:
        return dict(zip(files, pool.map(_digest, files.values()), strict=True))


def _digest(path: Path) -> str:
    digest, chunk = xxhash.xxh3_128(), bytearray(CHUNK)
    view = memoryview(chunk)

    def read() -> str:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(chunk):
                digest.update(view[:count])
        return digest.hexdigest()

    return _readable(path, read)


def _json_of(path: Path) -> dict[str, Any]:
    content = _readable(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; fetch or save the model again.")
    return content


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    """Turn what goes wrong in reading a file into a message."""
    try:
        return read()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
