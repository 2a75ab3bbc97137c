"""Settings from YAML and JSON files, as the command-line options that they stand for."""

import dataclasses
import difflib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.errors import UserError

OLDER = {"--tensorboard": ("--report-to", "tensorboard"), "--no-tensorboard": ("--report-to", "none")}
"""Options by the names that they once had, and what they are now."""


def arguments_of_file(path: str, config: type) -> list[str]:
    """Read a YAML (or JSON) file of settings as command-line options, less what `config` lacks.

    Raises:
        UserError: no such file, no mapping in it, names that no configuration knows, or values of another type.
    """
    import yaml

    if not path or not Path(path).is_file():
        raise UserError(f"--config needs an existing YAML file, got {path!r}.")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold `name: value` lines, got {type(settings).__name__}.")
    taken, known = _option_types(config), _option_types(TrainConfig)
    arguments: list[str] = []
    for name, value in settings.items():
        key = str(name).replace("-", "_")
        if key == "tensorboard" and isinstance(value, bool):
            key, value = "report_to", OLDER[f"--{'' if value else 'no-'}tensorboard"][-1]
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{path}: unknown option {name!r}" + (f"; did you mean {close[0]}?" if close else "."))
        if key not in taken:
            continue
        wanted = _unfit(value, known[key])
        if wanted:
            raise UserError(f"{path}: {name} must be {wanted}, got {value!r}.")
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, (list, tuple)):
            arguments += [option, *map(str, value)]
        elif value is not None:
            arguments += [option, str(value)]
    return arguments


def _option_types(config: Any) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        types |= _option_types(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field.type}
    return types


def _unfit(value: Any, kind: Any) -> str:
    """Say what a value of a file should have been, for an option of this type; empty if it is that."""
    if value is None:  # the default
        return ""
    if get_origin(kind) is UnionType:  # something | None
        kind = get_args(kind)[0]
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        wanted = next(filter(None, (_unfit(item, parts[0]) for item in items)), "")
        return "a list of texts" if wanted == "a text" else f"a list, each {wanted}" if wanted else ""
    if get_origin(kind) is Literal:
        return "" if value in parts else f"one of {', '.join(parts)}"
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is str:
        return "a text" if isinstance(value, (bool, dict, list)) else ""
    return "" if _is_number(value, kind) else "a whole number" if kind is int else "a number"


def _is_number(value: Any, kind: type) -> bool:
    """Tell whether the text of the value reads as a number; YAML takes 5e-7 for a text."""
    try:
        kind(str(value))
    except ValueError:
        return False
    return not isinstance(value, bool)
