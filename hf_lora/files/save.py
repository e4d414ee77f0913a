"""Save the adapters of a model to a folder."""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..adapt.embeddings import input_embedding, output_embedding, vocabulary_of
from ..adapt.gather import offloaded_tensors
from ..adapt.labels import task_type_of
from ..adapt.match import PatternTable, holder
from ..adapt.state import require_state, task_of
from ..adapt.ties import tensor_users
from ..adapt.unsaved import trained_rows, why_unsaved
from ..adapt.walk import (
    adapted_modules,
    adapter_layers,
    module_at,
    module_of,
    original_modules,
    original_state,
    parts,
)
from ..config import OF_INITS, PLAIN_IN_FILES
from ..errors import AdapterFileError, ConfigError, Faults, StateError, listed, nearest
from ..layers.class_swap import unwrap_class
from ..layers.distributed import is_sharded
from ..layers.inits import Init, find_init
from ..layers.parts import Bias, TokenRows
from ..layers.storages import is_packed
from ..pooled.pooling import POOLING
from .base_config import changed_settings
from .foreign import with_biases_of_rows
from .format import (
    CONFIG_NAME,
    EXTRAS_NAME,
    FULL_MODEL_FILES,
    WEIGHTS_NAME,
    stored,
    write_adapter,
)
from .identity import is_absent, renewed
from .joined import Joined, joined_modules, names_in_config, under_called_names
from .keys import key_of
from .names import Written, names_to_write

logger = logging.get_logger(__name__)


