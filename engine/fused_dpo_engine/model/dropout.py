"""Dropout: off while a model is trained, and stated in what is saved as its own configuration had it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from transformers import PretrainedConfig


class Stated(NamedTuple):
    """A value of a configuration that is another while training."""

    config: Any
    name: str
    value: float


def switch_dropout_off(config: Any) -> None:
    """Set every dropout rate of a configuration to 0: policy and reference have to be the same function."""
    for part in _parts(config).values():
        for name in _rates(part):
            setattr(part, name, 0.0)


def stated_rates(live: Any, own: Any) -> list[Stated]:
    """List the dropout rates of a model's own configuration, each with the part of the live one that it belongs to."""
    parts = _parts(live)
    return [
        Stated(parts[path], name, value)
        for path, part in _parts(own).items()
        if path in parts
        for name, value in _rates(part).items()
    ]


@contextmanager
def as_stated(values: Iterable[Stated]) -> Iterator[None]:
    """Let configurations say, within the block, what they said before training."""
    values = list(values)
    before = [getattr(config, name) for config, name, _ in values]
    try:
        for config, name, value in values:
            setattr(config, name, value)
        yield
    finally:
        for (config, name, _), value in zip(values, before, strict=True):
            setattr(config, name, value)


def _rates(config: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, float) and ("drop" in name or name.endswith("pdrop"))
    }


def _parts(config: Any, path: str = "") -> dict[str, Any]:
    """Find a configuration and all that it holds, by their dotted paths."""
    parts = {path: config}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            parts |= _parts(value, f"{path}.{name}")
    return parts
