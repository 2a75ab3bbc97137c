"""Read from the source of a model's forward what becomes of its hidden states and logits; attributes do not say it."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

FACTORS = (
    *("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"),
    "logits_mup_width_multiplier",
)
"""What models call a number by which they multiply or divide their logits: Cohere; Granite; Falcon-H1; Muse;
Inkling."""
_CAP = re.compile(r"soft_?cap")
_NOT_OF_THE_HEAD = ("attn", "attention", "router")
_SAME_NUMBERS = ("float", "to", "contiguous", "view", "reshape", "squeeze", "unsqueeze", "clone", "detach", "transpose")


class Factor(NamedTuple):
    """`logits * setting ** power` in a forward, or the hidden states before the head; paths are dotted, from `self`."""

    setting: str
    power: float
    on_logits: bool
    switch: str | None
    """What has to be true for it, None if nothing; empty if that is more than a setting."""


@dataclass(frozen=True)
class Forward:
    """What a forward does around its call of the head."""

    calls_head: bool
    factors: tuple[Factor, ...]
    caps: bool
    """It mentions a softcap that is not of attention or router."""
    names: frozenset[str]
    """Every attribute that it mentions."""
    before: tuple[str, ...]
    """Parts of the model that it calls between hidden states and head."""
    unknown: str | None
    """Source of a step on the way to the logits that is not understood, None if there is none."""


def read_forward(cls: type, head: str) -> Forward | None:
    """Read the forward of a class around its call of `self.<head>`; None if there is no source.

    Read once for every function, so that a forward which replaces another is read as well.
    """
    forward = getattr(cls, "forward", None)
    return None if forward is None else _read(forward, head)


def follow(model: Any, path: str) -> Any:
    """Look up "a.b" from a model."""
    for name in path.split("."):
        model = getattr(model, name)
    return model


@cache
def parse(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Parse a function, below its decorators; None if there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        body = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return body if isinstance(body, ast.FunctionDef) else None


def path_of(node: ast.AST) -> str | None:
    """Write `self.a.b` as "a.b"; None for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == "self" else None


@cache
def _read(function: Callable[..., Any], head: str) -> Forward | None:
    tree = parse(function)
    if tree is None:
        return None
    trace = _Trace(head, _names_in_head_calls(tree, head))
    trace.block(tree.body, None)
    names = frozenset(_identifiers(tree))
    return Forward(
        calls_head=any(isinstance(node, ast.Call) and path_of(node.func) == head for node in ast.walk(tree)),
        factors=tuple(trace.factors),
        caps=any(map(_is_cap, names)),
        names=names,
        before=tuple(trace.before),
        unknown=trace.unknown(),
    )


def _names_in_head_calls(tree: ast.AST, head: str) -> set[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and path_of(node.func) == head]
    return {name.id for call in calls for name in ast.walk(call) if isinstance(name, ast.Name)} - {"self"}


