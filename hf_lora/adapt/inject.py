"""Put adapters into a model and take them out: free functions over any `nn.Module`."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import PRESETS, LoraConfig
from ..errors import ConfigError, Faults, StateError
from ..layers.distributed import how_sharded
from ..layers.hosts import remove_all
from ..layers.parts import Bias, Copy, Factors, Part
from ..layers.storages import end_differentiable, keep_differentiable
from .embeddings import checkpoint_vocabulary
from .heads import is_random
from .state import ATTRIBUTE, AdapterRecord, LoraState, Task, require_state, set_active, state_of, update_requires_grad
from .statistics import informed
from .targets import Explanation, resolve
from .ties import untie_all
from .walk import module_at, original_modules, parts, placed, put


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
    batches: Iterable[Any] | None = None,
    original: Callable[[str], Tensor] | None = None,
    call: str = "apply_lora(model, config)",
) -> Explanation:
    """Add adapter `name` to `model` in place and make it the active one.

    The base is frozen (what required gradients before is recorded). All is checked before anything is changed.

    Args:
        plan: what `config` comes to, where it is known; the caller then fills the factors, which hold no values yet.
        heads: original name -> module to keep for this adapter in place of a copy of the base's.
        task: labels of this adapter; the base's where not given.
        batches: what an initialization that looks at inputs or gradients runs the model on.
        original: name of a layer -> its weight as the checkpoint has it, for an initialization that asks for it.

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
            for part, planned in _planned(model, plan, name, heads or {}):
                instead = part.attach(state.activity, planned)
                if instead is not None:
                    put(model, part.path, instead)
        state.adapters[name] = record
        if trainable:
            keep_differentiable(module for _, module in original_modules(model))
        else:
            update_requires_grad(model, state, [name])
        set_active(model, state, (name,))
    except BaseException:  # no memory, a value that cannot be made, an impatient user: all or nothing
        _take_back(model, state, name, active)
        if first:
            eject(model)
        raise
    return plan


def delete(model: nn.Module, name: str) -> None:
    """Remove one adapter; the last one that remains takes over where it was active, else none.

    Raises:
        StateError: the adapter is not there, or the model is merged.
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
    """Take adapter `name` off some layers, and list them as left out."""
    state = require_state(model, "drop_layers")
    for part in list(parts(model, name)):
        if part.name in paths and not part.replaces:
            part.remove()
            state.adapters[name].skipped[part.name] = reason


def eject(model: nn.Module, keep_heads: bool = False) -> nn.Module:
    """Remove every adapter, give each layer its class back, and restore the `requires_grad` found at the start.

    Args:
        keep_heads: leave the active adapter's heads in place of the base's (after a merge).
    """
    state = require_state(model, "unload")
    owned = list(parts(model))
    active = state.activity.active if keep_heads and state.activity.enabled else ()
    swapped = {f"{part.path}." for part in owned if part.whole_module and part.adapter in active}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    _remove(model, owned, active)
    if any(key.startswith(p) != source.startswith(p) for p in swapped for key, source in ties.items()):
        untie_all(model)  # the copy is no longer what its original was tied to
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
) -> Iterator[tuple[Part, Any]]:
    """Every part of a plan, unattached, with what its kind planned. A module is looked up when its part's turn comes:
    one before it may have taken its place."""
    for target in plan.layers:
        yield Factors(target.path, target.module, name, target.site), target
    for path in plan.saved:
        yield Copy(path, placed(model, path), name), heads.get(path)
    for path in plan.biases:
        yield Bias(path, module_at(model, path), name), None
    for planned in plan.others:
        yield planned.kind(planned.path, module_at(model, planned.path), name), planned


def _take_back(model: nn.Module, state: LoraState, name: str, active: tuple[str, ...]) -> None:
    """Undo an injection that was cut off, wherever that was; `active` were the adapters before it."""
    _remove(model, parts(model, name))
    for _, module in list(original_modules(model)):
        remove_all(module, name)
    state.adapters.pop(name, None)
    state.activity.set(active=active)
    update_requires_grad(model, state, state.adapters)


def _remove(model: nn.Module, owned: Iterable[Part], keep: Sequence[str] = ()) -> None:
    """Take parts off; what `replaces` modules for the adapters `keep` stays in their place."""
    for part in list(owned):
        instead = part.remove(keep=part.adapter in keep)
        if instead is not None:
            put(model, part.path, instead)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[^.\s/\\]+", name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: a name has no dot, slash or white space and is not a method of "
            "torch.nn.ModuleDict. Choose another, such as 'default'."
        )


def _check_model(model: nn.Module, state: LoraState | None, name: str, call: str) -> None:
    faults = Faults(call)
    step = ""
    engine = how_sharded(module for _, module in original_modules(model))
    if engine is not None:
        raise StateError(
            f"{call}: {type(model).__name__} is sharded already ({engine}), so the factors' gradients would not be. "
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
    for path, module in original_modules(model):
        kind = type(module)
        if any(c.__module__.startswith("peft.tuners") for c in kind.__mro__):
            faults.add(f"{path or type(model).__name__} is a PEFT layer ({kind.__module__}.{kind.__name__})")
            step = (
                "Save that adapter with PEFT (peft_model.save_pretrained(folder)), take PEFT off "
                "(base = peft_model.unload()), and load it: LoraModel.from_pretrained(folder, base_model=base)."
            )
            break
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            faults.add(f"{path or type(model).__name__} is wrapped for data parallelism")
            step = "Apply LoRA to the model inside (its .module) and wrap it again."
            break
        if path and state_of(module) is not None:
            faults.add(f"{path} has adapters of its own")
            step = f"Call unload() on {path}, then apply LoRA to the whole model."
            break
    faults.check(StateError, step)


_BEFORE_SHARDING = {
    "FSDP1": "Call apply_lora before FullyShardedDataParallel, or better: before fully_shard.",
    "FSDP2": "Call apply_lora before fully_shard.",
    "ZeRO-3": "Call apply_lora before deepspeed.initialize or accelerator.prepare.",
    "DTensor": "Load the model whole, without tp_plan and distributed_config; then apply_lora, then shard it with "
    "FSDP2 or ZeRO-3. Tensor parallelism is not supported yet.",
}


def _first(model: nn.Module) -> LoraState:
    parameters = dict(model.named_parameters())
    state = LoraState(
        required_grad={n: p.requires_grad for n, p in parameters.items()},
        base_task=Task.of(model),
        vocabulary=checkpoint_vocabulary(model),
        random_base=is_random(model),
        has_batchnorm=any(isinstance(m, _BatchNorm) for _, m in original_modules(model)),
    )
    setattr(model, ATTRIBUTE, state)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return state


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection: an injection makes objects by the ten thousand, all of which stay."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
