"""The size of the vocabulary in an adapter's file and in its base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapt.embeddings import input_embedding, output_embedding, vocabulary_of
from ..adapt.walk import original_modules
from ..errors import BaseMismatchError, Faults
from ..layers.parts import row_groups
from .format import AdapterFile
from .keys import key_of


def fit_vocabulary(model: nn.Module, file: AdapterFile, allow_other_base: bool) -> None:
    """Resize the base's vocabulary to its size in training, if the adapter contains the rows that the base lacks."""
    now = vocabulary_of(model)
    if now is None or not isinstance(model, PreTrainedModel):
        return
    saved, whole = vocabulary_in(model, file)
    if saved is None or saved == now:
        return
    embedding: Any = model.get_input_embeddings()
    if whole is not None and whole.shape[1:] != embedding.weight.shape[1:]:
        return  # it does not fit, which is reported with all other faults
    if holds_new_rows(model, file) or (whole is not None and (saved < now or allow_other_base)):
        model.resize_token_embeddings(saved, mean_resizing=False)
        fill_new_rows(model, file, now)
    elif saved > now and not allow_other_base:
        raise BaseMismatchError(
            f"LoraModel.from_pretrained({str(file.path)!r}): the adapter was trained with {saved} rows of the token "
            f"embedding, but the base has {now}, and no file contains the new rows. Resize the base as the training "
            "script did and pass it as base_model=, or pass allow_other_base=True to load without them."
        )


HELD = "the file holds it whole"
"""Why an embedding is kept whole that the file's config does not name."""


def whole_embeddings(model: nn.Module, file: AdapterFile) -> dict[str, str]:
    """Embeddings that another library's file holds whole without naming them, as PEFT's do for a new vocabulary."""
    if file.extras:
        return {}
    ends = {id(m) for m in (input_embedding(model), output_embedding(model)) if m is not None}
    named = [path for path, m in original_modules(model) if id(m) in ends]
    return {p: HELD for p in named if key_of(p, "weight") in file.tensors}


def vocabulary_in(model: nn.Module, file: AdapterFile) -> tuple[int | None, Tensor | None]:
    """(rows of the token embedding in training, or None if unknown, the whole embedding if the file holds it)."""
    embedding = input_embedding(model)
    path = next((path for path, module in original_modules(model) if module is embedding), "")
    whole = file.tensors.get(key_of(path, "weight"), file.base_copies.get(path)) if embedding is not None else None
    rows = len(whole) if whole is not None and whole.dim() == 2 else file.extras.get("vocabulary")
    rows = rows or (_rows_of_tokens(model, file) if not file.extras else None)
    return (rows if isinstance(rows, int) else None), whole


def _rows_of_tokens(model: nn.Module, file: AdapterFile) -> int | None:
    """The rows that the vocabulary must have for the tokens of another library's file, if the base has fewer."""
    now, modules = vocabulary_of(model) or 0, dict(original_modules(model))
    ends = (input_embedding(model), output_embedding(model))
    groups = row_groups(file.config.trainable_token_indices or {}, modules, Faults(""))
    most = max((max(g.ids) + 1 for g in groups if g.ids and modules[g.path] in ends), default=0)
    return most if most > now else None


def holds_new_rows(model: nn.Module, file: AdapterFile) -> bool:
    """Whether the file has the rows of the token embeddings that the base lacks: in whole embeddings, or alone."""
    ends = [module for module in (input_embedding(model), output_embedding(model)) if module is not None]
    named = [(path, id(module._parameters.get("weight"))) for path, module in original_modules(model)]
    held = {weight for path, weight in named if path in file.base_copies}
    # A module that is trained whole holds its own rows, and not those of another one that shares its weight.
    whole = {id(module) for path, module in original_modules(model) if key_of(path, "weight") in file.tensors}
    rows, _ = vocabulary_in(model, file)
    new, modules = range(vocabulary_of(model) or 0, rows or 0), dict(original_modules(model))
    groups = row_groups(file.config.trainable_token_indices or {}, modules, Faults("")) if new else []
    trained = (group for group in groups if set(group.ids).issuperset(new))
    whole |= {id(modules[path]) for group in trained for path in (group.path, *group.followers)}
    return all(id(module._parameters.get("weight")) in held or id(module) in whole for module in ends)


@torch.no_grad()
def fill_new_rows(model: nn.Module, file: AdapterFile, first: int) -> None:
    """Copy the rows from `first` on of the base's embeddings from the file that holds them."""
    for path, module in original_modules(model):
        copied = file.base_copies.get(path, file.tensors.get(key_of(path, "weight")))
        weight = module._parameters.get("weight")
        if copied is not None and weight is not None and weight.shape == copied.shape:
            weight[first:] = copied[first:].to(weight)
