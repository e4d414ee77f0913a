"""Save an adapter of a model to a folder, and load one into a model: everything checked before anything is changed."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapt.embeddings import input_embedding, output_embedding, vocabulary_of
from ..adapt.inject import inject
from ..adapt.labels import new_head, task_type_of, twin
from ..adapt.match import matcher
from ..adapt.state import Task, base_task, require_state, state_of
from ..adapt.targets import Explanation, resolve, scalings
from ..adapt.walk import adapted_modules, adapter_layers, module_at, original_modules, parts
from ..config import PRESETS, LoraConfig
from ..errors import AdapterFileError, BaseMismatchError, Faults, TargetError
from ..layers.class_swap import plain
from ..layers.distributed import is_sharded, whole_shape
from ..layers.inits import Init, find_init
from ..layers.ops import used_devices
from ..layers.parts import bias_key
from .format import (
    FULL_MODEL_FILES,
    AdapterFile,
    compare,
    compare_kinds,
    key_of,
    read_adapter,
    stored,
    write_adapter,
)
from .identity import differs, identify


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """File key -> tensor of one adapter, not copied where its layout on disk is that in memory."""
    require_state(model, "get_adapter_state_dict").require(name)
    return {key: each.value() for key, each in stored(parts(model, name)).items()}


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write one adapter in PEFT's format, with `hf_lora.json` beside it.

    Args:
        state_dict: gathered tensors, by the names of `model.state_dict()`, to write in place of the model's own.
        allow_nonfinite: write NaN and infinity too, to look at them later.

    Raises:
        AdapterFileError: a tensor is sharded, empty or not finite, or no space is left. Files that were there are
            unchanged.
    """
    state = require_state(model, "save_adapter")
    state.require(name)
    gathered = {id(p): state_dict[n] for n, p in model.named_parameters() if n in state_dict} if state_dict else {}
    tensors = {key: each.value(gathered) for key, each in stored(parts(model, name)).items()}
    if any(is_sharded(tensor) for tensor in tensors.values()):
        raise AdapterFileError(
            f"save_adapter({str(folder)!r}, {name!r}): each process holds a part of the adapter. Call, on "
            "every one, state = gathered_state(model); then model.save_pretrained(folder, state_dict=state, "
            "is_main_process=…)."
        )
    beside = [f for f in FULL_MODEL_FILES if (Path(folder) / f).exists()]
    if beside:
        warnings.warn(
            f"{folder} holds {', '.join(beside)}, so other loaders will take it for a full model and overlook the "
            "adapter. Save adapters to a folder of their own.",
            stacklevel=3,
        )
    return write_adapter(folder, config_on_disk(model, name), tensors, extras_of(model, name), allow_nonfinite)


