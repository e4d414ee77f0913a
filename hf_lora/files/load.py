"""Load an adapter into a model. Everything is checked before anything is changed."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..adapt.bypass import uncalled_embeddings
from ..adapt.inject import inject
from ..adapt.labels import with_task_of_class
from ..adapt.match import ancestors, holder
from ..adapt.request import scalings
from ..adapt.state import LoraState, require_state, state_of
from ..adapt.targets import Explanation, resolve
from ..adapt.ties import join_embeddings, tensor_users
from ..adapt.walk import adapter_layers, module_at, module_of, original_modules, original_state, parts
from ..config import LoraConfig
from ..data.trained import TrainedFormat
from ..errors import AdapterFileError, BaseMismatchError, Faults, TargetError
from ..layers.copies import base_bias
from ..layers.distributed import is_sharded, whole_shape
from ..layers.parts import Bias, Copy, bias_key
from ..layers.site import Site
from ..pooled.pooling import POOLING, Pooling
from .base_config import base_settings, other_settings
from .biases import biases_in, is_of_base, modules_called_bias
from .format import (
    AdapterFile,
    compare,
    compare_kinds,
    read_adapter,
    stored,
)
from .heads import head_source, new_heads, task_by_shape, task_in
from .identity import differs, identify, is_absent, renewed
from .keys import PREFIX, key_of
from .names import frozen_modules, whole_modules
from .places import apart, called_tensors, without_uncalled
from .renamed import with_present_names
from .tied import check_tied_copies, left_apart, reject_tied_products, with_all_targets, with_plain_rows
from .vocabulary import HELD, whole_embeddings

logger = logging.get_logger(__name__)

COMPARED_ROWS = 1024
"""Rows of a base weight that are compared, as float32, at a time."""


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
        AdapterFileError: lists every tensor that is missing, unexpected, not finite or of the wrong shape.
        BaseMismatchError: the adapter was trained on another base (`allow_other_base=True` loads it anyway).
    """
    file = source if isinstance(source, AdapterFile) else read_adapter(source)
    call = call if call.endswith(")") else f"{call}({str(file.path)!r}, {name!r})"
    file = with_present_names(model, with_all_targets(file), call)
    with apart(model, file, call) as file:
        return _load(model, file, name, is_trainable, allow_other_base, call)


def _load(
    model: nn.Module, file: AdapterFile, name: str, is_trainable: bool, allow_other_base: bool, call: str
) -> Explanation:
    state = state_of(model)
    identity = renewed(state.identity, model) if state is not None else identify(model)
    settings = state.settings if state is not None else base_settings(model)
    difference = differs(file.extras.get("base") or {}, identity)
    if difference and not allow_other_base:
        raise BaseMismatchError(
            f"{call}: {difference}. Load the base that the adapter was trained on, or pass allow_other_base=True."
        )
    pooling = _other_pooling(model, file)
    if pooling and getattr(getattr(model, "config", None), POOLING, None):  # its tensors fit
        raise AdapterFileError(f"{call}: {pooling}")
    file, plan, frozen = _plan(model, file, call)
    if left_apart(model, file):
        file = replace(file, config=replace(file.config, ensure_weight_tying=False))
    elif file.config.ensure_weight_tying and (parted := plan.tie(model, all)):
        if is_trainable and len(parted) > 1:
            raise AdapterFileError(
                f"{call}: with ensure_weight_tying, {', '.join(parted)} are trained as one, which is not supported. "
                "Load the adapter without is_trainable=True, or go on training it with PEFT."
            )
        file = replace(file, config=replace(file.config, ensure_weight_tying=False))
    task = task_in(file)
    expected = {
        key_of(path, spec.key): spec.shape_on_disk
        for path, specs in plan.declared()
        for spec in specs.values()
        if spec.key is not None
    }
    adapted = {t.path for t in plan.layers}
    faults = Faults(call)
    tensors, plan.biases = biases_in(model, plan, file, faults)
    keys = {path: key_of(path, bias_key(path in adapted)) for path in plan.biases}
    expected |= {key: whole_shape(base_bias(module_at(model, path))) for path, key in keys.items()}
    task = task or task_by_shape(model, plan, file)
    other = head_source(model, plan, task)
    check_tied_copies(plan, tensors, faults)
    copies: dict[str, Tensor] = {}
    for path in plan.saved:
        head = module_at(model, path) if other is None else other.get_submodule(path)
        copies |= {key_of(path, key): tensor for key, tensor in original_state(head).items()}
    expected |= {key: tuple(tensor.shape) for key, tensor in copies.items()}
    _check_base_copies(model, frozen, allow_other_base, call)
    compare(expected, tensors, faults)
    compare_kinds(copies, tensors, faults)
    next_step = pooling or "Check that the adapter was trained for this model."
    faults.check(AdapterFileError, f"Nothing was changed. {next_step}")
    heads = new_heads(model, plan, other)
    others = other_settings(model, file.extras)
    uncalled = uncalled_embeddings(model)
    lending = [path for path in dict.fromkeys((*adapted, *plan.saved)) if path in uncalled]

    unnamed = {path for path, why in plan.saved.items() if why == HELD}

    def fill(state: LoraState) -> None:
        state.identity, state.settings = identity, settings
        state.adapters[name].trained_format = TrainedFormat.from_json(file.extras.get("training_format"))
        assign(model, name, tensors)
        for part in parts(model, name) if unnamed else ():
            if isinstance(part, Copy) and part.path in unnamed:  # saved with a new vocabulary, and not trained
                for _, tensor in part.tensors():
                    tensor.requires_grad_(False)
        for path in lending:  # they were one module in training, because its script had resized the vocabulary
            join_embeddings(model, path)

    config = with_task_of_class(model, file.config, call)
    inject(
        model, config, name, trainable=is_trainable, from_file=True, plan=plan, heads=heads, task=task, then=fill,
        call=call,
    )  # fmt: skip
    if others:
        logger.warning(f"{call}: the adapter was trained with {others}. This base has other values: set them on it.")
    return plan


