"""Weights that would be in no file: modules that the base checkpoint lacks, and new rows of the vocabulary.

Both are random, so a model whose adapter was trained with them needs them again. An adapter's file has them if it
trains their modules whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..layers.parts import Planned, TokenRows
from .embeddings import checkpoint_vocabulary, input_embedding, output_embedding, vocabulary_of
from .heads import new_modules
from .state import state_of
from .ties import tensor_users
from .walk import module_at, parts


def modules_in_no_checkpoint(model: nn.Module) -> list[str]:
    """The outermost modules that the base checkpoint lacks, also of a model with adapters."""
    state = state_of(model)
    return new_modules(model) if state is None else state.new_modules


Rows = Mapping[str, Collection[int]]
"""Name of a module -> the rows of its weight that an adapter trains."""


def planned_rows(planned: Iterable[Planned]) -> Rows:
    """The rows that a plan trains."""
    return {each.path: each.options[0] for each in planned if issubclass(each.kind, TokenRows)}


def trained_rows(model: nn.Module, adapter: str) -> Rows:
    """The rows that an adapter trains."""
    return {part.path: part.ids for part in parts(model, adapter) if isinstance(part, TokenRows)}


def unsaved(model: nn.Module, whole: Iterable[str], rows: Rows) -> dict[str, str]:
    """Name -> what of it would be in no file, for an adapter that trains the modules `whole` completely.

    Nothing is known of a model that was created from a config, or that was copied.
    """
    found = dict.fromkeys(modules_in_no_checkpoint(model), "not in the base checkpoint")
    before, now = _sizes(model)
    if before is not None:
        added = [
            name for name in new_rows(model, before) if not set(rows.get(name, ())).issuperset(range(before, now))
        ]
        found = dict.fromkeys(added, f"{now} rows, {before} in the base checkpoint") | found
    inside = tuple(f"{name}." for name in whole)
    return {name: why for name, why in found.items() if not f"{name}.".startswith(inside)}


def why_unsaved(model: nn.Module, whole: Iterable[str], rows: Rows) -> str | None:
    """`unsaved` as a line of an error that names what to train whole; None if everything would be in the file."""
    whole = list(whole)
    found = unsaved(model, whole, rows)
    if not found:
        return None
    listed = ", ".join(f"{name} ({why})" for name, why in found.items())
    wanted = f"modules_to_save={[*whole, *found]!r}"
    instead = ""
    if all(" rows, " in why for why in found.values()):
        first = {id(_weight(model, name)): name for name in reversed(found)}.values()
        before, now = _sizes(model)
        tokens = ", ".join(f"{name!r}: [*range({before}, {now})]" for name in reversed(first))
        instead = (
            f"; or only their new rows: trainable_token_indices={{{tokens}}}; or add no tokens: many tokenizers have "
            "unused ones"
        )
    return f"random, and would be in no file: {listed}. Train them whole: {wanted}{instead}"


def _sizes(model: nn.Module) -> tuple[int | None, int]:
    """The rows of the vocabulary in the base checkpoint, None if unknown, and in memory."""
    state = state_of(model)
    return checkpoint_vocabulary(model) if state is None else state.vocabulary, vocabulary_of(model) or 0


def _weight(model: nn.Module, name: str) -> Any:
    module: Any = module_at(model, name)
    return module.weight


def new_rows(model: nn.Module, before: int) -> list[str]:
    """The input and output embeddings of a language model, and all modules that share their weights, if the
    vocabulary has more than the `before` rows that it had."""
    now = vocabulary_of(model)
    if now is None or now <= before:
        return []
    users, found = tensor_users(model), dict[str, None]()
    for end in (input_embedding(model), output_embedding(model)):
        plain: Any = getattr(end, "base_layer", end)
        weight = getattr(plain, "weight", None)
        for name in users.get(id(weight), ()) if weight is not None else ():
            module: Any = module_at(model, name)
            if getattr(module, "num_embeddings", getattr(module, "out_features", None)) == now:
                found[name] = None
    return list(found)
