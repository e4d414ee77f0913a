"""Plain LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + scaling · B A x, W' = W + scaling · B A."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import AdaptedLayer, Method, Update
from ..inits import taken
from ..ops import Operand, can_use_functions, lora_products, to_compute_dtype, to_float64
from ..sharing import pop_output, store_outputs


class Additive(Method):
    kind = "lora"
    additive = of_product = True

    def forward(self, layer: AdaptedLayer, x: Tensor, names: tuple[str, ...]) -> Tensor:
        state = layer._lora
        # Reentrant checkpointing runs a training forward without gradients first, which must give the same values.
        if (layer.training or torch.is_grad_enabled()) and state.shape.is_matrix and can_use_functions():
            return _for_training(layer, x, names)
        inner = to_compute_dtype(x)
        # A quantized layer has its own compute dtype, and its output has the dtype of its input.
        y: Tensor = layer.product(x if state.storage.quantized else inner)
        x = inner
        for name in names:
            y = plain_update(layer, name, x, y)
        return y

    def fold(self, layer: AdaptedLayer, block: Tensor, names: tuple[str, ...], rows: slice) -> Tensor:
        return self.folding(layer, names)(block, rows)

    def folding(self, layer: AdaptedLayer, names: tuple[str, ...]) -> Update:
        state = layer._lora
        # Each block needs some rows of the left factor and all of the right one, which is cast to float64 once.
        factors = [(*state.shape.factors(layer, name), state.adapters[name].scaling) for name in names]
        exactly = [(left, to_float64(right), scaling) for left, right, scaling in factors]

        def add(block: Tensor, rows: slice) -> Tensor:
            for left, right, scaling in exactly:
                block.view(len(block), -1).addmm_(left[rows].to(block.dtype), right.to(block.dtype), alpha=scaling)
            return block

        return add


def plain_update(layer: AdaptedLayer, name: str, x: Tensor, y: Tensor) -> Tensor:
    """y plus the update of one adapter, with ordinary PyTorch operations."""
    state = layer._lora
    adapter = state.adapters[name]
    p, scaling = adapter.dropout, adapter.scaling
    if p and layer.training:
        x = F.dropout(x, p)
    elif not torch.is_grad_enabled():
        # At one token per step, one more operation costs as much as the products.
        return torch.add(y, state.shape.update(layer, name, x).to(y.dtype), alpha=scaling)
    return y + state.shape.update(layer, name, x, scaling).to(y.dtype)


def _for_training(layer: AdaptedLayer, x: Tensor, names: tuple[str, ...]) -> Tensor:
    """The output with the updates of all adapters, saving little for the backward: see ops.py."""
    group = layer._lora.group
    if group and not layer._lora.taken and not x.is_inference():
        inner = to_compute_dtype(x)
        y = pop_output(layer, x, names, dropout_of(layer, names[0]), lambda member: _operand(member, names[0], inner))
        if y is None:
            y = _together(layer, group, x, names)
        if y is not None:
            return y
    inner = to_compute_dtype(x)
    first, *others = names
    operand = _operand(layer, first, inner)
    if operand is None and not others and layer.whole() is not layer:
        reduced = _without_subtracted(layer, first, inner)
        if reduced is not None:
            return reduced
    if operand is None:
        y, others = layer.product(x if layer._lora.storage.quantized else inner), list(names)
    else:
        (y,) = lora_products(inner, [operand], dropout_of(layer, first), weights=True)
    for name in others:
        a, b = layer.factor("lora_A", name), layer.factor("lora_B", name)
        if y.dtype == inner.dtype:
            added = Operand(y, None, a, b, layer._lora.adapters[name].scaling)
            (y,) = lora_products(inner, [added], dropout_of(layer, name), weights=False)
        else:
            y = plain_update(layer, name, inner, y)
    return y


def _together(
    layer: AdaptedLayer, group: tuple[AdaptedLayer, ...], x: Tensor, names: tuple[str, ...]
) -> Tensor | None:
    """This layer's output, computed together with those of the layers that read the same x; None if that is not
    possible and each layer must be computed alone."""
    if len(names) > 1:
        return None
    inner, (name,), p = to_compute_dtype(x), names, dropout_of(layer, names[0])
    members = []
    for member in group:
        state = member._lora
        if state.taken or state.activity.acting[state.names] != names or dropout_of(member, name) != p:
            continue
        operand = _operand(member, name, inner)
        if operand is not None and not any(t is not None and t.is_inference() for t in operand[:4]):
            members.append((member, operand))
    if len(members) < 2 or not any(member is layer for member, _ in members):
        return None
    computed = lora_products(inner, [operand for _, operand in members], p, weights=True)
    outputs = {id(member): y for (member, _), y in zip(members, computed, strict=True)}
    y = outputs.pop(id(layer))
    store_outputs(layer, x, names, p, members, outputs)
    return y


def _without_subtracted(layer: AdaptedLayer, name: str, x: Tensor) -> Tensor | None:
    """The output of an adapter whose initialization subtracted a product, as a part of the low-rank product.

    None if the base's own forward must run.
    """
    operand = _operand(layer.whole(), name, x)
    if operand is None:
        return None
    base, bias, a, b, scaling = operand
    first_a, first_b = (layer.whole().factor(taken(kind), name) for kind in ("lora_A", "lora_B"))
    p = dropout_of(layer, name)
    if not p:
        stacked = Operand(base, bias, torch.cat([a, first_a]), torch.cat([b, -first_b], 1), scaling)
        return lora_products(x, [stacked], weights=True)[0]
    (y,) = lora_products(x, [Operand(base, bias, first_a, first_b, -scaling)], weights=True)
    return lora_products(x, [Operand(y, None, a, b, scaling)], p, weights=False)[0]


def _operand(layer: AdaptedLayer, name: str, x: Tensor) -> Operand | None:
    weight = layer._lora.shape.weight(layer, x)
    if weight is None:
        return None
    a, b = layer.factor("lora_A", name), layer.factor("lora_B", name)
    return Operand(weight, layer.bias, a, b, layer._lora.adapters[name].scaling)


def dropout_of(layer: AdaptedLayer, name: str) -> float:
    return layer._lora.adapters[name].dropout if layer.training else 0.0
