"""Compare the merged and the unmerged model, and name the layers where they differ.

A parent that multiplies by `child.weight` itself bypasses the adapter but not the merged weight. Inspection does not
find every such place; running both models does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..compat import CACHE
from ..errors import StateError
from ..layers.hosts import states_of
from ..layers.ops import evaluation_mode, kept_random_states
from ..layers.parts import Fold
from .activation import acting_together
from .dequantize import quantized_layers
from .folding import merged_rows
from .merge import by_tensor, disabled
from .state import require_state
from .undo import all_or_nothing
from .walk import module_at

NOISE = 1e-3
"""A difference below this fraction of the adapter's effect counts as rounding."""


@dataclass
class AdapterCheck:
    """The result of `check_adapter`. Norms are computed over all floating-point outputs of the model together.

    error: norm of merged minus unmerged output, divided by the norm of the output.
    effect: norm of unmerged minus base output, divided by the norm of the output.
    faulty: layer -> its share of the error, for layers whose merged weight does not act like their adapter.
    never_called: layers whose forward did not run for this batch.
    """

    error: float
    effect: float
    faulty: dict[str, float] = field(default_factory=dict)
    never_called: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faulty

    def __str__(self) -> str:
        lines = [f"merged vs. unmerged: relative error {self.error:.1e}, effect of the adapter {self.effect:.1e}"]
        lines += [f"  differs: {name} (relative error {error:.1e})" for name, error in self.faulty.items()]
        lines += [f"  never called: {name}" for name in self.never_called]
        return "\n".join(lines)


@torch.no_grad()
def check_adapter(model: nn.Module, batch: Mapping[str, object]) -> AdapterCheck:
    """Run `batch` through the model unmerged and merged, and compare the outputs.

    During the call the weights are float32; afterwards every bit is restored. If the outputs differ, each layer is
    folded alone, which takes one more forward per layer.

    Args:
        batch: keyword arguments of the model's forward.

    Raises:
        StateError: no adapter is active, the model is merged, or the base is quantized.
    """
    state = require_state(model, "check_adapter")
    state.refuse_merged("check_adapter")
    if not state.activity.active:
        raise StateError("check_adapter: no adapter is active. Call set_adapter(name) first.")
    if quantized_layers(model):
        raise StateError(
            "check_adapter: the base is quantized, so its weights cannot be replaced temporarily. Load the adapter "
            "onto the dense base and check it there: which layers are bypassed does not depend on quantization."
        )
    folds: dict[str, list[Fold]] = {}
    modules = {}
    for first, *others in acting_together(model, state.activity.active):
        found = list(first.folds(others))
        if found and not any(fold.refused for fold in found):  # what cannot be merged acts unmerged in both
            folds.setdefault(first.path, []).extend(found)
            modules[first.path] = first.module
    layers = {path: _Adapted(modules[path], list(by_tensor(found).values())) for path, found in folds.items()}
    with all_or_nothing(model), evaluation_mode(model), _float32(model):
        return _compare(model, layers, batch)


class _Adapted(NamedTuple):
    module: nn.Module
    folds: list[Fold]


def _compare(model: nn.Module, layers: dict[str, _Adapted], batch: Mapping[str, object]) -> AdapterCheck:
    batch = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    called: set[str] = set()
    hooks = [
        layer.module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()
    ]
    unmerged = _output(model, batch)
    for hook in hooks:
        hook.remove()
    with disabled(model):
        base = _output(model, batch)
    with _all_folded(model, layers):
        merged = _output(model, batch)
    size = max(float(unmerged.norm()), 1e-30)
    effect, error = float((unmerged - base).norm()), float((merged - unmerged).norm())
    allowed = NOISE * effect + 64 * torch.finfo(torch.float32).eps * size
    report = AdapterCheck(error / size, effect / size)
    report.never_called = [n for n in layers if n not in called]
    if error > allowed:
        for name, layer in layers.items():
            with _all_folded(model, {name: layer}):
                alone = float((_output(model, batch) - unmerged).norm())
            if alone > allowed / max(1.0, len(layers) ** 0.5):
                report.faulty[name] = alone / size
    return report


def _output(model: nn.Module, batch: Mapping[str, object]) -> Tensor:
    with kept_random_states():
        torch.manual_seed(0)  # some losses sample points, which must be the same in every run
        output = model(**batch)
    leaves = [leaf for leaf in tree_leaves(dict(_items(output))) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.detach().double().flatten() for leaf in leaves if leaf.is_floating_point()])


def _items(output: object) -> Iterator[tuple[str, object]]:
    if isinstance(output, Mapping):
        yield from ((k, v) for k, v in output.items() if k not in CACHE)
    else:
        yield "output", output


@contextmanager
def _all_folded(model: nn.Module, found: Mapping[str, _Adapted]) -> Iterator[None]:
    """Within, the modules act as plain ones whose tensors have the adapters folded in.

    A weight that other modules share gets a copy, as `untie=True` does, because the adapter acts on its module alone.
    """
    restore: list[Callable[[], object]] = []
    held = [(state, state.names) for adapted in found.values() for state in states_of(adapted.module)]
    for adapted in found.values():
        for fold in adapted.folds:
            tensor: Any = fold.site.weight
            new = tensor.detach().clone()
            for rows, block in merged_rows(fold):
                new[rows] = block
            if fold.holders is None:
                restore.append(partial(setattr, tensor, "data", tensor.data))
                tensor.data = new
                continue
            copy = nn.Parameter(new, requires_grad=tensor.requires_grad)
            for parameters in (module_at(model, path)._parameters for path in fold.holders):
                for name in [name for name, parameter in parameters.items() if parameter is tensor]:
                    restore.append(partial(parameters.__setitem__, name, tensor))
                    parameters[name] = copy
    for state, _ in held:
        state.names = ()
    yield
    for step in reversed(restore):
        step()
    for state, names in held:
        state.names = names


@contextmanager
def _float32(model: nn.Module) -> Iterator[None]:
    """Within, bfloat16 and float16 parameters and buffers are float32; the originals are restored afterwards."""
    kept = [
        (t, t.data)
        for t in (*model.parameters(), *model.buffers())
        if t.is_floating_point() and t.dtype in (torch.bfloat16, torch.float16)
    ]
    for tensor, data in kept:
        tensor.data = data.float()
    yield
    for tensor, data in kept:
        tensor.data = data
