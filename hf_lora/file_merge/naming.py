"""From the names in a checkpoint's files to those of the modules in memory, by the rules of transformers.

Tensors in a file may have other names than in the module tree (an older name, another prefix), and one tensor may be
several in memory, or the reverse. transformers applies its conversion rules when it loads; the names come from its
functions. If an operation only moves rows, it is run on row numbers instead of rows: the result maps each row of a
weight in memory to a row of a tensor on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..safe_io.headers import Entry

_TENSOR = 1 << 40
"""A row is encoded as the index of its tensor times this, plus twice its position; the last bit is the column."""


class Run(NamedTuple):
    """`length` rows of a weight in memory, from `row` on, that are contiguous in the tensor `key` of a file."""

    row: int
    key: str
    place: int
    length: int


@dataclass
class Names:
    """Where each tensor of a model is on disk.

    Args:
        direct: name in memory -> name on disk, for tensors that are equal in both.
        converted: name in memory -> its conversion, for all others.
        unknown: names on disk that the model does not use.
    """

    direct: dict[str, str] = field(default_factory=dict)
    converted: dict[str, _Conversion] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @cached_property
    def held(self) -> set[str]:
        """The names in memory of all tensors in the files."""
        return {*self.direct, *self.converted}

    def runs(self, name: str, shape: tuple[int, ...], tensors: dict[str, Entry]) -> list[Run] | str:
        """The rows of a weight, in order, or the reason why they are unknown."""
        if name in self.direct:
            return [Run(0, self.direct[name], 0, shape[0] if shape else 1)]
        return self.converted[name].runs(name, shape, tensors)


@dataclass
class _Conversion:
    """A converter of transformers and its input tensors."""

    converter: Any
    first: str
    model: PreTrainedModel
    collected: dict[str, list[str]] = field(default_factory=dict)

    def results(self, tensors: dict[str, Entry]) -> dict[str, Tensor]:
        """Name in memory -> row numbers."""
        keys = [key for group in self.collected.values() for key in group]
        worker = copy.deepcopy(self.converter)
        for pattern, group in self.collected.items():
            for key in group:
                worker.add_tensor(self.first, key, pattern, _numbers(keys.index(key), tensors[key].shape))
        made = worker.convert(self.first, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def runs(self, name: str, shape: tuple[int, ...], tensors: dict[str, Entry]) -> list[Run] | str:
        keys = [key for group in self.collected.values() for key in group]
        why = f"the checkpoint holds it as {', '.join(keys[:2])}{' …' if len(keys) > 2 else ''}, and its conversion "
        try:
            numbers = self.results(tensors).get(name)
        except Exception as error:  # an operation that does more than move rows may raise any exception
            return f"{why}does more than move rows ({type(error).__name__})"
        like = tensors[keys[0]]
        alike = all(tensors[k].shape[1:] == shape[1:] and tensors[k].dtype == like.dtype for k in keys)
        width = 2 if len(shape) > 1 else 1
        if numbers is None or not alike or tuple(numbers.shape) != (shape[0], width)[: len(shape)]:
            return f"{why}does more than move rows"
        numbers = numbers.reshape(shape[0], width)
        if width == 2 and not bool(((numbers[:, 0] & 1 == 0) & (numbers[:, 1] == numbers[:, 0] + 1)).all()):
            return f"{why}changes the order within rows"
        return _runs(numbers[:, 0] // 2, keys)


def _numbers(index: int, shape: tuple[int, ...]) -> Tensor:
    rows = torch.arange(shape[0] if shape else 1, dtype=torch.int64) * 2 + index * _TENSOR
    return torch.stack([rows, rows + 1], 1) if len(shape) > 1 else rows


def _runs(numbers: Tensor, keys: list[str]) -> list[Run]:
    """Stretches of consecutive rows."""
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist(), len(numbers)]
    half = _TENSOR // 2
    found = []
    for begin, end in pairwise(starts):
        number = int(numbers[begin])
        found.append(Run(begin, keys[number // half], number % half, end - begin))
    return found


def names_on_disk(
    model: PreTrainedModel, tensors: dict[str, Entry], known: Mapping[str, object] | None = None
) -> Names:
    """Match the tensors of a checkpoint to those of a model, as `from_pretrained` would.

    Args:
        known: the names in the model; default: its current ones.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = dict(model.state_dict() if known is None else known)
    prefix = model.base_model_prefix
    found = Names()
    made: dict[str, _Conversion] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:  # as in transformers: it should not have been renamed
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            found.unknown.append(key)
        elif pattern is None:
            found.direct[name] = key
        else:
            conversion = made.setdefault(name, _Conversion(copy.deepcopy(by_pattern[pattern]), name, model))
            conversion.collected.setdefault(pattern, []).append(key)
    for first, conversion in made.items():
        patterns = conversion.converter.target_patterns
        for other in {first, *(first.replace(patterns[0], pattern) for pattern in patterns)}:
            found.converted[other] = conversion
    return found


def misnamed(model: PreTrainedModel, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those of `names` (in memory) that loading would map to another tensor if a file used them."""
    wanted = list(names)
    entries = {name: Entry(name, torch.float32, (1,), 0, 0, Path()) for name in wanted}
    found = names_on_disk(model, entries, dict.fromkeys(known, True)) if wanted else Names()
    return [name for name in wanted if found.direct.get(name) != name]
