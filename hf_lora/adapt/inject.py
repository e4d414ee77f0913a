"""Add adapters to a model and remove them: free functions over any `nn.Module`."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import PRESETS, LoraConfig
from ..errors import ConfigError, Faults, StateError, listed
from ..layers.copies import Replacement
from ..layers.distributed import how_sharded
from ..layers.hosts import Host, remove_all
from ..layers.parts import Bias, Copy, Factors, Part
from ..layers.storages import end_differentiable, keep_differentiable
from .bypass import bias_readers
from .embeddings import checkpoint_vocabulary
from .heads import is_random, new_modules
from .state import ATTRIBUTE, AdapterRecord, LoraState, Task, require_state, set_active, state_of, update_requires_grad
from .statistics import informed
from .targets import Explanation, resolve
from .ties import untie_all
from .walk import module_at, original_modules, parts, placed, places_of, put

LONGEST_NAME = 200
"""Bytes of an adapter's name in UTF-8: it is the name of a folder too."""


def inject(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    *,
    trainable: bool = True,
    allow_bypassed: bool = False,
    from_file: bool = False,
    plan: Explanation | None = None,
    heads: dict[str, nn.Module] | None = None,
    task: Task | None = None,
    batches: Iterable[object] | None = None,
    original: Callable[[str], Tensor] | None = None,
    call: str = "apply_lora(model, config)",
) -> Explanation:
    """Add adapter `name` to `model` in place and make it the active one.

    The base is frozen; which parameters required gradients before is recorded. Everything is checked before anything
    is changed.

    Args:
        plan: the plan for `config`, if the caller has it; the caller then fills the uninitialized factors.
        heads: original name -> module that this adapter trains whole; default: copies of the base's.
        task: labels of this adapter; default: those of the base.
        batches: batches for initializations that use inputs or gradients.
        original: name of a layer -> its weight in the checkpoint, for initializations that need it.

    Raises:
        TargetError, StateError, ConfigError: see `apply_lora`.
    """
    _check_name(name)
    state = state_of(model)
    _check_model(model, state, name, call)
    if plan is None:
        plan = resolve(model, config, call, allow_bypassed, from_file)
        config = informed(model, plan, config, batches, original, call)
    first = state is None
    state = state or _first(model)
    active = state.activity.active
    named_by_user = config.target_modules not in PRESETS and not from_file
    record = AdapterRecord(
        config, task or state.base_task, plan.saved, plan.skipped, plan.notes, named_by_user, trainable
    )
    try:
        with gc_paused():
            places = places_of(model) if plan.saved or plan.others else {}
            for part, planned in _planned(model, plan, name, heads or {}):
                instead = part.attach(state.activity, planned)
                if instead is not None:
                    put(model, part.path, instead, places)
        state.adapters[name] = record
        if trainable:
            keep_differentiable(module for _, module in original_modules(model))
        else:
            update_requires_grad(model, state, [name])
        set_active(model, state, (name,))
    except BaseException:  # out of memory, a failed initialization, an interrupt: all or nothing
        _take_back(model, state, name, active)
        if first:
            eject(model)
        raise
    return plan


def delete(model: nn.Module, name: str) -> None:
    """Remove one adapter. If no other adapter is active then, the last remaining one becomes active.

    Raises:
        StateError: the adapter does not exist, or the model is merged.
    """
    state = require_state(model, "delete_adapter")
    state.require(name)
    state.refuse_merged("delete_adapter")
    _remove(model, parts(model, name))
    del state.adapters[name]
    remaining = tuple(n for n in state.activity.active if n != name)
    if not remaining and name in state.activity.active and state.adapters:
        remaining = (next(reversed(state.adapters)),)
    set_active(model, state, remaining)


def drop_layers(model: nn.Module, name: str, paths: set[str], reason: str) -> None:
    """Remove adapter `name` from some layers, and list them as skipped."""
    state = require_state(model, "drop_layers")
    for part in list(parts(model, name)):
        if part.name in paths and not part.replaces:
            part.remove()
            state.adapters[name].skipped[part.name] = reason


def eject(model: nn.Module, keep_heads: bool = False) -> nn.Module:
    """Remove every adapter, restore the class of each layer and the original `requires_grad`.

    Args:
        keep_heads: keep the active adapter's heads in place of the base's (after a merge).
    """
    state = require_state(model, "unload")
    owned = list(parts(model))
    active = state.activity.active if keep_heads and state.activity.enabled else ()
    swapped = {f"{part.path}." for part in owned if part.whole_module and part.adapter in active}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    _remove(model, owned, active)
    if any(key.startswith(p) != source.startswith(p) for p in swapped for key, source in ties.items()):
        untie_all(model)  # the copy is not tied as its original was
    state.activity.set(merged=())
    state.originals.clear()
    end_differentiable(module for _, module in original_modules(model))
    for name in state.borrowed:
        model.__dict__.pop(name, None)
    delattr(model, ATTRIBUTE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.required_grad.get(name, True))
    return model