def load_adapter_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    name: str = "default",
    without: Collection[str] = (),
) -> None:
    """Load saved values into an existing adapter of the model, exactly.

    Args:
        source: an adapter's folder, or tensors by file key.
        without: layers that lost the adapter since; what a file has for them is left out.

    Raises:
        AdapterFileError: lists every tensor that is missing, unexpected, not finite or of the wrong shape, and layers
            whose scaling differs from the one that the values were trained with.
        BaseMismatchError: the folder's adapter was trained on another base.
    """
    path = "tensors" if isinstance(source, Mapping) else str(source)
    state = require_state(model, "load_adapter_weights")
    state.refuse_merged("load_adapter_weights")
    call = f"load_adapter_weights({path!r}, {name!r})"
    faults = Faults(call)
    if isinstance(source, Mapping):
        tensors = _own_tensors(model, name, source)
    else:
        state.require(name)
        file = with_plain_rows(model, with_present_names(model, read_adapter(source), call), call)
        tensors = _own_tensors(model, name, called_tensors(model, file, stored(parts(model, name))))
        difference = differs(file.extras.get("base") or {}, state.identity)
        if difference:
            raise BaseMismatchError(
                f"{call}: {difference}. Nothing was changed. Load the base that the adapter was trained on, or use "
                "load_adapter(…, allow_other_base=True) to load it onto another one."
            )
        _compare_scalings(state.adapters[name].config, file.config, adapter_layers(model), name, faults)
    for start in (key_of(path, "lora_") for path in without):
        tensors = {key: value for key, value in tensors.items() if not key.startswith(start)}
    own = stored(parts(model, name))
    if any(tensor.is_meta for each in own.values() for _, tensor in each.members):
        faults.add(f"the adapter {name!r} is offloaded; load its values before the model is offloaded")
    aliases = [_alias(key, own) for key in tensors]
    if len(set(aliases)) < len(aliases):
        faults.add("the file contains a bias under two names")
    tensors = dict(zip(aliases, tensors.values(), strict=True))
    compare({key: each.shape for key, each in own.items()}, tensors, faults)
    compare_kinds({key: each.members[0][1] for key, each in own.items()}, tensors, faults)
    faults.check(AdapterFileError, "Nothing was changed.")
    held = [tensor.detach() for each in own.values() for _, tensor in each.members if not is_sharded(tensor)]
    before = [tensor.clone() for tensor in held]
    try:
        assign(model, name, tensors)
    except BaseException:
        for tensor, values in zip(held, before, strict=True):
            tensor.copy_(values)
        raise


