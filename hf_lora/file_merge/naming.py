"""From the names in a checkpoint's files to those of the modules in memory, by the loader's own rules.

A file may have other names for its tensors than the module tree (an older name, another prefix), and may hold as one
tensor what are several in memory, or the reverse. transformers has rules for it and applies them when it loads. The
names come from its own functions. Where its operations only move rows, they are run on the numbers of the rows instead
of the rows: the result says for each row of a weight in memory which row of which tensor on disk it is.
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
from torch import Tensor, nn

from ..safe_io.headers import Entry

_TENSOR = 1 << 40
"""The number of a row is its tensor's number times this, plus twice its place; the last bit says which column."""


class Run(NamedTuple):
    """`length` rows of a weight in memory, from `row` on, that lie one after the other in a file's tensor `key`."""

    row: int
    key: str
    place: int
    length: int


@dataclass
class Names:
    """Where each tensor of a model lies on disk.

    Args:
        direct: name in memory -> name on disk, of tensors that are the same in both.
        converted: name in memory -> the conversion that makes it, of all others.
        unknown: names on disk that the model does not take.
    """

    direct: dict[str, str] = field(default_factory=dict)
    converted: dict[str, _Conversion] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @cached_property
    def held(self) -> set[str]:
        """The names in memory of all that the files hold."""
        return {*self.direct, *self.converted}

    def runs(self, name: str, shape: tuple[int, ...], tensors: dict[str, Entry]) -> list[Run] | str:
        """The rows of a weight, in order, or why they cannot be told."""
        if name in self.direct:
            return [Run(0, self.direct[name], 0, shape[0] if shape else 1)]
        return self.converted[name].runs(name, shape, tensors)


@dataclass
class _Conversion:
    """One of transformers' converters and the tensors that it is given."""

    converter: Any
    first: str
    model: Any
    collected: dict[str, list[str]] = field(default_factory=dict)

    def results(self, tensors: dict[str, Entry]) -> dict[str, Tensor]:
        """Name in memory -> numbers of rows."""
        keys = [key for group in self.collected.values() for key in group]
        worker = copy.deepcopy(self.converter)
        for pattern, group in self.collected.items():
            for key in group:
                worker.add_tensor(self.first, key, pattern, _numbers(keys.index(key), tensors[key].shape))
        made = worker.convert(self.first, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def runs(self, name: str, shape: tuple[int, ...], tensors: dict[str, Entry]) -> list[Run] | str:
        keys = [key for group in self.collected.values() for key in group]
        why = f"the checkpoint holds it as {', '.join(keys[:2])}{' …' if len(keys) > 2 else ''}, from which loading "
        try:
            numbers = self.results(tensors).get(name)
        except Exception as error:  # an operation that does more than move rows: whatever it makes of numbers
            return f"{why}makes it in a way that rows alone do not tell ({type(error).__name__})"
        like = tensors[keys[0]]
        alike = all(tensors[k].shape[1:] == shape[1:] and tensors[k].dtype == like.dtype for k in keys)
        width = 2 if len(shape) > 1 else 1
        if numbers is None or not alike or tuple(numbers.shape) != (shape[0], width)[: len(shape)]:
            return f"{why}makes it in a way that rows alone do not tell"
        numbers = numbers.reshape(shape[0], width)
        if width == 2 and not bool(((numbers[:, 0] & 1 == 0) & (numbers[:, 1] == numbers[:, 0] + 1)).all()):
            return f"{why}changes the order within rows too"
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


def names_on_disk(model: Any, tensors: dict[str, Entry], known: Mapping[str, Any] | None = None) -> Names:
    """Match the tensors of a checkpoint to those of a model, as `from_pretrained` would.

    Args:
        known: the names in the model; None takes those that it has now.
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
        if name not in known and key in known:  # as the loader does: it should not have been renamed
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


def misnamed(model: nn.Module, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those of `names` (in memory) that loading would take for something else if they stood in a file."""
    wanted = list(names)
    entries = {name: Entry(name, torch.float32, (1,), 0, 0, Path()) for name in wanted}
    found = names_on_disk(model, entries, dict.fromkeys(known, True)) if wanted else Names()
    return [name for name in wanted if found.direct.get(name) != name]
