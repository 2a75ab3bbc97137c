"""Replacing functions of other people's trainers, for a while or for good, in versions that are known."""

import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from fused_dpo.integrations.scoring import Counts

_ABSENT = object()
_active: dict[str, "Patch"] = {}


class Patch:
    """Replaces attributes of classes and modules until `undo()`, or to the end of a `with` block.

    Args:
        name: of the trainer, which can be patched once at a time.
        replacements: owner, attribute, what is put there. Methods of a class act on objects that are there already.
        counts: what the calls under the patch took.

    Raises:
        RuntimeError: the trainer is patched already.
        AttributeError: an owner has no such attribute, so nothing would call what is put there. Nothing is replaced.
    """

    def __init__(self, name: str, replacements: Sequence[tuple[Any, str, Any]], counts: Counts) -> None:
        if name in _active:
            raise RuntimeError(f"{name} is patched already; undo() that patch, or leave its with block, first.")
        for owner, attribute, _ in replacements:
            if not hasattr(owner, attribute):
                raise AttributeError(f"{owner!r} has no {attribute}, so the patch of {name} would do nothing.")
        self.name, self.counts = name, counts
        self._replacements = list(replacements)
        # Out of the owner's own table: an inherited attribute goes away again, a static method stays one.
        self._before = [vars(owner).get(attribute, _ABSENT) for owner, attribute, _ in replacements]
        for owner, attribute, new in replacements:
            setattr(owner, attribute, new)
        _active[name] = self

    def undo(self) -> None:
        """Put the very objects back that were there; a second call does nothing.

        Raises:
            RuntimeError: somebody else has replaced one of them since; their replacement would be lost.
        """
        if _active.get(self.name) is not self:
            return
        for owner, attribute, new in self._replacements:
            if vars(owner).get(attribute) is not new:
                raise RuntimeError(
                    f"{attribute} of {owner!r} was replaced again after the patch of {self.name}; undo that first."
                )
        del _active[self.name]
        for (owner, attribute, _), old in reversed(list(zip(self._replacements, self._before, strict=True))):
            if old is _ABSENT:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, old)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


KNOWN = {
    "patch_trl": ("trl", "0.20", "0.28"),
    "patch_llama_factory": ("llamafactory", "0.9.5", "0.9.5"),
    "patch_ms_swift": ("ms-swift", "4.6", "4.6"),
    "patch_openrlhf": ("openrlhf", "0.11", "0.11"),
}
"""What each patch knows: distribution, first and last release whose function was read and compared; patch_trl's row is
that of the functions up to 0.28."""


def check_version(patch: str, version: str | None = None) -> str:
    """Find the version of the package that a patch is for, and refuse those that it does not know.

    Args:
        patch: a name in `KNOWN`.
        version: None for the installed one.

    Raises:
        ImportError: the package is not installed.
        NotImplementedError: another version: its function may compute something else under the same name.
    """
    package, first, last = KNOWN[patch]
    way_out = f"pip install '{package}>={first},<{_after(last)}'"
    try:
        version = version or metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{patch} needs {package}, which is not installed; {way_out}.") from None
    release = release_of(version)
    if not release_of(first) <= release < release_of(_after(last)):
        known = first if first == last else f"{first} to {last}"
        raise NotImplementedError(
            f"{patch} knows {package} {known}, and {version} is installed; {way_out}, or train without the patch."
        )
    return version


def release_of(version: str) -> tuple[int, ...]:
    """Take the numbers in front: (0, 28, 0) of 0.28.0.dev1."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _after(version: str) -> str:
    """Name the release behind all that begin with this one: 0.29 behind 0.28.1."""
    *front, last = release_of(version)
    return ".".join(map(str, (*front, last + 1)))