def _identifiers(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value  # getattr(config, "final_logit_softcapping", None)


def _is_cap(name: str) -> bool:
    return bool(_CAP.search(name)) and not name.startswith(_NOT_OF_THE_HEAD)


@dataclass
class _Trace:
    """The statements of a forward in their order; names are followed by what they hold."""

    head: str
    hidden: set[str]
    """Names that the head is called on."""
    logits: dict[str, str] = field(default_factory=dict)
    """Names that hold logits, with the source of a step that is not understood, empty if there is none."""
    caps: set[str] = field(default_factory=set)
    factors: list[Factor] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    """Sources of steps on the hidden states."""

    def unknown(self) -> str | None:
        """Give the first step that is not understood."""
        left = self.returned or list(self.logits.values())
        return next((step for step in (*self.strange, *left) if step), None)

    def block(self, statements: list[ast.stmt], switch: str | None) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                self.block(statement.body, _switch(statement.test))
                self.block(statement.orelse, "")
            elif hasattr(statement, "body"):
                self.block(statement.body, "")  # pyright: ignore[reportAttributeAccessIssue]
            else:
                self.statement(statement, switch)

    def statement(self, statement: ast.stmt, switch: str | None) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.BinOp):
                self.find_factor(node.left, node.op, node.right, switch)
            elif isinstance(node, ast.Call):
                self.look_at_call(node)
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                self.assign(target, statement.value)
        elif isinstance(statement, ast.AugAssign):
            self.find_factor(statement.target, statement.op, statement.value, switch)
            self.assign(statement.target, ast.BinOp(statement.target, statement.op, statement.value))
        elif isinstance(statement, ast.Return) and statement.value is not None:
            self.find_returned(statement.value)

    def find_factor(self, left: ast.expr, op: ast.operator, right: ast.expr, switch: str | None) -> None:
        sign = {ast.Mult: 1.0, ast.Div: -1.0}.get(type(op))
        for side, other in ((left, right), (right, left)):
            factor = _setting(side)
            if sign is not None and factor is not None and (sign > 0 or side is right):
                self.factors.append(Factor(factor[0], sign * factor[1], self.step(other) is not None, switch))

    def look_at_call(self, call: ast.Call) -> None:
        """Find what is done to the hidden states in the call of the head itself."""
        if path_of(call.func) != self.head or not call.args:
            return
        argument = call.args[0]
        if isinstance(argument, ast.Call) and (inner := path_of(argument.func)):
            self.before.append(inner)
        elif isinstance(argument, ast.BinOp) and not self.is_known(argument):
            self.strange.append(ast.unparse(call))

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        while isinstance(target, ast.Subscript):
            target = target.value
        if not isinstance(target, ast.Name):
            return
        step = self.step(value)
        if step is not None:
            self.logits[target.id] = step
        elif target.id in self.hidden:
            self.on_hidden(value)
        if any(map(_is_cap, _identifiers(value))):
            self.caps.add(target.id)

    def on_hidden(self, value: ast.expr) -> None:
        """Note what is done to the hidden states before the head is called."""
        if isinstance(value, ast.Call) and (part := path_of(value.func)):
            if any(isinstance(each, ast.Name) and each.id in self.hidden for each in value.args):
                self.before.append(part)
        elif isinstance(value, ast.BinOp) and not self.is_known(value):
            self.strange.append(ast.unparse(value))

    def find_returned(self, value: ast.expr) -> None:
        named = [word.value for word in value.keywords if word.arg == "logits"] if isinstance(value, ast.Call) else []
        for each in named or [value]:
            step = self.step(each)
            if step is not None:
                self.returned.append(step)

    def step(self, node: ast.expr) -> str | None:
        """Tell whether an expression is logits: None if not, else the source of what is not understood in it."""
        if isinstance(node, ast.Name):
            return self.logits.get(node.id)
        if isinstance(node, ast.Subscript):
            return self.step(node.value)
        if isinstance(node, ast.IfExp):
            steps = [self.step(node.body), self.step(node.orelse)]
            return next((step for step in steps if step), next((step for step in steps if step is not None), None))
        if isinstance(node, ast.BinOp):
            sides = [self.step(node.left), self.step(node.right)]
            found = [step for step in sides if step is not None]
            return None if not found else found[0] or ("" if self.is_known(node) else ast.unparse(node))
        return self.step_of_call(node) if isinstance(node, ast.Call) else None

    def step_of_call(self, node: ast.Call) -> str | None:
        if path_of(node.func) == self.head:
            return ""
        if isinstance(node.func, ast.Attribute) and (step := self.step(node.func.value)) is not None:
            return step or ("" if node.func.attr in _SAME_NUMBERS else ast.unparse(node))
        found = [step for step in map(self.step, node.args) if step is not None]
        if not found:
            return None
        capping = ast.unparse(node.func).endswith("tanh") or any(map(_is_cap, _identifiers(node)))
        return found[0] or ("" if capping else ast.unparse(node))

    def is_known(self, node: ast.BinOp) -> bool:
        """Tell whether one side is a factor that is read, a softcap, or a bias, which is looked for in the model."""
        for side in (node.left, node.right):
            names = set(_identifiers(side))
            if _setting(side) or names & self.caps or any(map(_is_cap, names)):
                return True
            if isinstance(node.op, ast.Add) and any("bias" in name for name in names):
                return True
            if isinstance(side, ast.Subscript) and isinstance(side.slice, ast.Slice):  # tuples: outputs + rest[1:]
                return True
        return False


def _switch(test: ast.expr) -> str:
    """Read `self.a` and `self.a is not None`; empty for other conditions."""
    if isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None"):
        test = test.left
    return path_of(test) or ""


def _setting(node: ast.expr) -> tuple[str, float] | None:
    """Read `self.logit_scale` as ("logit_scale", 1) and `self.d_model ** -0.5` as ("d_model", -0.5)."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and ast.unparse(node.right) == "-0.5":
        path = path_of(node.left)
        return None if path is None else (path, -0.5)
    path = path_of(node)
    return (path, 1.0) if path is not None and path.split(".")[-1] in FACTORS else None
