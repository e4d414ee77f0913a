"""Find layers whose parent multiplies by `child.weight` itself, so that the child's forward may never run.

LoRA on such a child has no effect, sometimes only in one mode or on one device. A trace cannot show all cases, so this
reads the parent's source for any use of `self.<child>.weight` other than its dtype, device or shape. Uses in a branch
that this model never takes do not count: its condition compares constants of the module or its config, or it asks for
an optional argument that no module of the model gives. What is left can include false positives and miss uses through
another name; `check_adapter` and the Trainer's guard check what really ran. Tied embeddings that nothing calls are
found in the same way.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator
from types import NoneType
from typing import Any

from torch import nn

from ..layers.class_swap import unwrap_class
from .walk import original_modules

_HARMLESS_ATTRIBUTES = frozenset(
    {"dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "size", "dim", "numel", "is_cuda", "__class__"}
)
_HARMLESS_CALLS = frozenset({"isinstance", "hasattr", "getattr", "len", "type", "id"})
_NOT_FORWARD = (
    "__init__",
    "_init",
    "init_",
    "reset_",
    "_reset",
    "tie_",
    "_tie",
    "post_init",
    "set_",
    "get_input_embeddings",
    "_load",
    "load_",
)
_LIBRARY_BASES = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation", "hf_lora")


def bypassed_modules(model: nn.Module) -> dict[str, str]:
    """Original name -> reason, for every module whose parent's source multiplies by its weight."""
    return {
        path: f"{cls} multiplies by its weight directly, so its forward may never run"
        for _, cls, path, _ in _uses(model, "weight")
    }