def _other_pooling(model: nn.Module, file: AdapterFile) -> str:
    """What to do about a classifier that pools in another way than that of the adapter; else empty."""
    trained = file.extras.get(POOLING)
    own = getattr(getattr(model, "config", None), POOLING, None)
    if not trained or trained == own:
        return ""
    this = f"and this model's reads {Pooling.from_json(own)}" if own else "and this model's class has its own way"
    return (
        f"The adapter's classifier reads {Pooling.from_json(trained)}, {this}. Pass that pooling: "
        "build_classifier(…, pooling=…), hf-lora train --pooling."
    )


def _own_tensors(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A file's tensors without those of the base that are beside them."""
    record = require_state(model, "load_adapter_weights").adapters.get(name)
    if record is None:
        return tensors
    biases = [part.path for part in parts(model, name) if isinstance(part, Bias)]
    plan = Explanation(saved=record.heads, biases=biases)
    buffers, seconds = _other_biases(model, plan, record.config, tensors)
    left = buffers | seconds | _frozen_keys(model, plan, tensors)
    return {key: tensor for key, tensor in tensors.items() if key not in left}


def _compare_scalings(
    own: LoraConfig, saved: LoraConfig, layers: Mapping[str, Site], name: str, faults: Faults
) -> None:
    """Add a fault for the layers whose scaling differs in the file's configuration."""
    found: dict[tuple[float, float], list[str]] = {}
    of_file, of_model = scalings(saved), scalings(own)
    for path, layer in ((path, layer) for path, layer in layers.items() if name in layer._lora.names):
        module = module_of(path, layer)
        pair = of_file(path, module), of_model(path, module)
        if not math.isclose(*pair, rel_tol=1e-9):
            found.setdefault(pair, []).append(path)
    for (then, now), paths in found.items():
        faults.add(
            f"scaling: alpha / rank is {then:g} in the file but {now:g} in the model, for {len(paths)} layers such as "
            f"{paths[0]}"
        )


@torch.no_grad()
def assign(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors by file key into an adapter, without checks."""
    own = stored(parts(model, name))
    for key, tensor in tensors.items():
        own[_alias(key, own)].put(tensor)


def _plan(model: nn.Module, file: AdapterFile, call: str) -> tuple[AdapterFile, Explanation, dict[str, Tensor]]:
    """What the file adapts and trains whole.

    Returns:
        the file with the tensors of the adapter, the plan, and name -> tensor for its copies of tensors of the base.
    """
    file = with_plain_rows(model, file, call)
    whole = whole_modules(model, file.config, own=bool(file.extras))
    try:
        saved = dict.fromkeys(whole, "named in modules_to_save")
        plan = resolve(model, file.config, call, from_file=True, saved=saved)
    except TargetError as error:
        raise AdapterFileError(str(error), error.faults) from error
    file = without_uncalled(model, file, plan, call)
    plan.saved |= {p: why for p, why in whole_embeddings(model, file).items() if holder(p, plan.saved) is None}
    plan.saved |= modules_called_bias(model, plan, file)
    held = {path for key in file.tensors for path in ancestors(key.removeprefix(PREFIX))}
    # A head that only the task implies may be missing; what the file names must be in it, or it would be random.
    named = whole_modules(model, replace(file.config, task_type=None), own=bool(file.extras))
    plan.saved = {
        path: why
        for path, why in plan.saved.items()
        if path in held or (holder(path, named) is not None and original_state(module_at(model, path)))
    }
    reject_tied_products(model, plan, call)
    # In a copy of a layer whose initialization took something out of the base, that is missing.
    reduced = {target.path for target in plan.layers if target.adapter.takes_out}
    frozen = {f"{path}.weight": tensor for path, tensor in file.base_copies.items() if path not in reduced}
    buffers, seconds = _other_biases(model, plan, file.config, file.tensors)
    keys = buffers | (_frozen_keys(model, plan, file.tensors) if file.extras else set())
    frozen |= {key.removeprefix(PREFIX): file.tensors[key] for key in keys}
    tensors = {key: tensor for key, tensor in file.tensors.items() if key not in keys | seconds}
    return replace(file, tensors=tensors), plan, frozen


def _frozen_keys(model: nn.Module, plan: Explanation, tensors: Mapping[str, Tensor]) -> set[str]:
    """The tensors in a file of this library that are there because PEFT would train their modules whole."""
    frozen = frozen_modules(model, list(plan.saved), None)
    names = [f"{path}.{name}" for path in frozen for name in original_state(module_at(model, path))]
    keys = {f"{PREFIX}{name}" for name in names if holder(name, plan.saved) is None}
    return (keys & tensors.keys()) - {key_of(path, "bias") for path in plan.biases}


def _other_biases(
    model: nn.Module, plan: Explanation, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[set[str], set[str]]:
    """Plan the parameters called `bias` that PEFT trained in other modules than layers.

    Returns:
        the keys of buffers called `bias` and of frozen tensors that PEFT saved for their names, and those that have no
        effect: of second names of a bias of the plan, with equal values, or of a module that is trained whole.
    """
    buffers, seconds = set[str](), set[str]()
    modules = dict(original_modules(model, once=False)) if config.bias == "all" else {}
    planned = {id(modules[path]._parameters["bias"]): path for path in plan.biases if modules}
    users = tensor_users(model) if modules else {}
    for key in tensors:
        path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        if path not in modules or path in plan.biases or holder(path, plan.saved) is not None:
            continue
        if leaf != "bias":
            own = modules[path]._parameters.get(leaf, modules[path]._buffers.get(leaf))
            if "bias" in f"{path}.{leaf}" and own is not None and is_of_base(tensors[key], own):
                buffers.add(key)
            continue
        bias = modules[path]._parameters.get("bias")
        if bias is None and "bias" in modules[path]._buffers:
            buffers.add(key)
        elif bias is not None and any(holder(name, plan.saved) is not None for name in users[id(bias)]):
            seconds.add(key)  # the module that uses it is trained whole, with a bias of its own
        elif bias is not None and id(bias) not in planned:
            plan.biases.append(path)
            planned[id(bias)] = path
        elif bias is not None and _same_as(planned[id(bias)], tensors[key], tensors):
            seconds.add(key)
    return buffers, seconds


def _same_as(path: str, values: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the bias of the module `path` has these values in the file."""
    found = (tensors.get(key_of(path, bias_key(adapted))) for adapted in (True, False))
    return any(each is not None and torch.equal(each.to(values.dtype), values) for each in found)


def _check_base_copies(model: nn.Module, copies: Mapping[str, Tensor], allow_other_base: bool, call: str) -> None:
    """Compare copies of tensors of the base with the base, up to the rounding of a 16-bit copy."""
    faults = Faults(call)
    modules = dict(original_modules(model, once=False)) if copies else {}
    for name, copied in copies.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        weight = None if module is None else module._parameters.get(leaf, module._buffers.get(leaf))
        if weight is None or is_absent(weight) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
            continue
        if is_sharded(weight):
            continue
        if weight.shape != copied.shape:
            faults.add(f"{name}: the file's base has {list(copied.shape)}, this one {list(weight.shape)}")
        elif not all(
            torch.allclose(own.cpu().float(), block.float(), rtol=2**-7, atol=1e-6)
            for own, block in zip(weight.detach().split(COMPARED_ROWS), copied.split(COMPARED_ROWS), strict=True)
        ):
            faults.add(f"{name}: its values in the file's base differ from those of this model")
    if not allow_other_base:
        faults.check(
            BaseMismatchError, "Load the base that the adapter was trained on, or pass allow_other_base=True."
        )


def _alias(key: str, own: Container[str]) -> str:
    """The key in `own` for a file key: the bias of an adapted layer may be named with or without `base_layer`."""
    if key in own:
        return key
    other = (
        key.replace(".base_layer.bias", ".bias") if ".base_layer." in key else key.replace(".bias", ".base_layer.bias")
    )
    return other if other in own else key


def _holds(key: str, path: str) -> bool:
    return key.startswith(key_of(path, ""))
