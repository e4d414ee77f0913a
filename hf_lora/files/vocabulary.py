"""The rows of a model's token embeddings that an adapter's file holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapt.embeddings import input_embedding, output_embedding, vocabulary_of
from ..adapt.walk import original_modules
from ..errors import Faults
from ..layers.parts import rows_by_path
from .format import AdapterFile, key_of


def vocabulary_in(model: nn.Module, file: AdapterFile) -> tuple[int | None, Tensor | None]:
    """(rows of the token embedding in training, or None if unknown, the whole embedding if the file holds it)."""
    embedding = input_embedding(model)
    path = next((path for path, module in original_modules(model) if module is embedding), "")
    whole = file.tensors.get(key_of(path, "weight"), file.base_copies.get(path)) if embedding is not None else None
    rows = len(whole) if whole is not None and whole.dim() == 2 else file.extras.get("vocabulary")
    return (rows if isinstance(rows, int) else None), whole


def holds_new_rows(model: nn.Module, file: AdapterFile) -> bool:
    """Whether the file has the rows of the token embeddings that the base lacks: in whole embeddings, or alone."""
    ends = (input_embedding(model), output_embedding(model))
    weights = {id(module._parameters.get("weight")) for module in ends if module is not None}
    named = [(path, id(module._parameters.get("weight"))) for path, module in original_modules(model)]
    held = {weight for path, weight in named if path in file.base_copies or key_of(path, "weight") in file.tensors}
    rows, _ = vocabulary_in(model, file)
    new, wanted = range(vocabulary_of(model) or 0, rows or 0), file.config.trainable_token_indices
    if new and wanted:
        modules = dict(original_modules(model))
        trained = ((path, ids) for path, ids in rows_by_path(wanted, modules, Faults("")) if set(ids).issuperset(new))
        held |= {id(modules[path]._parameters.get("weight")) for path, _ in trained}
    return weights <= held


@torch.no_grad()
def fill_new_rows(model: nn.Module, file: AdapterFile, first: int) -> None:
    """Copy the rows from `first` on of the base's embeddings from the file that holds them."""
    for path, module in original_modules(model):
        copied = file.base_copies.get(path)
        weight = module._parameters.get("weight")
        if copied is not None and weight is not None and weight.shape == copied.shape:
            weight[first:] = copied[first:].to(weight)
