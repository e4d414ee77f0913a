"""Resizing the vocabulary of a model with adapters: factors and copies of the embeddings are resized too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import Faults, StateError
from ..layers.class_swap import mixins_of
from ..layers.hosts import Host
from .activation import keep_frozen, update_requires_grad
from .embeddings import output_embedding
from .state import require_state
from .undo import all_or_nothing
from .walk import adapter_layers, original_modules, parts, put, replacements


@contextmanager
def resizing(model: PreTrainedModel) -> Iterator[None]:
    """Put plain embeddings in place, which transformers resizes in the `with` block; then fit the adapters to them."""
    state = require_state(model, "resize_token_embeddings")
    state.refuse_merged("resize_token_embeddings")
    _refuse_joined(model)
    embeddings = {id(m): m for m in (model.get_input_embeddings(), output_embedding(model)) if m is not None}
    _refuse_parts(model, {id(_weight(m)) for m in embeddings.values()})
    keep_frozen(model, state)
    wrapped = {p: r for p, r in replacements(model).items() if any(id(m) in embeddings for m in r.modules())}
    with all_or_nothing(model):
        for path, replacement in wrapped.items():
            put(model, path, replacement.base_layer)
        adapted_head = output_embedding(model)
        sizes = {id(layer): layer.weight.shape for layer in _matrices(model)}
        yield
        head = output_embedding(model)
        if adapted_head is not None and head is not None and head is not adapted_head:
            _move_adapters(adapted_head, head)
        tied = [layer for layer in _matrices(model) if layer.weight.shape != sizes.get(id(layer))]
        affected = {id(m) for m in (model.get_input_embeddings(), head, *tied)}
        for layer in tied:
            if isinstance(layer, nn.Linear):  # transformers does not update it if the new weight came from a tie
                layer.out_features = layer.weight.shape[0]
        for path, replacement in wrapped.items():
            base = model.get_submodule(path)
            put(model, path, replacement)
            replacement.base_layer = base
            affected.add(id(replacement))
        for part in parts(model):
            if id(part.module) in affected:
                part.fit()
        update_requires_grad(model, state, state.adapters)  # transformers freezes a whole frozen embedding again


def _refuse_joined(model: PreTrainedModel) -> None:
    """Refuse embeddings that share a weight: transformers merges them into one module when it resizes them."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    held = {n: m for n, m in original_modules(model) if isinstance(m, nn.Embedding) and m.weight is weight}
    adapted = list(dict.fromkeys(part.path for part in parts(model) if part.path in held)) if len(held) > 1 else []
    if adapted:
        raise StateError(
            f"resize_token_embeddings: {', '.join(held)} share one weight, and resizing merges them into one module: "
            f"the adapters of {', '.join(adapted)} would be lost or apply to all. Resize the vocabulary before "
            "apply_lora."
        )


def _refuse_parts(model: PreTrainedModel, weights: set[int]) -> None:
    """Refuse to resize an embedding with a part that cannot be resized."""
    faults = Faults("resize_token_embeddings")
    for part in parts(model):
        if id(_weight(part.module)) in weights and (why := part.refuse_resizing()) is not None:
            faults.add(f"{part.name}: {why}")
    faults.check(StateError, "Nothing was changed. Resize the vocabulary before apply_lora.")


def _weight(module: Any) -> Any:
    """The weight of the base's module."""
    return getattr(getattr(module, "base_layer", module), "weight", None)


def _matrices(model: PreTrainedModel) -> list[nn.Linear | nn.Embedding]:
    """The adapted layers whose weight may be resized through a tie to the embeddings."""
    return [m for m in adapter_layers(model).values() if isinstance(m, (nn.Linear, nn.Embedding))]


def _move_adapters(old: nn.Module, new: nn.Module) -> None:
    """Move the adapters, if any, of a layer that transformers replaced to the new layer."""
    for mixin in reversed(mixins_of(old)):
        if issubclass(mixin, Host):
            mixin.extend(new)
            new.__dict__[mixin.attribute] = old.__dict__[mixin.attribute]
    for name, child in old._modules.items():
        if name.startswith("lora_"):
            new.add_module(name, child)
    new.train(old.training)