def adapter_state_dict(
    model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """File key -> tensor of one adapter, without a copy if the layout in the file is that in memory.

    Args:
        state_dict: gathered tensors, by their names in `model.state_dict()`, in place of the model's.
    """
    require_state(model, "get_adapter_state_dict").require(name)
    gathered = offloaded_tensors(model, name)
    gathered |= {id(p): state_dict[n] for n, p in model.named_parameters() if n in state_dict} if state_dict else {}
    return {key: each.value(gathered) for key, each in stored(parts(model, name)).items()}


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    state_dict: Mapping[str, Tensor] | None = None,
    allow_nonfinite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one adapter in PEFT's format, plus `hf_lora.json`.

    Args:
        state_dict: gathered tensors, by their names in `model.state_dict()`, to write instead of the model's.
        allow_nonfinite: also write NaN and infinity, for inspection.
        dtype: of the tensors in the file, such as bfloat16 for half the size; default: as in memory.

    Raises:
        AdapterFileError: a tensor is sharded, empty or not finite, or the disk is full. Existing files are unchanged.
    """
    own, names = adapter_state_dict(model, name, state_dict), written_names(model, name)
    tensors = _frozen_tensors(model, names.frozen) | _resized_embeddings(model, name) | own
    if any(is_sharded(tensor) for tensor in tensors.values()):
        raise AdapterFileError(
            f"save_adapter({str(folder)!r}, {name!r}): each process holds a part of the adapter. On every process, "
            "call state = gathered_state(model), then model.save_pretrained(folder, state_dict=state, "
            "is_main_process=…)."
        )
    record = require_state(model, "save_adapter").adapters[name]
    unsaved = why_unsaved(model, record.heads, trained_rows(model, name)) if record.trainable else None
    if unsaved is not None:
        raise AdapterFileError(
            f"save_adapter({str(folder)!r}, {name!r}): {unsaved}. Nothing was written. To keep this model, merge it: "
            "model.merge_and_unload().save_pretrained(folder)."
        )
    if dtype is not None:
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    existing = [f for f in FULL_MODEL_FILES if (Path(folder) / f).exists()]
    if existing:
        warnings.warn(
            f"{folder} contains {', '.join(existing)}, so other libraries will load it as a full model and ignore the "
            "adapter. Save adapters to a separate folder.",
            stacklevel=3,
        )
    rows = _modules_with_rows(model, name)
    joined = joined_modules(model, [part.path for part in parts(model, name) if not isinstance(part, TokenRows)])
    _warn_of_places(model, name, joined)
    config, extras = names_in_config(config_on_disk(model, name, names), joined), extras_of(model, name)
    tensors = with_biases_of_rows(under_called_names(tensors, joined), rows)
    return write_adapter(folder, config, tensors, extras | {"joined": joined}, allow_nonfinite)


def _warn_of_places(model: nn.Module, name: str, joined: Joined) -> None:
    """Warn of modules at which an adapter acts at several places, and in PEFT at one."""
    acting = adapted_modules(model, name).union(require_state(model, "save_adapter").adapters[name].heads)
    if alone := [first for first, called in joined.items() if called == [first] and first in acting]:
        warnings.warn(
            f"PEFT uses this adapter in part: the model has {listed(alone)} at several places, and PEFT adapts the "
            "first alone. hf_lora uses all of it. For PEFT, merge the adapter.",
            stacklevel=4,
        )


def _modules_with_rows(model: nn.Module, name: str) -> list[str]:
    """The modules with rows of tokens. Warns of those that PEFT cannot load."""
    rows = {part.path: part for part in parts(model, name) if isinstance(part, TokenRows)}
    heads, users = require_state(model, "save_adapter").adapters[name].heads, tensor_users(model)
    shared = {user for part in rows.values() if not part.alone for user in users[id(part.module.weight)]}
    lost = sorted(adapted_modules(model, name) & rows.keys()) + [n for n in sorted(shared) if holder(n, heads)]
    if lost:
        warnings.warn(
            f"PEFT cannot load this adapter: {listed(lost)} would have rows of tokens (trainable_token_indices) and "
            "factors or a copy, which it does not support. hf_lora loads it. For PEFT, train an adapter without these "
            "modules in target_modules and modules_to_save.",
            stacklevel=4,
        )
    elif len(shared) > 1 and not getattr(model, "_tied_weights_keys", None):  # by which PEFT knows what is tied
        warnings.warn(
            f"PEFT uses this adapter in part: {listed(sorted(shared))} have the same rows of tokens, and PEFT knows "
            "of no tie between them in this model. hf_lora uses all of it. For PEFT, merge the adapter.",
            stacklevel=4,
        )
    return list(rows)


def save_adapters(
    model: nn.Module,
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None = None,
    allow_nonfinite: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write every adapter of a model, each to its `adapter_folder`.

    Raises:
        StateError: there is none. Also the errors of `save_adapter`.
    """
    names = list(require_state(model, "save_pretrained").adapters)
    if not names:
        raise StateError(
            "save_pretrained: the model has no adapters. Add one, or save the base with "
            "model.unload().save_pretrained(folder)."
        )
    places = [adapter_folder(model, folder, name) for name in names]
    for name, place in zip(names, places, strict=True):
        save_adapter(model, place, name, state_dict, allow_nonfinite, dtype)
    if Path(folder) not in places:
        _remove_former(Path(folder), places)


def _remove_former(folder: Path, places: Sequence[Path]) -> None:
    """Remove an adapter from a folder whose subfolder has it now: it was the only one when it was saved."""
    config = folder / CONFIG_NAME
    if not config.is_file():
        return
    if config.read_bytes() not in [(place / CONFIG_NAME).read_bytes() for place in places]:
        logger.warning(
            f"{folder} has an adapter of an earlier save beside {', '.join(place.name for place in places)}. "
            f"Remove its {CONFIG_NAME}, {WEIGHTS_NAME} and {EXTRAS_NAME} if it is not needed."
        )
        return
    for name in (CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME):  # without the first it is no adapter
        (folder / name).unlink(missing_ok=True)


def adapter_folder(model: nn.Module, folder: str | os.PathLike[str], name: str) -> Path:
    """Where an adapter of a model is saved: a single one and "default" in the folder itself, others in subfolders."""
    several = len(require_state(model, "save_pretrained").adapters) > 1
    return Path(folder, name) if several and name != "default" else Path(folder)


def config_on_disk(model: nn.Module, name: str, names: Written | None = None) -> dict[str, Any]:
    """The content of adapter_config.json for one adapter, with which PEFT selects the same layers.

    Args:
        names: the result of `written_names`, if the caller has it.
    """
    state = require_state(model, "save_adapter")
    config = state.adapters[name].config
    values = config.to_dict() | (names or written_names(model, name)).fields
    layers = adapter_layers(model)
    adapted = [(path, module_of(path, layer)) for path, layer in layers.items() if name in layer._lora.names]
    for field, own, usual in (("rank_pattern", "r", config.r), ("alpha_pattern", "alpha", config.alpha)):
        held = {path: getattr(layers[path]._lora.adapters[name], own) for path, _ in adapted}
        values[field] = _in_any_order(values[field], adapted, held, usual)
    values["fan_in_fan_out"] = any(layer._lora.shape.fan_in_fan_out for layer in layers.values())
    init, _ = cast(tuple[Init, str], find_init(config.init_lora_weights))
    inits = [layer._lora.adapters[name].init for layer in layers.values() if name in layer._lora.names]
    init = next((each for each in inits if each.takes_out), inits[0] if inits else init)
    if init.takes_out and not init.repeatable:
        values |= _twice_the_ranks(values, config.use_rslora)
    if init.in_files is not None:
        values["init_lora_weights"] = init.in_files
        for field in OF_INITS:
            values.pop(field, None)
    if config.lora_bias and isinstance(values["init_lora_weights"], str):  # PEFT refuses other names beside it
        values["init_lora_weights"] = True
    rows = {part.path: part.ids for part in parts(model, name) if isinstance(part, TokenRows) and part.owns}
    if rows:  # as PEFT reads them: by the names of the modules that own them, each token once
        is_list = isinstance(config.trainable_token_indices, list) and len(rows) == 1
        values["trainable_token_indices"] = next(iter(rows.values())) if is_list else rows
        values.setdefault("ensure_weight_tying", False)
    values["base_model_name_or_path"] = config.base_model_name_or_path or state.identity.get("name")
    if values["task_type"] is None:
        cls = unwrap_class(type(model))
        values["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return values


def written_names(model: nn.Module, name: str) -> Written:
    """The names of modules in the configuration of one adapter."""
    record = require_state(model, "save_adapter").adapters[name]
    task = record.config.task_type or task_type_of(model)
    task = task if _is_called_by_peft(model, task) else None
    return names_to_write(model, record.config, task, adapted_modules(model, name), list(record.heads))


_PASSED_BY_PEFT = {"input_ids", "attention_mask", "inputs_embeds"}
"""Arguments that PEFT's class for a task passes to the model in any case."""


def _is_called_by_peft(model: nn.Module, task_type: str | None) -> bool:
    """Whether PEFT's class for a task can hold the model and call it: models of images take other arguments."""
    needs = "prepare_inputs_for_generation" if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else "config"
    taken = inspect.signature(model.forward).parameters.keys()
    return hasattr(model, needs) and taken >= _PASSED_BY_PEFT


def _frozen_tensors(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    """File key -> tensor of the base, for modules whose tensors PEFT needs though the adapter does not train them."""
    modules = {path: module_at(model, path) for path in paths}
    return {
        key_of(path, key): tensor
        for path, module in modules.items()
        if not any(is_packed(p) or is_absent(p) or is_sharded(p) for p in module.parameters())
        for key, tensor in original_state(module).items()
    }


def _resized_embeddings(model: nn.Module, name: str) -> dict[str, Tensor]:
    """File key -> weight of the base, for adapted embeddings with rows that no checkpoint has; PEFT does so."""
    vocabulary = require_state(model, "save_adapter").vocabulary
    if vocabulary in (None, vocabulary_of(model)):
        return {}
    ends = [module for module in (input_embedding(model), output_embedding(model)) if module is not None]
    adapted = adapted_modules(model, name)
    return {
        key_of(path, "base_layer.weight"): weight
        for path, module in original_modules(model)
        if path in adapted and any(module is end for end in ends)
        if (weight := module._parameters.get("weight")) is not None
        if weight.is_floating_point() and not is_absent(weight) and not is_sharded(weight)
    }


def _in_any_order(
    table: dict[str, Any], names: Sequence[tuple[str, str]], values: Mapping[str, Any], usual: Any
) -> dict[str, Any]:
    """A table that gives `names` (each with its module's) their values, with its keys sorted, as PEFT writes them.

    The first pattern that matches applies, so patterns that overlap need their order: then each layer has an entry.

    Args:
        usual: the value of names that no pattern matches.
    """

    def gives_them(other: dict[str, Any]) -> bool:
        found = PatternTable(dict(sorted(other.items())))
        return all(found.of(name, path, usual) == values[name] for name, path in names)

    full = {name: values[name] for name, _ in names if values[name] != usual}
    tables = (table, full, {f"^{re.escape(name)}": value for name, value in full.items()})
    return dict(sorted(next(each for each in tables if each is tables[-1] or gives_them(each)).items()))


def _twice_the_ranks(values: Mapping[str, Any], rslora: bool) -> dict[str, Any]:
    """The configuration for twice the ranks with the same scaling."""
    more = math.sqrt(2) if rslora else 2
    return {
        "r": 2 * values["r"],
        "lora_alpha": more * values["lora_alpha"],
        "rank_pattern": {pattern: 2 * r for pattern, r in values["rank_pattern"].items()},
        "alpha_pattern": {pattern: more * alpha for pattern, alpha in values["alpha_pattern"].items()},
    }


def extras_of(model: nn.Module, name: str) -> dict[str, Any]:
    """The content of hf_lora.json for one adapter."""
    import transformers

    from .. import __version__

    state, task = require_state(model, "save_adapter"), task_of(model, name)
    config, trained = state.adapters[name].config, state.adapters[name].trained_format
    biases = sum(isinstance(part, Bias) for part in parts(model, name))
    return {
        "base": renewed(state.identity, model),
        "architecture": unwrap_class(type(model)).__name__,
        **({"pooling": pooling} if (pooling := getattr(getattr(model, "config", None), POOLING, None)) else {}),
        "num_labels": task.num_labels,
        "id2label": {str(k): _label(v) for k, v in task.id2label.items()} if task.id2label else None,
        "problem_type": task.problem_type,
        "task_type": config.task_type or task_type_of(model),
        "vocabulary": vocabulary_of(model),
        **({"biases": biases} if biases else {}),
        **({"training_format": trained.to_json()} if trained is not None else {}),
        **({"method": config.method} if config.method in PLAIN_IN_FILES else {}),
        **changed_settings(model, state.settings),
        "versions": {"hf_lora": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _label(value: object) -> object:
    """A label as a JSON value; tables have NaN where a label is missing."""
    is_json = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return str(value).encode("utf-8", "replace").decode() if isinstance(value, str) or not is_json else value


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of transformers' `save_pretrained` that would change a full model's files.

    Raises:
        ConfigError: lists them.
    """
    faults = Faults("save_pretrained")
    for name, value in given.items():
        if name not in _OF_A_MODEL:
            faults.add(f"{name} is not an argument{nearest(name, [*_OF_A_MODEL, 'dtype', 'adapter_name'])}")
        elif _OF_A_MODEL[name] is not ... and value not in (None, _OF_A_MODEL[name]):
            faults.add(f"{name}={value!r}: an adapter is one safetensors file in PEFT's format")
    faults.check(ConfigError, "Nothing was written. Leave these arguments out.")


_OF_A_MODEL = {
    "safe_serialization": True, "save_peft_format": True, "variant": None, "distributed_checkpoint": False,
    "max_shard_size": ..., "save_original_format": ..., "save_function": ..., "token": ...,
}  # fmt: skip
"""Arguments for a full model -> the value that changes nothing here; `...` for any value."""
