"""PLACEHOLDER"""

from collections.abc import Sequence
from typing import Any

from fused_dpo.integrations.scoring import Counts

_active: dict[str, "Patch"] = {}


class Patch:
    """Placeholder."""

    def __init__(self, name: str, replacements: Sequence[tuple[Any, str, Any]], counts: Counts) -> None:
        if name in _active:
            raise RuntimeError(f"{name} is patched already; undo() that patch, or leave its with block, first.")
        self.name, self.counts = name, counts
        self._before = [(owner, attribute, vars(owner)[attribute]) for owner, attribute, _ in replacements]
        for owner, attribute, new in replacements:
            setattr(owner, attribute, new)
        _active[name] = self

    def undo(self) -> None:
        if _active.get(self.name) is self:
            del _active[self.name]
            for owner, attribute, old in self._before:
                setattr(owner, attribute, old)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
