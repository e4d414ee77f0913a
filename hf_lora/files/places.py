"""Which place of a model a name in a file means, where the model has one module at several places.

PEFT adapts a module at the name that its file has: at its other places, the model has the plain module. So do files of
this library, unless they say that the module was one in training (`joined`).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn
from transformers.utils import logging

from ..adapt.bypass import uncalled_embeddings
from ..adapt.match import ancestors, holder
from ..adapt.targets import Explanation
from ..adapt.ties import names_by_place, part_modules
from ..adapt.undo import all_or_nothing
from ..errors import AdapterFileError
from ..layers.parts import bias_key
from .format import AdapterFile
from .keys import PREFIX, is_row, key_of, split_key
from .names import whole_modules
from .tied import with_its_targets

logger = logging.get_logger(__name__)


@contextmanager
def apart(model: nn.Module, file: AdapterFile, call: str) -> Iterator[AdapterFile]:
    """Part the modules that the file has values for at some of their places only. An error in the block undoes it.

    Yields:
        the file, whose names in target_modules then mean these places alone.

    Raises:
        AdapterFileError: PEFT trained a bias of such a module too, which acts at all places.
    """
    names = _names_apart(model, file)
    if not names:
        yield file
        return
    biases = {key_of(name, bias_key(adapted)) for name in names for adapted in (True, False)} & file.tensors.keys()
    whole = whole_modules(model, file.config, own=bool(file.extras), once=False)
    acting = [key for key in sorted(biases) if holder(key.removeprefix(PREFIX), whole) is None]
    if acting and not file.extras:
        raise AdapterFileError(
            f"{call}: PEFT trained {', '.join(acting)} for all places of a module, but its factors for one, which is "
            "not supported. Nothing was changed. Load the adapter with PEFT."
        )
    with all_or_nothing(model):
        part_modules(model, names, call)
        yield with_its_targets(file)


def _names_apart(model: nn.Module, file: AdapterFile) -> list[str]:
    by_place = names_by_place(model)
    if not by_place:
        return []
    joined = file.extras.get("joined")
    held = {path for key in file.tensors for path in ancestors(key.removeprefix(PREFIX))}
    whole = held.intersection(whole_modules(model, file.config, own=bool(file.extras), once=False))
    named = whole.union(path for path, role in map(split_key, file.tensors) if role not in ("copy", "bias"))
    rows = {path for key in filter(is_row, file.tensors) for path in ancestors(key.removeprefix(PREFIX))}
    uncalled = uncalled_embeddings(model, once=False)
    found: list[str] = []
    for first, names in by_place.items():
        with_rows = rows.intersection(names)
        alone = set() if with_rows <= {first} else with_rows  # rows of the first name are those of all
        touched = [name for name in names if (name in named and name not in uncalled) or name in alone]
        is_one = first in joined if joined is not None else bool(file.extras) and first in named
        if not is_one:
            found += touched if len(touched) < len(names) else touched[1:]
    return found


def without_uncalled(model: nn.Module, file: AdapterFile, plan: Explanation, call: str) -> AdapterFile:
    """Take what another library's file names, but no forward calls, out of the file and its plan: it was not trained.

    Raises:
        AdapterFileError: nothing else is in the file.
    """
    named = {target.path for target in plan.layers}.union(plan.saved)
    reasons = uncalled_embeddings(model, once=False) if not file.extras else {}
    left = {path: why for path, why in reasons.items() if path in named}
    if not left:
        return file
    plan.layers = [target for target in plan.layers if target.path not in left]
    plan.saved = {path: why for path, why in plan.saved.items() if path not in left}
    own = {key: tensor for key, tensor in file.tensors.items() if not _is_of(key, left)}
    says = f"{call}: what the file has for {', '.join(left)} has no effect, as in PEFT"
    why = "; ".join(dict.fromkeys(left.values()))
    if not own:
        raise AdapterFileError(f"{says}, and it has nothing else: {why}.")
    logger.warning(f"{says}, and is left out: {why}.")
    return replace(file, tensors=own)


def called_tensors(model: nn.Module, file: AdapterFile, own: Container[str]) -> dict[str, Tensor]:
    """The tensors of a file without those that are left out of its adapter, which has the keys `own`."""
    reasons = uncalled_embeddings(model, once=False) if not file.extras else {}
    return {key: tensor for key, tensor in file.tensors.items() if key in own or not _is_of(key, reasons)}


def _is_of(key: str, paths: Mapping[str, object]) -> bool:
    return not is_row(key) and not paths.keys().isdisjoint(ancestors(key.removeprefix(PREFIX)))
