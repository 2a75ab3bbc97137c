"""Where a model comes from: a folder or name with weights, or adapters and the base that they name."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig
from transformers.utils.hub import cached_file

from fused_dpo_engine.config.options import ModelOptions
from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.model.folder import INDEX, WHOLE, check_config, check_weights, read_object

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTERS = "adapter_model.bin"
WEIGHTS = (WHOLE, INDEX)


class Source(NamedTuple):
    """What a model's name stands for."""

    base: str
    """Folder or Hugging Face name of the configuration and the weights."""
    adapters: str | None = None
    """Folder or name of peft adapters that belong on these weights."""

    def __str__(self) -> str:
        return self.base if self.adapters is None else f"{self.base}, the base of the adapters in {self.adapters}"


def find_source(name: str) -> Source:
    """Tell where the weights of a model are.

    Raises:
        UserError: there is no such folder; or it holds adapters whose base is not there, is not named, or cannot be
            told.
    """
    check_source(name)
    path = find_file(name, ADAPTER_CONFIG)
    if path is None:
        return Source(name)
    if any(find_file(name, weights) for weights in WEIGHTS):
        raise UserError(
            f"{name} holds adapters ({ADAPTER_CONFIG}) and the weights of a whole model as well; move the ones or the "
            f"others to a folder of their own."
        )
    if find_file(name, ADAPTER_WEIGHTS) is None:
        pickled = "" if find_file(name, PICKLED_ADAPTERS) is None else f"; {PICKLED_ADAPTERS} is pickled, and not read"
        raise UserError(f"{name} holds {ADAPTER_CONFIG}, but no weights of adapters ({ADAPTER_WEIGHTS}){pickled}.")
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"the adapters in {name} do not say which model they belong to; put its folder or name into "
            f"base_model_name_or_path of their {ADAPTER_CONFIG}."
        )
    base = str(Path(base).expanduser()) if base.startswith("~") else base
    if not Path(base).is_dir():
        beside = Path(name) / base  # a relative path, seen from the adapters
        if beside.is_dir():
            base = str(beside)
        elif _is_path(base):
            raise UserError(
                f"the adapters in {name} belong to the model in {base}, which does not exist; put it there, or its "
                f"folder or name into base_model_name_or_path of their {ADAPTER_CONFIG}."
            )
    if find_file(base, ADAPTER_CONFIG) is not None:
        raise UserError(
            f"the adapters in {name} belong to {base}, which holds adapters itself; merge these into their base "
            f"(merge_and_unload of peft), and name the result in base_model_name_or_path of {name}/{ADAPTER_CONFIG}."
        )
    return Source(base, name)


def read_config(source: Source, options: ModelOptions) -> Any:
    """Read a model's configuration.

    Raises:
        UserError: there is none that could be read.
    """
    check_config(partial(find_file, source.base))
    try:
        return AutoConfig.from_pretrained(source.base, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # configurations check themselves with whatever fails on what they hold
        raise UserError(
            f"no model configuration could be read from {source}: {no_such_folder(source.base)}{first_line(error)}"
        ) from error


def check_files(source: Source) -> None:
    """Refuse weights that are pickled, or not in the model's own folder.

    Raises:
        UserError: they are.
    """
    check_weights(source.base, partial(find_file, source.base))


def check_source(name: str) -> None:
    """Refuse a model's name that can only be a folder, if there is none.

    Raises:
        UserError: there is none.
    """
    if not name:
        raise UserError("a model needs a name: give --model (or --ref-model) a folder or a Hugging Face name.")
    if _is_path(name) and not Path(name).is_dir():
        raise UserError(f"model folder {name} does not exist.")


def no_such_folder(name: str) -> str:
    """Say that there is no such folder, where loading failed: mistyped, it looks like a name on the Hub."""
    return f"there is no such folder {name}, nor could the Hub help: " if not Path(name).is_dir() else ""


def find_file(name: str, file: str) -> Path | None:
    """Find a file of a model folder, or of a name on the Hub; None if it is not there, or the Hub cannot be asked."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _is_path(name: str) -> bool:
    """Tell whether a name can only be a folder's."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
