"""Find layers whose parent multiplies by `child.weight` itself, so that the child's forward may never run.

LoRA on such a child has no effect, sometimes only in one mode or on one device. A trace cannot show all cases, so this
reads the parent's source for any use of `self.<child>.weight` other than its dtype, device or shape. It can report
false positives and miss uses through another name; `check_adapter` and the Trainer's guard check what really ran.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

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
    "_load",
    "load_",
)
_LIBRARY_BASES = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation", "hf_lora")


def bypassed_modules(model: nn.Module) -> dict[str, str]:
    """Original name -> reason, for every module whose parent's source multiplies by its weight."""
    return {
        path: f"{cls.__name__} multiplies by its weight directly, so its forward may never run"
        for _, cls, path, _, tensor in _uses(model)
        if tensor == "weight"
    }


def bias_readers(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Original name -> (original name of a parent that reads its bias, its path relative to that parent)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, _, path, child, tensor in _uses(model):
        if tensor == "bias":
            found.setdefault(path, []).append((name, child))
    return found


def _uses(model: nn.Module) -> Iterator[tuple[str, type, str, str, str]]:
    """(name, class, name of a child, its relative path, tensor) for every tensor of a child that a method reads."""
    for name, module in original_modules(model):
        cls = unwrap_class(type(module))
        for used in tensors_used_by(cls):
            child, _, tensor = used.rpartition(".")
            yield name, cls, f"{name}.{child}" if name else child, child, tensor


@functools.cache
def tensors_used_by(cls: type) -> frozenset[str]:
    """Dotted paths, relative to `self`, of weights and biases of children that the methods of `cls` compute with."""
    found: set[str] = set()
    for method, function in inspect.getmembers(cls, inspect.isfunction):
        function = inspect.unwrap(function)
        if method.startswith(_NOT_FORWARD) or (function.__module__ or "").startswith(_LIBRARY_BASES):
            continue
        names = function.__code__.co_names
        if "weight" not in names and "bias" not in names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue  # no source (an interactive session, a compiled module)
        found.update(_used(tree))
    return frozenset(found)


def _used(tree: ast.AST) -> Iterator[str]:
    parents: dict[ast.AST, ast.AST] = {c: p for p in ast.walk(tree) for c in ast.iter_child_nodes(p)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias"):
            path = _path_below_self(node.value)
            if path and not _is_harmless(node, parents[node]):
                yield f"{path}.{node.attr}"


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
