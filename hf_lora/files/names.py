"""Which modules the names in an adapter_config.json select in PEFT, and the names that select the right ones.

PEFT reads the same names by three rules: `target_modules` and `exclude_modules` match whole names, suffixes of whole
components or one regular expression; modules inside one of `modules_to_save` are never adapted; and every module whose
name ends with the text of one of `modules_to_save` is trained whole, so that PEFT needs all its tensors in the file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapt.match import TASK_HEADS, ancestors, ending_with, holder, matcher
from ..adapt.walk import original_modules
from ..config import PRESETS, LoraConfig
from ..errors import listed


def outermost(names: Iterable[str]) -> list[str]:
    """Those of `names` that no other of them contains."""
    wanted = dict.fromkeys(names)
    return [name for name in wanted if holder(name, wanted) == name]


def whole_modules(model: nn.Module, config: LoraConfig, own: bool, once: bool = True) -> list[str]:
    """The modules that a file may hold whole.

    Args:
        own: whether this library wrote the file: it names whole modules by their full names.
        once: name a module with several names by the first one alone.
    """
    names = [name for name, _ in original_modules(model, once) if name]
    wanted = set(config.modules_to_save or ())
    if not own:
        return outermost(ending_with(names, wanted.union(_task_heads(config.task_type))))
    hits = matcher(wanted.difference(names))  # a file that was edited
    return outermost(name for name in names if name in wanted or hits(name))


def frozen_modules(model: nn.Module, heads: Collection[str], task_type: str | None) -> list[str]:
    """The modules outside `heads` that PEFT would train whole too, so that it needs their tensors in the file."""
    among = set(heads)
    return [name for name in outermost(_further_modules(model, among, task_type)) if holder(name, among) is None]


def _further_modules(model: nn.Module, heads: set[str], task_type: str | None) -> list[str]:
    """The modules that PEFT would train whole if a file names `heads`, without these."""
    names = [name for name, _ in original_modules(model, once=False) if name]
    return [name for name in ending_with(names, [*heads, *_task_heads(task_type)]) if name not in heads]


def adapted_in_peft(values: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Those of `names` that PEFT adapts, without `layers_to_transform`."""
    hits, excludes = matcher(values["target_modules"]), matcher(values["exclude_modules"] or [])
    whole = matcher([*(values["modules_to_save"] or []), *_task_heads(values["task_type"])])
    return {name for name in names if hits(name) and not excludes(name) and not any(map(whole, ancestors(name)))}


def _also_read(values: Mapping[str, Any], names: Iterable[str], adapted: set[str]) -> list[str]:
    """The differences between `adapted` and what PEFT adapts, or this library, which reads whole modules exactly."""
    names, whole = list(names), values["modules_to_save"] or ()
    here = adapted_in_peft({**values, "modules_to_save": None, "task_type": None}, names)
    here = {name for name in here if holder(name, whole) is None}
    return sorted((here ^ adapted) | (adapted_in_peft(values, names) ^ adapted))


@dataclass
class Written:
    """The fields with names of an adapter_config.json, and the frozen modules whose tensors PEFT needs with them."""

    fields: dict[str, Any]
    frozen: list[str]


def names_to_write(
    model: nn.Module, config: LoraConfig, task_type: str | None, adapted: set[str], heads: Sequence[str]
) -> Written:
    """Names with which PEFT, and this library, selects exactly the modules `adapted` and `heads`.

    The configuration's own names are kept if they do. A `task_type` for which PEFT expects a head that is not trained
    is left out.
    """
    whole = set(heads)
    further = _further_modules(model, whole, None)
    if _further_modules(model, whole, task_type) != further:
        task_type = None
    names = [path for path, _ in original_modules(model, once=False) if path]
    fields: dict[str, Any] = {
        "task_type": task_type,
        "modules_to_save": list(heads) or None,
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
    }
    limited = config.layers_to_transform is not None or config.exclude_modules
    if config.target_modules in PRESETS or limited or _also_read(fields, names, adapted):
        fields |= {"layers_to_transform": None, "layers_pattern": None}
        fields |= _shortest(fields, names, adapted)
    _warn_of(further, adapted - adapted_in_peft(fields, names), adapted, heads)
    with_layers = {path for name in adapted for path in ancestors(name)}
    return Written(fields, [path for path in frozen_modules(model, heads, None) if path not in with_layers])


def _warn_of(further: list[str], unselected: set[str], adapted: set[str], heads: Sequence[str]) -> None:
    """Say which names PEFT cannot tell from those of `heads`: no other names would, and no tensors would help."""
    among, whole = set(further), set(heads)
    lost = sorted(unselected.union(name for name in (*adapted, *heads) if holder(name, among) is not None))
    lost += [name for name in further if holder(name, whole) is not None]
    if lost:
        warnings.warn(
            f"PEFT cannot load this adapter: it takes every module whose name ends with one of {listed(list(heads))} "
            f"as trained whole, so also {listed(lost)}. hf_lora loads it. For PEFT, give the modules other names, or "
            "merge the adapter.",
            stacklevel=5,
        )


def _shortest(fields: Mapping[str, Any], names: Sequence[str], adapted: set[str]) -> dict[str, Any]:
    """A last component where all modules with it are adapted, else whole names, and what these match too much."""
    found: dict[str, Any] = {"target_modules": shortest_names(adapted, names), "exclude_modules": None}
    wrong = [name for name in _also_read({**fields, **found}, names, adapted) if name not in adapted]
    if wrong:
        found["exclude_modules"] = wrong
        if _also_read({**fields, **found}, names, adapted):  # a name is the end of an adapted one
            found["exclude_modules"] = "|".join(map(re.escape, wrong))
    return found


def shortest_names(adapted: Collection[str], names: Iterable[str]) -> list[str]:
    """Names that match `adapted`: a last component if all modules with it are adapted, else the whole path."""
    last = {path.rpartition(".")[2] for path in adapted}
    others = {path.rpartition(".")[2] for path in names if path not in adapted}
    unique = last - others
    return sorted(unique) + sorted(path for path in adapted if path.rpartition(".")[2] not in unique)


def _task_heads(task_type: str | None) -> tuple[str, ...]:
    return TASK_HEADS.get(task_type or "", ())
