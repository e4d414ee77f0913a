"""Which tensors in an adapter's file are trained biases, and whose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapt.match import holder
from ..adapt.targets import Explanation
from ..adapt.ties import tensor_users
from ..adapt.walk import module_at, original_modules
from ..errors import Faults
from ..layers.copies import base_bias
from ..layers.parts import bias_key
from .format import AdapterFile
from .keys import key_of


def biases_in(
    model: nn.Module, plan: Explanation, file: AdapterFile, faults: Faults
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors, with each bias once and under the name that this library gives it; and its trained biases.

    PEFT writes a bias that several modules share under the name of each, and also all other tensors called bias, such
    as buffers: those that equal the base's are left out. Files of earlier versions of this library lack the biases of
    some kinds of layers.
    """
    tensors, users = dict(file.tensors), tensor_users(model)
    adapted = {target.path for target in plan.layers}
    found: list[str] = []
    for path in plan.biases:
        others = (name for name in users[id(base_bias(module_at(model, path)))] if holder(name, plan.saved) is None)
        names = list(dict.fromkeys((path, *others)))
        keys = [key_of(name, bias_key(kind)) for name in names for kind in (path in adapted, path not in adapted)]
        given = {key: tensors.pop(key) for key in keys if key in tensors}
        values = list(given.values())
        if any(value.shape != values[0].shape or not torch.equal(value, values[0]) for value in values[1:]):
            faults.add(f"{' and '.join(given)} are one bias in the model, but differ in the file")
        if values:
            tensors[keys[0]] = values[0]
        if values or not file.extras or "biases" in file.extras:
            found.append(path)
    if plan.biases and not file.extras:
        for path, module in original_modules(model):
            key, own = key_of(path, "bias"), module._buffers.get("bias", module._parameters.get("bias"))
            if path not in found and key in tensors and own is not None:
                if is_of_base(tensors[key], own):
                    del tensors[key]
    return tensors, found


def modules_called_bias(model: nn.Module, plan: Explanation, file: AdapterFile) -> dict[str, str]:
    """The modules that PEFT trained whole with `bias="all"`: before 0.20, all with that word in their names.

    Such as relative position biases.
    """
    found: dict[str, str] = {}
    for path, module in original_modules(model) if file.config.bias == "all" and not file.extras else ():
        own = {key_of(path, name): tensor for name, tensor in module._parameters.items() if tensor is not None}
        trained = any(not is_of_base(file.tensors[key], own[key]) for key in own.keys() & file.tensors.keys())
        if "bias" in path and trained and own.keys() <= file.tensors.keys() and holder(path, plan.saved) is None:
            found[path] = "trained with the biases"
    return found


def is_of_base(held: Tensor, own: Tensor) -> bool:
    """Whether a tensor in a file is that of the base, up to the dtype of the file."""
    return not own.is_meta and torch.equal(held, own.detach().to("cpu", held.dtype))
