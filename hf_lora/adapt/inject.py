"""Add adapters to a model and remove them: free functions over any `nn.Module`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import PRESETS, LoraConfig, as_tuple
from ..errors import ConfigError, Faults, StateError, listed
from ..layers.distributed import how_sharded
from ..layers.parts import Bias, Copy, Factors, Part
from ..layers.storages import end_differentiable, keep_differentiable
from ..safe_io.reading import is_one_line
from .activation import set_active, switch, update_requires_grad
from .bypass import bias_readers
from .embeddings import checkpoint_vocabulary
from .heads import has_outputs, is_random, new_modules
from .inner import end_models
from .state import AdapterRecord, LoraState, Task, base_task, require_state, state_of
from .statistics import informed
from .targets import Explanation, resolve
from .ties import has_broken_ties, part_embeddings, tie_copies, untie_all
from .undo import all_or_nothing, gc_paused
from .walk import ATTRIBUTE, module_at, of_other_models, original_modules, parts, placed, places_of, put

LONGEST_NAME = 200
"""Bytes of an adapter's name in UTF-8: it is the name of a folder too."""


@gc_paused()
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
    then: Callable[[LoraState], object] | None = None,
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
        then: called at the end; if it fails, the model is as it was before.

    Raises:
        TargetError, StateError, ConfigError: see `apply_lora`.
    """
    _check_name(name)
    state = state_of(model)
    _check_model(model, state, name, call)
    if plan is None:
        plan = resolve(model, config, call, allow_bypassed, from_file)
        with nullcontext() if batches is None else all_or_nothing(model):
            config = informed(model, plan, config, batches, original, call)
    named_by_user = config.target_modules not in PRESETS and not from_file
    with all_or_nothing(model, state.activity.active if state is not None else ()):
        state = state or _first(model)
        record = AdapterRecord(config, state.base_task, plan.saved, plan.skipped, plan.notes, named_by_user, trainable)
        if plan.saved or task is not None:
            record.task = task or replace(base_task(model))
            own = ((heads or {}).get(path) or module_at(model, path) for path in plan.saved)
            record.has_labels = bool(heads) or any(has_outputs(head, record.task.num_labels) for head in own)
        places = places_of(model) if plan.saved or plan.others else {}
        for part, planned in _planned(model, plan, name, heads or {}):
            instead = part.attach(state.activity, planned)
            if instead is not None:
                put(model, part.path, instead, places)
        tie_copies(model, plan.tied, name)
        state.adapters[name] = record
        if trainable:
            keep_differentiable(module for _, module in original_modules(model))
        else:
            update_requires_grad(model, state, [name])
        set_active(model, state, (name,))
        if then is not None:
            then(state)
    return plan


def reinitialize(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    *,
    batches: Iterable[object] | None = None,
    original: Callable[[str], Tensor] | None = None,
    from_file: bool = False,
    call: str = "reinitialize",
) -> None:
    """Replace the factors of adapter `name` by new ones according to `config`. Its other parts stay as they are.

    Args:
        batches: for initializations that look at some. Without them, the values of the factors follow from a file.
        from_file: `config` is that of a file, whose tensors decide.
    """
    state = require_state(model, call)
    record = state.adapters[name]
    with all_or_nothing(model, state.activity.active), gc_paused():
        for part in [part for part in parts(model, name) if isinstance(part, Factors)]:
            part.remove()
        saved = dict(record.heads)
        plan = resolve(model, config, call, allow_bypassed=True, from_file=from_file, saved=saved)
        if batches is not None:
            config = informed(model, plan, config, batches, original, call)
        for target in plan.layers:
            Factors(target.path, target.module, name, target.site).attach(state.activity, target)
        record.config, record.skipped, record.notes = config, plan.skipped, plan.notes
        if not record.trainable:
            update_requires_grad(model, state, [name])


def delete(model: nn.Module, names: str | Sequence[str]) -> None:
    """Remove adapters. If no other adapter is active then, the last remaining one becomes active.

    Raises:
        StateError: an adapter does not exist, or the model is merged.
    """
    state = require_state(model, "delete_adapter")
    wanted = as_tuple(names)
    for name in wanted:
        state.require(name)
    state.refuse_merged("delete_adapter")
    remaining = tuple(n for n in state.activity.active if n not in wanted)
    if not remaining and state.activity.active:
        remaining = tuple(n for n in state.adapters if n not in wanted)[-1:]
    with all_or_nothing(model):
        set_active(model, state, remaining)
        for name in dict.fromkeys(wanted):
            _remove(model, parts(model, name))
            del state.adapters[name]


def drop_layers(model: nn.Module, name: str, paths: set[str], reason: str) -> None:
    """Remove adapter `name` from some layers, and list them as skipped."""
    state = require_state(model, "drop_layers")
    with all_or_nothing(model):
        for part in list(parts(model, name)):
            if part.name in paths and not part.replaces:
                part.remove()
                state.adapters[name].skipped[part.name] = reason


@gc_paused()
def eject(model: nn.Module, keep_heads: bool = False) -> nn.Module:
    """Remove every adapter, restore the class of each layer and the original `requires_grad`.

    Args:
        keep_heads: keep the active adapter's heads in place of the base's (after a merge).
    """
    state = require_state(model, "unload")
    refuse_shared(model, "unload")
    with all_or_nothing(model):
        owned = list(parts(model))
        active = state.activity.active if keep_heads and state.activity.enabled else ()
        swapped = any(part.whole_module and part.adapter in active for part in owned)
        if not active:
            switch(model, state, active=())
        _remove(model, owned, active)
        broken = swapped and has_broken_ties(model)
        if broken:
            untie_all(model)  # a copy is not tied as its original was
        if broken or (state.ties is not None and state.ties.keys is not None):
            part_embeddings(model)
        state.activity.set(merged=())
        end_differentiable(module for _, module in original_modules(model))
        for name in state.borrowed:
            model.__dict__.pop(name, None)
        end_models(model)
        delattr(model, ATTRIBUTE)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(state.required_grad.get(name, parameter.requires_grad))
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


def _remove(model: nn.Module, owned: Iterable[Part], keep: Sequence[str] = ()) -> None:
    """Remove parts; those of the adapters `keep` that replace modules stay in their place."""
    owned = list(owned)
    places = places_of(model) if any(part.whole_module for part in owned) else None
    for part in owned:
        instead = part.remove(keep=part.adapter in keep)
        if instead is not None:
            put(model, part.path, instead, places)


def _check_name(name: object) -> None:
    text = name if isinstance(name, str) and is_one_line(name) else ""
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
        refuse_shared(model, call)
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
                "Load the adapter with LoraModel.from_pretrained(adapter) instead; in a script that loads the model "
                "itself, name the base as the model and the adapter as lora_adapter (--lora_adapter)."
                if getattr(model, "_hf_peft_config_loaded", False)  # transformers loaded it
                else "Save that adapter with PEFT (peft_model.save_pretrained(folder)), remove PEFT "
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
    faults.check(StateError, step)
    refuse_shared(model, call)


def refuse_shared(model: nn.Module, call: str) -> None:
    """Refuse a model of which some layers have adapters of another model.

    Raises:
        StateError: lists the layers.
    """
    shared = of_other_models(model)
    if shared:
        raise StateError(
            f"{call}: {listed(shared)} have adapters of another model, of which they are a part too. Call unload() on "
            "that model first, or apply LoRA to one model that contains both. A copy (copy.deepcopy) of layers with "
            "adapters has them too: copy the layers before LoRA is applied to them."
        )


_BEFORE_SHARDING = {
    "FSDP1": "Call apply_lora before FullyShardedDataParallel, or better, use fully_shard and call it before that.",
    "FSDP2": "Call apply_lora before fully_shard.",
    "ZeRO-3": "Call apply_lora before deepspeed.initialize or accelerator.prepare.",
    "DTensor": "Load the model whole, without tp_plan and distributed_config; then call apply_lora and shard it with "
    "FSDP2 or ZeRO-3. Tensor parallelism is not supported yet.",
}


def _first(model: nn.Module) -> LoraState:
    parameters = dict(model.named_parameters(remove_duplicate=False))
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