def config_on_disk(model: nn.Module, name: str) -> dict[str, Any]:
    """adapter_config.json of one adapter, such that PEFT finds the same layers."""
    state = require_state(model, "save_adapter")
    record = state.adapters[name]
    config = record.config
    values = config.to_dict()
    adapted = adapted_modules(model, name)
    everything = [path for path, _ in original_modules(model) if path]
    values["modules_to_save"] = list(record.heads) or None
    if config.target_modules in PRESETS or not _finds(config, everything, adapted, list(record.heads)):
        values |= {
            "target_modules": shortest_names(adapted, everything),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    values["fan_in_fan_out"] = any(layer._lora.shape.fan_in_fan_out for layer in adapter_layers(model).values())
    init, _ = cast(tuple[Init, str], find_init(config.init_lora_weights))
    if init.takes_out and not init.repeatable:
        values |= _twice_the_ranks(values, config.use_rslora)
    if init.in_files is not None:
        values["init_lora_weights"] = init.in_files
    values["base_model_name_or_path"] = config.base_model_name_or_path or state.identity.get("name")
    values["task_type"] = config.task_type or task_type_of(model)
    if values["task_type"] is None:
        cls = plain(type(model))
        values["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return values


def _twice_the_ranks(values: Mapping[str, Any], rslora: bool) -> dict[str, Any]:
    """A configuration under which factors with as many ranks again have the scaling that they had without."""
    more = math.sqrt(2) if rslora else 2
    return {
        "r": 2 * values["r"],
        "lora_alpha": more * values["lora_alpha"],
        "rank_pattern": {pattern: 2 * r for pattern, r in values["rank_pattern"].items()},
        "alpha_pattern": {pattern: more * alpha for pattern, alpha in values["alpha_pattern"].items()},
    }


def shortest_names(adapted: set[str], everything: list[str]) -> list[str]:
    """Names that match `adapted` and nothing else: a last component where all modules of that name are adapted."""
    last = {path.rpartition(".")[2] for path in adapted}
    others = {path.rpartition(".")[2] for path in everything if path not in adapted}
    clear = last - others
    return sorted(clear) + sorted(path for path in adapted if path.rpartition(".")[2] not in clear)


def extras_of(model: Any, name: str) -> dict[str, Any]:
    """hf_lora.json of one adapter."""
    import transformers

    from .. import __version__

    state = require_state(model, "save_adapter")
    task = state.adapters[name].task
    return {
        "base": state.identity,
        "architecture": plain(type(model)).__name__,
        "num_labels": task.num_labels,
        "id2label": {str(k): _label(v) for k, v in task.id2label.items()} if task.id2label else None,
        "problem_type": task.problem_type,
        "vocabulary": vocabulary_of(model),
        "versions": {"hf_lora": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _label(value: Any) -> Any:
    """A label as JSON can hold it: tables give NaN, where a row has none."""
    is_whole = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return str(value).encode("utf-8", "replace").decode() if isinstance(value, str) or not is_whole else value


def load_adapter(
    model: nn.Module,
    source: str | os.PathLike[str] | AdapterFile,
    name: str = "default",
    *,
    is_trainable: bool = False,
    allow_other_base: bool = False,
    call: str = "load_adapter",
) -> Explanation:
    """Add an adapter from a folder to a model, and make it the active one.

    Raises:
        AdapterFileError: lists every tensor that is missing, misshapen, not finite, or that nothing takes.
        BaseMismatchError: the adapter belongs to another base (`allow_other_base=True` loads it all the same).
    """
    file = source if isinstance(source, AdapterFile) else read_adapter(source)
    call = f"{call}({str(file.path)!r}, {name!r})"
    state = state_of(model)
    identity = state.identity if state is not None else identify(model)
    difference = differs(file.extras.get("base") or {}, identity)
    if difference and not allow_other_base:
        raise BaseMismatchError(
            f"{call}: {difference}. Load the base that the adapter was trained on, or pass allow_other_base=True."
        )
    try:
        plan = resolve(model, file.config, call, from_file=True)
    except TargetError as error:
        raise AdapterFileError(str(error)) from error
    task = _task_in(file, model)
    expected = {
        key_of(path, spec.key): spec.shape_on_disk
        for path, specs in plan.declared()
        for spec in specs.values()
        if spec.key is not None
    }
    adapted = {t.path for t in plan.layers}
    expected |= {_bias_key(path, adapted, file.tensors): _bias_shape(module_at(model, path)) for path in plan.biases}
    plan.saved |= _whole_embeddings(model, file)
    plan.saved = {p: w for p, w in plan.saved.items() if any(_holds(key, p) for key in file.tensors)}
    task = task or _task_by_shape(model, plan, file)
    other = _twin_of(model, plan, task)
    copies: dict[str, Tensor] = {}
    for path in plan.saved:
        head = module_at(model, path) if other is None else other.get_submodule(path)
        copies |= {key_of(path, k): v for k, v in head.state_dict().items() if "lora_" not in k}
    expected |= {key: tuple(tensor.shape) for key, tensor in copies.items()}
    _check_base_copies(model, file, allow_other_base, call)
    faults = Faults(call)
    compare(expected, file.tensors, faults)
    compare_kinds(copies, file.tensors, faults)
    faults.check(AdapterFileError, "Nothing was changed. Check that the adapter and the model belong together.")
    heads = _heads(model, plan, other)
    inject(
        model, file.config, name, trainable=is_trainable, from_file=True, plan=plan, heads=heads, task=task, call=call
    )
    require_state(model, call).identity = identity
    assign(model, name, file.tensors)
    return plan


def load_adapter_weights(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor], name: str = "default"
) -> None:
    """Put saved values into an adapter that the model holds already, exactly.

    Args:
        source: an adapter's folder, or tensors by file key.

    Raises:
        AdapterFileError: lists every tensor that is missing, misshapen, not finite, or that nothing takes, and layers
            in which the values would act with another factor than they were trained with.
        BaseMismatchError: the folder's adapter belongs to another base.
    """
    path = "tensors" if isinstance(source, Mapping) else str(source)
    state = require_state(model, "load_adapter_weights")
    state.refuse_merged("load_adapter_weights")
    call = f"load_adapter_weights({path!r}, {name!r})"
    faults = Faults(call)
    if isinstance(source, Mapping):
        tensors = source
    else:
        state.require(name)
        file = read_adapter(source)
        tensors = file.tensors
        difference = differs(file.extras.get("base") or {}, state.identity)
        if difference:
            raise BaseMismatchError(
                f"{call}: {difference}. Nothing was changed. Load the base that the adapter was trained on; "
                "load_adapter(…, allow_other_base=True) takes an adapter onto another one."
            )
        _compare_scalings(state.adapters[name].config, file.config, adapter_layers(model), name, faults)
    own = stored(parts(model, name))
    aliases = [_alias(key, own) for key in tensors]
    if len(set(aliases)) < len(aliases):
        faults.add("a bias is in the file under two names")
    tensors = dict(zip(aliases, tensors.values(), strict=True))
    compare({key: each.shape for key, each in own.items()}, tensors, faults)
    compare_kinds({key: each.members[0][1] for key, each in own.items()}, tensors, faults)
    faults.check(AdapterFileError, "Nothing was changed.")
    assign(model, name, tensors)


def _compare_scalings(
    own: LoraConfig, saved: LoraConfig, layers: Mapping[str, Any], name: str, faults: Faults
) -> None:
    """Add a fault for the layers where the file's configuration has another factor in front of B A."""
    found: dict[tuple[float, float], list[str]] = {}
    of_file, of_model = scalings(saved), scalings(own)
    for path in (path for path, layer in layers.items() if name in layer._lora.names):
        pair = of_file(path), of_model(path)
        if not math.isclose(*pair, rel_tol=1e-9):
            found.setdefault(pair, []).append(path)
    for (then, now), paths in found.items():
        faults.add(
            f"scaling: alpha over rank is {then:g} in the file and {now:g} in the model, for {len(paths)} layers such "
            f"as {paths[0]}"
        )


@torch.no_grad()
def assign(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors by file key into an adapter; they were compared before."""
    own = stored(parts(model, name))
    for key, tensor in tensors.items():
        own[_alias(key, own)].put(tensor)


def _finds(config: LoraConfig, everything: list[str], adapted: set[str], heads: list[str]) -> bool:
    """Whether PEFT's matching of a named configuration gives exactly the adapted layers."""
    if config.exclude_modules or config.layers_to_transform is not None:
        return False
    inside = tuple(f"{head}." for head in heads)
    hits = matcher(config.target_modules)
    found = {p for p in everything if hits(p) and not f"{p}.".startswith(inside)}
    return found == adapted


def _whole_embeddings(model: Any, file: AdapterFile) -> dict[str, str]:
    """Embeddings that a foreign file holds whole though its config names none: PEFT writes a resized vocabulary so."""
    if file.extras:
        return {}
    ends = {id(m) for m in (input_embedding(model), output_embedding(model)) if m is not None}
    named = [path for path, m in original_modules(model) if id(m) in ends]
    return {p: "the file holds it whole" for p in named if key_of(p, "weight") in file.tensors}


def _check_base_copies(model: nn.Module, file: AdapterFile, allow_other_base: bool, call: str) -> None:
    """A copy of a base weight in a foreign file says which base it is, up to the rounding of a 16-bit copy."""
    faults = Faults(call)
    modules = dict(original_modules(model)) if file.base_copies else {}
    for path, copied in file.base_copies.items():
        weight = modules[path]._parameters.get("weight") if path in modules else None
        if weight is None or weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            continue
        if is_sharded(weight):
            continue
        if weight.shape != copied.shape:
            faults.add(f"{path}: the file's base has a weight {list(copied.shape)}, this one {list(weight.shape)}")
        elif not torch.allclose(weight.detach().cpu().float(), copied.float(), rtol=2**-7, atol=1e-6):
            faults.add(f"{path}: the file holds other base weights for it than this model does")
    if not allow_other_base:
        faults.check(
            BaseMismatchError, "Load the base that the adapter was trained on, or pass allow_other_base=True."
        )


def _alias(key: str, own: Mapping[str, Any]) -> str:
    """A bias of an adapted layer may be written with or without `base_layer`."""
    if key in own:
        return key
    other = (
        key.replace(".base_layer.bias", ".bias") if ".base_layer." in key else key.replace(".bias", ".base_layer.bias")
    )
    return other if other in own else key


def _bias_key(path: str, adapted: set[str], tensors: Mapping[str, Tensor]) -> str:
    keys = [key_of(path, bias_key(a)) for a in (path in adapted, path not in adapted)]
    return next((key for key in keys if key in tensors), keys[0])


def _bias_shape(module: Any) -> tuple[int, ...]:
    return whole_shape(module.bias)


def _holds(key: str, path: str) -> bool:
    return key.startswith(key_of(path, ""))


def _task_in(file: AdapterFile, model: nn.Module) -> Task | None:
    extras = file.extras
    if extras.get("id2label"):
        id2label = {int(k): v for k, v in extras["id2label"].items()}
        return Task(len(id2label), id2label, {v: k for k, v in id2label.items()}, extras.get("problem_type"))
    return None


def _twin_of(model: Any, plan: Explanation, task: Task | None) -> Any:
    """A model without memory, for an adapter with another number of labels than the model's; None for any other."""
    labels = task.num_labels if task is not None else None
    present = base_task(model).num_labels
    if not plan.saved or labels is None or labels == present or getattr(model, "config", None) is None:
        return None
    return twin(model, labels)


def _heads(model: Any, plan: Explanation, other: Any) -> dict[str, nn.Module]:
    """New heads as the twin has them; the tensors fill them."""
    if other is None:
        return {}
    with torch.random.fork_rng(devices=used_devices()):
        return {path: new_head(other, path, module_at(model, path)) for path in plan.saved}


def _task_by_shape(model: nn.Module, plan: Explanation, file: AdapterFile) -> Task | None:
    """The labels of a foreign file, without names, where they are not the model's."""
    labels = _labels_by_shape(model, plan, file)
    return Task.from_labels(labels, None) if labels is not None else None


def _labels_by_shape(model: nn.Module, plan: Explanation, file: AdapterFile) -> int | None:
    """The label count of a foreign file, where it is not the model's: how many outputs its head has."""
    present = base_task(model).num_labels
    for path in plan.saved:
        for key, own in module_at(model, path).state_dict().items():
            held = file.tensors.get(key_of(path, key))
            if held is None or not own.dim() or held.shape == own.shape or own.shape[0] != present:
                continue
            if held.shape[1:] == own.shape[1:]:
                return int(held.shape[0])
    return None
