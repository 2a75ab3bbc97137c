"""Read from the source of a model class's forward what its attributes and configuration do not say."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import nn


class _Factor(NamedTuple):
    """`hidden * width ** -0.5` in a forward; both are dotted paths from the model."""

    width: str
    switch: str | None
    """What has to be true for it, None if nothing."""


def scale_before_head(model: nn.Module) -> float:
    """Tell by what an encoder-decoder multiplies its last hidden states before the head's weight.

    T5 and its relatives multiply by `d_model ** -0.5` (Raffel et al., 2020, arXiv 1910.10683, as released), each under
    a condition that depends on class and release. The forward itself says which.

    Raises:
        NotImplementedError: the source is not there, or the condition is more than a setting.
    """
    scale = 1.0
    for factor in _width_factors(type(model)):
        if factor.switch is None or _follow(model, factor.switch):
            scale *= float(_follow(model, factor.width)) ** -0.5
    return scale


def calls_another_part_first(model: nn.Module, layer: nn.Module) -> str | None:
    """Name the part of a model whose output its head takes, as in `self.decoder(self.lm_head(hidden))`, or None."""
    name = next((name for name, child in model.named_children() if child is layer), None)
    return dict(_nested_calls(type(model))).get(name or "")


@cache
def _width_factors(cls: type) -> tuple[_Factor, ...]:
    """Find all factors `... ** -0.5` in the forward of a class, and the setting that each depends on."""
    forward = _forward_of(cls)
    if forward is None:
        raise NotImplementedError(
            f"the source of {cls.__name__}.forward is not there to tell whether it scales the hidden states; build the "
            f"LMHead yourself, with logit_scale set as the model applies it."
        )
    return tuple(_factors_in(forward.body, None, cls))


def _factors_in(body: list[ast.stmt], switch: str | None, cls: type) -> Iterator[_Factor]:
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _factors_in(statement.body, _path(statement.test) or "", cls)
            yield from _factors_in(statement.orelse, "", cls)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                width = _root_below(node.left) or _root_below(node.right)
                if width is None:
                    continue
                if switch == "":
                    raise NotImplementedError(
                        f"{cls.__name__} scales its hidden states under a condition that is not understood here; build "
                        f"the LMHead yourself, with logit_scale set as the model applies it."
                    )
                yield _Factor(width, switch)


def _root_below(node: ast.expr) -> str | None:
    """Give the path of x in `x ** -0.5`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and ast.unparse(node.right) == "-0.5":
        return _path(node.left)
    return None


@cache
def _nested_calls(cls: type) -> tuple[tuple[str, str], ...]:
    """List (outer, inner) of all calls `self.outer(self.inner(...))` in the forward of a class."""
    forward = _forward_of(cls)
    calls = [] if forward is None else [node for node in ast.walk(forward) if isinstance(node, ast.Call)]
    pairs = [(call.func, call.args[0].func) for call in calls if call.args and isinstance(call.args[0], ast.Call)]
    names = [(_path(outer), _path(inner)) for outer, inner in pairs]
    return tuple((outer, inner) for outer, inner in names if outer and inner)


def _forward_of(cls: type) -> ast.FunctionDef | None:
    """Parse the forward of a class, below its decorators; None if there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls.forward))  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, TypeError, AttributeError):
        return None
    function = ast.parse(source).body[0]
    return function if isinstance(function, ast.FunctionDef) else None


def _path(node: ast.expr) -> str | None:
    """Write `self.a.b` as "a.b"; None for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == "self" else None


def _follow(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model
