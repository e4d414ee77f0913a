"""Tied weights and rows of tokens in a file, in each way in which PEFT writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapt.targets import Explanation
from ..adapt.ties import tensor_users, tied_with_embedding
from ..adapt.walk import original_modules
from ..errors import AdapterFileError, Faults
from ..layers.parts import RowGroup, TokenRows, input_embedding, row_groups, rows_by_path
from .format import AdapterFile
from .keys import key_of, split_key
from .names import whole_modules


def with_all_targets(file: AdapterFile) -> AdapterFile:
    """The file with each module that it has factors of among the targets: PEFT leaves tied ones out of their list."""
    return file if file.extras or not file.config.ensure_weight_tying else with_its_targets(file)


def with_its_targets(file: AdapterFile) -> AdapterFile:
    """The file with the modules that it has factors of as its targets."""
    layers = {path for path, role in map(split_key, file.tensors) if role not in ("copy", "bias")}
    config = replace(
        file.config,
        target_modules=sorted(layers) or file.config.target_modules,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    return replace(file, config=config)


def with_plain_rows(model: nn.Module, file: AdapterFile, call: str) -> AdapterFile:
    """The file with each row once, under the name of the module that owns it; the same file if it has no rows.

    PEFT writes repeated tokens as often as they are named, and the rows of a tied output layer once more if the
    vocabulary has grown. Where only the output layer is named, its rows are not those of the embedding. Where both are
    named with the same tokens, PEFT ties them only if the output layer is named in full.

    Raises:
        AdapterFileError: the file has different values for one row.
    """
    wanted = file.config.trainable_token_indices
    if not wanted:
        return file
    modules, faults = dict(original_modules(model)), Faults(call)
    named = dict(rows_by_path(wanted, modules, Faults("")))
    embedding = input_embedding(modules)
    groups = row_groups(wanted, modules, Faults(""))
    # Files of earlier versions of this library have the rows of all tied modules under any name.
    is_by_name = not file.extras or "ensure_weight_tying" in file.raw
    owners = {group.path for group in groups}
    if is_by_name and isinstance(wanted, dict) and embedding in owners.difference(named):
        wanted = {**wanted, embedding: []}
        groups = row_groups(wanted, modules, Faults(""))
    tensors = dict(file.tensors)
    if differing := _in_other_orders(groups, named, tensors):
        named |= differing
        wanted = dict(rows_by_path(wanted, modules, Faults(""))) | differing
        groups = row_groups(wanted, modules, Faults(""))
    for group in groups:
        names = [group.path, *group.followers]
        keys = [key for name in names if (key := key_of(name, TokenRows.keys[0])) in tensors]
        ids = next(named[name] for name in names if name in named)
        rows = [_each_once(key, tensors.pop(key), ids, faults) for key in keys]
        if any(not torch.equal(each.to(rows[0].dtype), rows[0]) for each in rows):
            faults.add(f"{' and '.join(keys)} are the same rows in the model, but differ in the file")
        if rows:
            tensors[key_of(group.path, TokenRows.keys[0])] = rows[0]
    faults.check(AdapterFileError, "Nothing was changed. Load the adapter with the library that wrote it.")
    return replace(file, tensors=tensors, config=replace(file.config, trainable_token_indices=wanted))


def _in_other_orders(
    groups: Sequence[RowGroup], named: Mapping[str, Sequence[int]], tensors: dict[str, Tensor]
) -> dict[str, list[int]]:
    """Give modules with one weight, the same tokens and rows of their own another order of the tokens each.

    To PEFT, and to this library, they have rows of their own if their lists of tokens differ. The file shows it where
    each has other values.

    Args:
        tensors: those of the file, whose rows are put in the new orders.

    Returns:
        module -> its tokens in the new order.
    """
    alone: dict[tuple[int, ...], list[str]] = {}
    sets: list[list[str]] = []
    for group in groups:
        names = [group.path, *group.followers]
        rows = [tensors.get(key_of(name, TokenRows.keys[0])) for name in names]
        held = [each for each in rows if each is not None]
        if group.alone:
            alone.setdefault(tuple(group.ids), []).append(group.path)
        elif len(held) == len(rows) and named.keys() >= set(names) and any(not torch.equal(r, held[0]) for r in held):
            sets.append(names)
    found: dict[str, list[int]] = {}
    for names in (*sets, *alone.values()):
        for first, name in enumerate(names):
            key, ids = key_of(name, TokenRows.keys[0]), named[name]
            order = [(first + i) % len(ids) for i in range(len(ids))]
            if first and key in tensors and len(tensors[key]) == len(ids):
                found[name], tensors[key] = [ids[i] for i in order], tensors[key][order]
    return found


def left_apart(model: nn.Module, file: AdapterFile) -> bool:
    """Whether PEFT did not tie the copies of modules with one weight though its config asks for it.

    Of those that it ties, it leaves only the embedding in modules_to_save. It knows embeddings by two names.
    """
    if file.extras or not file.config.ensure_weight_tying:
        return False
    named = set(whole_modules(model, file.config, own=False))
    return len(named.intersection(tied_with_embedding(model))) > 1


def reject_tied_products(model: nn.Module, plan: Explanation, call: str) -> None:
    """Refuse a file whose initialization subtracted a product from a weight that other modules have too.

    PEFT subtracts it from all of them, but adds the update to one.

    Raises:
        AdapterFileError: lists the modules.
    """
    users, faults = tensor_users(model), Faults(call)
    for target in plan.layers if any(target.adapter.takes_out for target in plan.layers) else ():
        others = [name for name in users.get(id(target.site.weight), ()) if name != target.path]
        if target.adapter.takes_out and others:
            faults.add(f"{target.path}: its initialization changed {', '.join(others)}, which has the same weight")
    faults.check(AdapterFileError, "Nothing was changed. Load the adapter with PEFT.")


def check_tied_copies(plan: Explanation, tensors: Mapping[str, Tensor], faults: Faults) -> None:
    """Add a fault if modules that are trained whole with one weight have different ones in the file."""
    keys = [key for path in plan.tied if (key := key_of(path, "weight")) in tensors]
    if any(not torch.equal(tensors[key], tensors[keys[0]]) for key in keys):
        faults.add(f"ensure_weight_tying: {' and '.join(keys)} are one weight in the model, but differ in the file")


def _each_once(key: str, rows: Tensor, ids: Sequence[int], faults: Faults) -> Tensor:
    """The rows of the tokens `ids`, the first of each token; the same if their number is another."""
    first = {token: i for i, token in reversed(list(enumerate(ids)))}
    if len(first) == len(ids) or len(rows) != len(ids):
        return rows
    differ = sorted({token for token, row in zip(ids, rows, strict=True) if not torch.equal(row, rows[first[token]])})
    if differ:
        faults.add(f"{key} has different rows for the tokens {differ[:5]}, which trainable_token_indices repeats")
    return rows[[first[token] for token in dict.fromkeys(ids)]]