def _planned(
    model: nn.Module, plan: Explanation, name: str, heads: dict[str, nn.Module]
) -> Iterator[tuple[Part, object]]:
    """Every part of a plan, unattached, with its own plan. Each module is looked up only when its part is needed,
    because an earlier part may have replaced it."""
    for target in plan.layers:
        yield Factors(target.path, target.module, name, target.site), target
    for path in plan.saved:
        yield Copy(path, placed(model, path), name), heads.get(path)
    readers_of_bias = bias_readers(model) if plan.biases else {}
    for path in plan.biases:
        readers = [(module_at(model, reader), below) for reader, below in readers_of_bias.get(path, ())]
        yield Bias(path, module_at(model, path), name), readers
    for planned in plan.others:
        yield planned.kind(planned.path, module_at(model, planned.path), name), planned


def _take_back(model: nn.Module, state: LoraState, name: str, active: tuple[str, ...]) -> None:
    """Undo an interrupted injection; `active` are the adapters that were active before it."""
    _remove(model, parts(model, name))
    for _, module in list(original_modules(model)):
        remove_all(module, name)
    state.adapters.pop(name, None)
    state.activity.set(active=active)
    update_requires_grad(model, state, state.adapters)


def _remove(model: nn.Module, owned: Iterable[Part], keep: Sequence[str] = ()) -> None:
    """Remove parts; those of the adapters `keep` that replace modules stay in their place."""
    owned = list(owned)
    places = places_of(model) if any(part.whole_module for part in owned) else None
    for part in owned:
        instead = part.remove(keep=part.adapter in keep)
        if instead is not None:
            put(model, part.path, instead, places)


def _check_name(name: object) -> None:
    text = name if isinstance(name, str) and name.isprintable() else ""
    too_long = len(text.encode()) > LONGEST_NAME
    if too_long or not re.fullmatch(r"[^.\s/\\]+", text) or hasattr(nn.ModuleDict(), text):
        raise ConfigError(
            f"{str(name)[:LONGEST_NAME]!r} is not a valid adapter name: it must not contain a dot, slash, white space "
            f"or control character, be longer than {LONGEST_NAME} bytes, or be the name of a method of "
            "torch.nn.ModuleDict. Choose another, such as 'default'."
        )


def _check_model(model: nn.Module, state: LoraState | None, name: str, call: str) -> None:
    faults = Faults(call)
    step = ""
    engine = how_sharded(module for _, module in original_modules(model))
    if engine is not None:
        raise StateError(
            f"{call}: {type(model).__name__} is already sharded ({engine}), but the new factors would not be. "
            f"{_BEFORE_SHARDING[engine]}"
        )
    if state is not None:
        if name in state.adapters:
            raise StateError(
                f"{call}: the model already has an adapter {name!r}. To start again (a notebook cell run twice), call "
                f"model.unload() first; to add another, give it another name; to load weights into this one, use "
                "load_adapter_weights."
            )
        state.refuse_merged(call)
        return
    if "_orig_mod" in model._modules:
        raise StateError(
            f"{call}: the model is compiled. Call apply_lora before torch.compile, or on model._orig_mod, and "
            "compile the result."
        )
    for path, module in original_modules(model):
        kind = type(module)
        if any(c.__module__.startswith("peft.tuners") for c in kind.__mro__):
            faults.add(f"{path or type(model).__name__} is a PEFT layer ({kind.__module__}.{kind.__name__})")
            step = (
                "Save that adapter with PEFT (peft_model.save_pretrained(folder)), remove PEFT "
                "(base = peft_model.unload()), and load it: LoraModel.from_pretrained(folder, base_model=base)."
            )
            break
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            faults.add(f"{path or type(model).__name__} is wrapped for data parallelism")
            step = "Apply LoRA to the inner model (its .module) and wrap it again."
            break
        if path and state_of(module) is not None:
            faults.add(f"{path} already has adapters")
            step = f"Call unload() on {path}, then apply LoRA to the whole model."
            break
    if not faults.found:
        shared = [path for path, module in model.named_modules() if isinstance(module, (Host, Replacement))]
        if shared:
            faults.add(f"{listed(shared)} have adapters of another model, of which they are a part too")
            step = (
                "Layers that two models share have the adapters of one of them. Apply LoRA to one model that contains "
                "both, call unload() on the other model first, or give this one a copy of the layers (copy.deepcopy)."
            )
    faults.check(StateError, step)


_BEFORE_SHARDING = {
    "FSDP1": "Call apply_lora before FullyShardedDataParallel, or better, use fully_shard and call it before that.",
    "FSDP2": "Call apply_lora before fully_shard.",
    "ZeRO-3": "Call apply_lora before deepspeed.initialize or accelerator.prepare.",
    "DTensor": "Load the model whole, without tp_plan and distributed_config; then call apply_lora and shard it with "
    "FSDP2 or ZeRO-3. Tensor parallelism is not supported yet.",
}


def _first(model: nn.Module) -> LoraState:
    parameters = dict(model.named_parameters())
    state = LoraState(
        required_grad={n: p.requires_grad for n, p in parameters.items()},
        base_task=Task.of(model),
        vocabulary=checkpoint_vocabulary(model),
        new_modules=new_modules(model),
        random_base=is_random(model),
        has_batchnorm=any(isinstance(m, _BatchNorm) for _, m in original_modules(model)),
    )
    setattr(model, ATTRIBUTE, state)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return state


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