def bias_readers(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Original name -> (original name of a parent that reads its bias, its path relative to that parent)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, _, path, child in _uses(model, "bias"):
        found.setdefault(path, []).append((name, child))
    return found


def _uses(model: nn.Module, attribute: str) -> Iterator[tuple[str, str, str, str]]:
    """(name of a parent, its class, name of a child, its relative path) where the parent may compute with a tensor."""
    absent: dict[str, bool] = {}  # optional argument -> whether no module of the model gives it
    for name, module in original_modules(model):
        cls = unwrap_class(type(module))
        for child, function, node in uses_in(cls, attribute):
            for argument in function.optional:
                if argument not in absent and function.mentions(argument, node):
                    absent[argument] = not _is_given(argument, model)
            missing = {a for a in function.optional if absent.get(a) and not function.assigned(a)}
            if function.may_run(node, module, missing):
                yield name, cls.__name__, f"{name}.{child}" if name else child, child


def uncalled_embeddings(model: nn.Module, once: bool = True) -> dict[str, str]:
    """Original name -> reason, for every embedding that only lends its weight to others, as a tied one may.

    No method that could run in a forward mentions it.

    Args:
        once: an embedding with several names is one; else each name is judged by itself, as in PEFT.
    """
    users: dict[int, list[str]] = {}
    modules = dict(original_modules(model, once))
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and module._parameters.get("weight") is not None:
            users.setdefault(id(module._parameters["weight"]), []).append(name)
    found: dict[str, str] = {}
    for names in users.values():
        called = [
            name for name in names if len(names) == 1 or _is_mentioned(name.rpartition(".")[2], modules.values())
        ]
        for name in names if called else ():
            if name not in called:
                found[name] = f"nothing calls it: it shares its weight with {', '.join(called)}; name these instead"
    return found


def called_embeddings(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names of one embedding under which a method that could run in a forward mentions it."""
    modules = [module for _, module in original_modules(model)]
    return [name for name in names if _is_mentioned(name.rpartition(".")[2], modules)]


def _is_mentioned(attribute: str, modules: Iterable[nn.Module]) -> bool:
    classes = {unwrap_class(type(module)) for module in modules}
    return any(functions_of(cls, attribute) for cls in classes)


class _Function:
    """The source of one method: its nodes, and the conditions under which each runs."""

    def __init__(self, tree: ast.AST) -> None:
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        definition = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        given = definition.args
        defaults = [*zip(reversed(given.args), reversed(given.defaults), strict=False)]
        defaults += [(arg, value) for arg, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value]
        self.optional = {arg.arg for arg, value in defaults if isinstance(value, ast.Constant) and value.value is None}

    def conditions(self, node: ast.AST) -> Iterator[tuple[ast.expr, bool]]:
        """(condition, its value) of every branch around `node`, and of those before it that leave its block."""
        while node in self.parents:
            inside, node = node, self.parents[node]
            if isinstance(node, (ast.If, ast.IfExp)) and inside is not node.test:
                body = node.body if isinstance(node.body, list) else [node.body]
                yield node.test, inside in body
            blocks = (getattr(node, field, None) for field in ("body", "orelse"))
            for block in (block for block in blocks if isinstance(block, list) and inside in block):
                for before in block[: block.index(inside)]:
                    if isinstance(before, ast.If) and isinstance(before.body[-1], _LEAVES):
                        yield before.test, False

    def mentions(self, argument: str, node: ast.AST) -> bool:
        """Whether a condition around `node` depends on an argument."""
        names = (each for test, _ in self.conditions(node) for each in ast.walk(test))
        return any(isinstance(each, ast.Name) and each.id == argument for each in names)

    def may_run(self, node: ast.AST, module: nn.Module, absent: set[str]) -> bool:
        """Whether `node` may run in `module` if the arguments `absent` are None."""
        known = ((_value(test, module, absent), wanted) for test, wanted in self.conditions(node))
        return all(value is _UNKNOWN or bool(value) == wanted for value, wanted in known)

    def gives(self, node: ast.keyword, argument: str, module: nn.Module) -> bool:
        """Whether a call gives an argument of this name anything but None or what this method got in the same one."""
        if isinstance(node.value, ast.Constant):
            return node.value.value is not None
        if not isinstance(node.value, ast.Name) or node.value.id != argument or argument not in self.optional:
            return True
        live = (each for each in self.assigned(argument) if self.may_run(each, module, {argument}))
        return any(each.lineno < node.lineno or self.loops(each) & self.loops(node) for each in live)

    def assigned(self, name: str) -> list[ast.Name]:
        names = (each for each in ast.walk(self.tree) if isinstance(each, ast.Name) and each.id == name)
        return [each for each in names if not isinstance(each.ctx, ast.Load)]

    def loops(self, node: ast.AST) -> set[ast.AST]:
        """The loops around `node`."""
        found: set[ast.AST] = set()
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, (ast.For, ast.While)):
                found.add(node)
        return found


_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_UNKNOWN = object()
_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def _value(test: ast.expr, module: nn.Module, absent: set[str]) -> object:
    """The value of a condition that depends only on constants, else `_UNKNOWN`."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.Name):
        return None if test.id in absent else _UNKNOWN
    if isinstance(test, ast.Attribute):
        return _constant(_path_below_self(test), module)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module, absent)
        return value if value is _UNKNOWN else not value
    if isinstance(test, ast.BoolOp):
        values = [_value(each, module, absent) for each in test.values]
        decides = isinstance(test.op, ast.Or)
        if any(value is not _UNKNOWN and bool(value) == decides for value in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _OPERATORS:
        left, right = (_value(each, module, absent) for each in (test.left, test.comparators[0]))
        if left is _UNKNOWN or right is _UNKNOWN:
            return _UNKNOWN
        try:
            return _OPERATORS[type(test.ops[0])](left, right)
        except TypeError:
            return _UNKNOWN
    return _UNKNOWN


def _constant(path: str | None, module: nn.Module) -> object:
    """The number, text or None at a path below `self`: an attribute of the module or of its config."""
    value: Any = module
    for name in path.split(".") if path else ():
        values = getattr(value, "__dict__", {})
        if name == "training" or name not in values:  # a property or a child may change
            return _UNKNOWN
        value = values[name]
    return value if path and isinstance(value, (int, float, str, NoneType)) else _UNKNOWN


def _is_given(argument: str, model: nn.Module) -> bool:
    """Whether a caller of `model`, or a module in it, may give an optional argument a value."""
    cls: Any = unwrap_class(type(model))
    if argument in inspect.signature(cls.forward).parameters:
        return True
    return any(
        function.may_run(node, module, {argument} & function.optional) and function.gives(node, argument, module)
        for _, module in original_modules(model)
        for function in functions_of(unwrap_class(type(module)))
        for node in ast.walk(function.tree)
        if isinstance(node, ast.keyword) and node.arg == argument
    )


@functools.cache
def uses_in(cls: type, attribute: str) -> tuple[tuple[str, _Function, ast.AST], ...]:
    """(dotted path, method, use) of the children with whose weight (or bias) the methods of `cls` compute."""
    return tuple((path, f, node) for f in functions_of(cls, attribute) for path, node in _used(f, attribute))


@functools.cache
def functions_of(cls: type, name: str = "") -> tuple[_Function, ...]:
    """The methods of `cls` that run in a forward; with `name`, those that use an attribute of that name."""
    found: list[_Function] = []
    for method, function in inspect.getmembers(cls, inspect.isfunction):
        function = inspect.unwrap(function)
        if method.startswith(_NOT_FORWARD) or (function.__module__ or "").startswith(_LIBRARY_BASES):
            continue
        if name and name not in function.__code__.co_names:
            continue
        try:
            found.append(_Function(ast.parse(textwrap.dedent(inspect.getsource(function)))))
        except (OSError, TypeError, SyntaxError, StopIteration):
            continue  # no source (an interactive session, a compiled module), or a lambda
    return tuple(found)


def _used(function: _Function, attribute: str) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(function.tree):
        if isinstance(node, ast.Attribute) and node.attr == attribute:
            path = _path_below_self(node.value)
            if path and not _is_harmless(node, function.parents[node]):
                yield path, node


def _path_below_self(node: ast.AST) -> str | None:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" and names else None


def _is_harmless(node: ast.Attribute, parent: ast.AST) -> bool:
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS_ATTRIBUTES
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in _HARMLESS_CALLS
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    return isinstance(node.ctx, ast.Store)
