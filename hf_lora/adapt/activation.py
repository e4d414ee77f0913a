"""Which adapters act, and which of their tensors are trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import Faults, StateError
from ..layers.parts import Part
from .state import LoraState, running_task
from .walk import adapter_modules, held_parameters, parts

_FROZEN = "frozen_by_user"


def switch(
    model: nn.Module, state: LoraState, active: tuple[str, ...] | None = None, enabled: bool | None = None
) -> None:
    """Change which adapters act. The labels in model and config are always those of the head that runs."""
    activity, before = state.activity, running_task(state)
    was_active, was_enabled = activity.active, activity.enabled
    before.take_from(model)
    try:
        activity.set(active=active, enabled=enabled)
        now = running_task(state)
        if now is not before:
            now.apply(model)
    except BaseException:
        activity.set(active=was_active, enabled=was_enabled)
        before.apply(model)
        raise


def set_active(model: nn.Module, state: LoraState, names: tuple[str, ...]) -> None:
    """Make `names` the active adapters.

    Raises:
        StateError: a name is unknown, the model is merged, or the adapters conflict.
    """
    state.refuse_merged("set_adapter")
    for name in names:
        state.require(name)
    if len(set(names)) != len(names):
        raise StateError(f"set_adapter({list(names)}): an adapter is named twice.")
    if len(names) > 1:
        _refuse_conflicts(model, names)
    before = state.activity.active
    switched = {n for n in (*before, *names) if (n in before) != (n in names)}
    changed = {n for n in switched if n in state.adapters and state.adapters[n].trainable}
    # Plain lists of tensors: thousands of tuples would start the garbage collection of a large model.
    begin: list[nn.Parameter] = []
    end: list[nn.Parameter] = []
    grads: list[tuple[nn.Parameter, Tensor]] = []  # of those that are not trained then
    for name, held in adapter_modules(model, changed) if changed else ():
        leaves, parameters = name in before, held_parameters(held)
        if leaves:
            _note_frozen(held, parameters)
        frozen = held.__dict__.get(_FROZEN, ())
        for key, tensor in parameters:
            wanted = not leaves and key not in frozen
            if tensor.requires_grad is not wanted:
                (begin if wanted else end).append(tensor)
            if not wanted and tensor.grad is not None:
                grads.append((tensor, tensor.grad))
    try:
        switch(model, state, active=names)
        _train(begin, end)
        for tensor, _ in grads:
            tensor.grad = None
    except BaseException:
        switch(model, state, active=before)
        _train(end, begin)
        for tensor, grad in grads:
            tensor.grad = grad
        raise


def _train(tensors: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
    """Let `tensors` require gradients, and `others` not."""
    for tensor in tensors:
        tensor.requires_grad = True
    for tensor in others:
        tensor.requires_grad = False


def acting_together(model: nn.Module, names: tuple[str, ...]) -> list[list[Part]]:
    """The parts of the adapters `names`, in this order, grouped by the module or weight that they act on."""
    together: dict[tuple[type[Part], str], list[Part]] = {}
    for part in parts(model):
        if part.adapter in names:
            together.setdefault((type(part), part.name), []).append(part)
    for group in together.values():
        group.sort(key=lambda part: names.index(part.adapter))
    return list(together.values())


def _refuse_conflicts(model: nn.Module, names: tuple[str, ...]) -> None:
    faults = Faults(f"set_adapter({list(names)}): these adapters cannot be active together")
    together = acting_together(model, names)
    for first, *others in together:
        if others and (conflict := first.conflict(others)) is not None:
            faults.add(conflict)
    everything = [part for group in together for part in group]
    for whole in (part for part in everything if part.whole_module):
        for part in everything:
            below = f"{part.path}.".startswith(f"{whole.path}.") and not (
                part.path == whole.path and part.whole_module
            )
            if below and part.adapter != whole.adapter:
                faults.add(
                    f"{whole.path}: {whole.adapter!r} replaces this module, so what {part.adapter!r} has at "
                    f"{part.name} would have no effect"
                )
    faults.check(StateError, "Set one of them at a time.")


def update_requires_grad(model: nn.Module, state: LoraState, names: Iterable[str]) -> None:
    """Set `requires_grad` of the tensors of `names`: true if the adapter is active and trainable, except for what
    `keep_frozen` noted."""
    wanted = {name: state.adapters[name].trainable and name in state.activity.active for name in names}
    for name, held in adapter_modules(model, wanted) if wanted else ():
        frozen = held.__dict__.get(_FROZEN, ())
        for key, parameter in held_parameters(held):
            parameter.requires_grad = wanted[name] and key not in frozen
            if not parameter.requires_grad:
                parameter.grad = None


def keep_frozen(model: nn.Module, state: LoraState) -> None:
    """Note which tensors of the active adapters the user froze, so that they stay frozen after the adapters were
    inactive. Called before `requires_grad` of an active adapter changes."""
    trained = [n for n, record in state.adapters.items() if record.trainable and n in state.activity.active]
    for _, held in adapter_modules(model, trained):
        _note_frozen(held, held_parameters(held))


def _note_frozen(held: nn.Module, parameters: list[tuple[str, nn.Parameter]]) -> None:
    frozen = [key for key, parameter in parameters if not parameter.requires_grad]
    if frozen or _FROZEN in held.__dict__:
        held.__dict__[_FROZEN] = frozen
