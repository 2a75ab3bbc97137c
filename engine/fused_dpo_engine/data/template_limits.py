"""What a chat template may take: it is code of whoever made the model, and may loop for ever.

Jinja's sandbox, in which transformers runs templates, keeps them from files, modules and Python's insides, and limits
one range to 100,000 numbers. Loops within loops have no end there, and write without one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2

STEPS = 2_000_000
"""Lines of a template that may run while it writes one conversation. Released templates take 5 to 50 a message."""
CHARACTERS = 2**28
"""What it may write for one conversation."""
_COMPILED = "<template>"
"""Jinja's name for the file of a template that it has compiled from a text."""


class TemplateRunsOnError(jinja2.TemplateRuntimeError):
    """A chat template has been stopped."""


@contextmanager
def limited_template() -> Iterator[None]:
    """Stop templates that are rendered within the block, in this thread, at a number of steps and of characters.

    A trace function counts both, so the same template stops at the same place on every machine, whatever runs beside
    it. It sees the lines of templates alone. What one operation of a template makes (`"a" * 10**10`) it cannot bound.

    Raises:
        TemplateRunsOnError: from what renders.
    """
    steps = characters = 0

    def count(_frame: FrameType, event: str, value: Any) -> Callable[..., Any]:
        nonlocal steps, characters
        if event == "line":
            steps += 1
            if steps > STEPS:
                raise TemplateRunsOnError(f"it runs on after {STEPS} steps")
        elif event == "return" and isinstance(value, str):  # a part that it has written
            characters += len(value)
            if characters > CHARACTERS:
                raise TemplateRunsOnError(f"it writes on after {CHARACTERS} characters")
        return count

    def enter(frame: FrameType, _event: str, _value: Any) -> Callable[..., Any] | None:
        return count if frame.f_code.co_filename == _COMPILED else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
