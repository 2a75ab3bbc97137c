"""Settings from YAML and JSON files, as the command-line options that they stand for."""

import dataclasses
import datetime
import difflib
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.errors import UserError, short

OLDER = {"--tensorboard": ("--report-to", "tensorboard"), "--no-tensorboard": ("--report-to", "none")}
"""Options by the names that they once had, and what they are now."""
LARGEST = 2**20
"""Bytes of a file of settings, at most; what is larger is another kind of file."""


def arguments_of_file(path: str, config: type) -> list[str]:
    """Read a YAML (or JSON) file of settings as command-line options, less what `config` lacks.

    Raises:
        UserError: no such file, no mapping in it, names that no configuration knows or that stand there twice, values
            of another type, or YAML that builds other objects than plain ones.
    """
    settings = _read(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold `name: value` lines, got {type(settings).__name__}.")
    taken, known = _option_types(config), _option_types(TrainConfig)
    arguments: list[str] = []
    seen: set[str] = set()
    for name, value in settings.items():
        key = str(name).replace("-", "_")
        if key == "tensorboard" and isinstance(value, bool):
            key, value = "report_to", OLDER[f"--{'' if value else 'no-'}tensorboard"][-1]
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{path}: unknown option {short(name)}" + (f"; did you mean {close[0]}?" if close else "."))
        if key in seen:
            raise UserError(f"{path}: {key} is set twice; leave one of them out.")
        seen.add(key)
        if key not in taken:
            continue
        wanted = _unfit(value, known[key])
        if wanted:
            raise UserError(f"{path}: {name} must be {wanted}, got {short(value)}.")
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, (list, tuple)):
            arguments += [option, *map(str, value)]
        elif value is not None:
            arguments += [option, str(value)]
    return arguments


def _read(path: str) -> Any:
    import yaml

    if not path or not Path(path).is_file():
        raise UserError(f"--config needs an existing YAML file, got {path!r}.")
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if len(content) > LARGEST:
        raise UserError(f"{path} has more than {LARGEST} bytes; a file of settings has `name: value` lines.")
    try:
        return yaml.load(content.decode("utf-8-sig"), _loader())
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deep.") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of bytes, dates and numbers of thousands of digits
        raise UserError(f"{path} is not valid YAML: {error}") from None


@cache
def _loader() -> Any:
    """Make yaml's safe loader, which builds plain values alone, stricter."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes no key twice: yaml keeps the last."""

        def flatten_mapping(self, node: Any) -> None:
            """Refuse merges (`<<`): nine of nine of nine of them are a thousand million keys."""
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    raise yaml.YAMLError(f"merge keys (<<) are not taken here{key.start_mark}")

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Build a mapping whose keys are all different."""
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise yaml.YAMLError(f"a name is set twice in one mapping{node.start_mark}")
            return found

    return Loader


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
        return _unfit_text(value)
    return "" if _is_number(value, kind) else "a whole number" if kind is int else "a number"


def _unfit_text(value: Any) -> str:
    """Say what a value should have been to be given as text; one with a dash first would be read as an option."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, datetime.date)):
        return "a text"
    try:
        text = str(value)
    except ValueError:  # a whole number of thousands of digits
        return "a text"
    sound = not text.startswith("-") and "\0" not in text and text == text.encode("utf-8", "replace").decode("utf-8")
    return "" if sound else "a text of valid Unicode, without NUL and without a dash at its beginning"


def _is_number(value: Any, kind: type) -> bool:
    """Tell whether the text of the value reads as a number; YAML takes 5e-7 for a text."""
    try:
        kind(str(value))
    except ValueError:
        return False
    return not isinstance(value, bool)
