"""All or nothing: a change of a model that is cut off anywhere is undone, or completed.

`all_or_nothing` restores modules, parameter objects, configs and the plain data of adapters. It does not copy values,
so a change that overwrites values either keeps them and calls `Undo.restoring`, or passes a point of no return, after
which it is completed by repeating it.
"""

from __future__ import annotations

import gc
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..layers.copies import Copies, Replacement
from ..layers.hosts import Activity, Factor, Held, Host
from ..layers.site import LayerAdapter
from .state import AdapterRecord, LoraState, Original, Task

PLAIN = (Activity, AdapterRecord, Held, LayerAdapter, LoraState, Original, Task)
"""Classes of plain data that change with the adapters."""
_TABLES = frozenset({dict, OrderedDict, list, set})
_CHILDREN_PER_ADAPTER = (nn.ModuleDict, Copies)
_PER_ADAPTER = frozenset({AdapterRecord, LayerAdapter})
"""Plain data in tables by the adapter's name."""


class _Kinds(dict[type, bool]):
    """class -> whether it is a class of plain data. A lookup is not a call, which counts for large models."""

    def __missing__(self, cls: type) -> bool:
        self[cls] = issubclass(cls, PLAIN)
        return self[cls]


_IS_PLAIN = _Kinds()


class Undo:
    """What a model was, to restore it. It costs a few calls for each module.

    Args:
        adapters: the adapters that exist already and whose tensors may change; default: all.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str] | None = None) -> None:
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        """Modules, configs and plain data with their attributes."""
        self._factors: list[tuple[Factor, bool, nn.Parameter | None]] = []
        self._tables: list[tuple[Any, Any]] = []
        """The attributes that are tables and hold something, with their content."""
        self._classes: list[tuple[nn.Module, type]] = []
        self._tensors: list[tuple[Tensor, Tensor, bool, Tensor | None]] = []
        self._before: list[Callable[[], object]] = []
        self._rest: Callable[[], object] | None = None
        self._finished: Callable[[], bool] = bool
        self._adapters = adapters
        self._seen: set[int] = set()
        self._walk(model)

    def _walk(self, model: nn.Module) -> None:
        stack: list[nn.Module | None] = [model]
        seen: set[nn.Module | None] = {None}
        inside: set[int] = set()  # children of hosts, among them those that hold a child for each adapter
        while stack:
            module = stack.pop()
            if module is None or module in seen:
                continue
            seen.add(module)
            parameters = module._parameters
            tensors = [*parameters.values(), *module._buffers.values()]
            if module.__class__ is Factor:  # most modules are one, and nothing else of it changes
                self._factors += [(module, module.training, parameters["weight"])]
            else:
                self._classes += [(module, module.__class__)]
                self._remember(module)
                children = module._modules
                if self._adapters is not None and module.__class__ in _CHILDREN_PER_ADAPTER and id(module) in inside:
                    children = {name: children[name] for name in self._adapters if name in children}
                elif isinstance(module, (Host, Replacement)):
                    inside |= {id(child) for child in children.values()}
                stack += children.values()
            self._tensors += [(t, t.data, t.requires_grad, t.grad) for t in tensors if t is not None]
            self._remember_configs(module.__dict__.get("config"))

    def _remember_configs(self, config: Any) -> None:
        if hasattr(config, "__dict__"):
            for each in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
                if id(each) not in self._seen:
                    self._seen.add(id(each))
                    self._remember(each)

    def _remember(self, thing: Any) -> None:
        """Keep the attributes of an object, the content of tables in them, and the plain data in both."""
        attributes = thing.__dict__.copy()
        self._objects += [(thing, attributes)]
        for value in attributes.values():
            kind = value.__class__
            if kind in _TABLES:
                if value:
                    self._tables += [(value, value.copy())]
                    for key, each in enumerate(value) if kind is list or kind is set else value.items():
                        if _IS_PLAIN[each.__class__] and (
                            self._adapters is None or each.__class__ not in _PER_ADAPTER or key in self._adapters
                        ):
                            self._remember_once(each)
            elif _IS_PLAIN[kind]:
                self._remember_once(value)

    def _remember_once(self, thing: Any) -> None:
        if id(thing) not in self._seen:
            self._seen.add(id(thing))
            self._remember(thing)

    def restoring(self, step: Callable[[], object]) -> None:
        """Also call `step`, which restores values, before everything else is restored."""
        self._before.append(step)

    def unless(self, finished: Callable[[], bool]) -> None:
        """Leave the model as it is if `finished()`, because a change within this one was completed."""
        self._finished = finished

    def no_return(self, rest: Callable[[], object]) -> None:
        """From now on nothing is undone: a change that is cut off is completed by `rest`, which can be repeated."""
        self._rest = rest
        for kept in (self._objects, self._tables, self._tensors, self._factors, self._before):
            kept.clear()  # frees what was replaced

    def settle(self, error: BaseException) -> None:
        """Restore the model after an error, or complete the change."""
        if self._finished():
            return
        if self._rest is not None:
            traceback.clear_frames(error.__traceback__)  # which may hold the memory that was missing
            self._rest()
            return
        for step in self._before:
            step()
        for module, cls in self._classes:
            if module.__class__ is not cls:
                module.__class__ = cls
        held = {id(table) for table, _ in self._tables}
        for thing, attributes in self._objects:
            _refill(thing.__dict__, attributes)
            for value in attributes.values():
                if value.__class__ in _TABLES and value and id(value) not in held:
                    value.clear()
        for table, content in self._tables:
            _refill(table, content)
        for factor, training, weight in self._factors:
            factor.training, factor._parameters["weight"] = training, weight
        for tensor, data, requires_grad, grad in self._tensors:
            _put_back(tensor, data, requires_grad, grad)


def _refill(table: Any, content: Any) -> None:
    """Restore the content of a table. One that did not change is not touched: other threads may be using the model."""
    same = len(table) == len(content) and all(a is b for a, b in zip(table, content, strict=True))
    if same and isinstance(table, dict):
        same = all(a is b for a, b in zip(table.values(), content.values(), strict=True))
    if not same:
        table.clear()
        (table.extend if isinstance(table, list) else table.update)(content)


def _put_back(tensor: Tensor, data: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if type(data) is Tensor and (tensor.data_ptr(), tensor.shape, tensor.dtype) != (
        data.data_ptr(), data.shape, data.dtype,
    ):  # fmt: skip
        tensor.data = data
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    if tensor.grad is not grad:
        tensor.grad = grad


@contextmanager
def all_or_nothing(model: nn.Module, adapters: Sequence[str] | None = None) -> Iterator[Undo]:
    """Undo or complete the change of a model in the `with` block if an error or an interruption ends it.

    Args:
        adapters: the adapters that exist already and whose tensors may change; default: all.
    """
    with gc_paused():
        undo = Undo(model, adapters)
    try:
        yield undo
    except BaseException as error:
        undo.settle(error)
        raise


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection: an injection creates tens of thousands of objects, all of which stay alive."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
