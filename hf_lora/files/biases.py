"""Which tensors in an adapter's file are trained biases, and whose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        names = [path, *(name for name in users[id(base_bias(module_at(model, path)))] if name != path)]
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
                if torch.equal(tensors[key], own.detach().to("cpu", tensors[key].dtype)):
                    del tensors[key]
    return tensors, found
